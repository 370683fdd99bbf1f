"""Check untrusted pictures before decoding, and encode them again as plain PNG.

PNG, JPEG and WebP, one frame, of a size that fits into memory; a larger JPEG is decoded at a half,
a quarter or an eighth of its size. The result is 8 bits, sRGB, upright and without metadata;
nothing else that the file held is left. The untrusted bytes are decoded in processes of their own
(edges/decoders.py).
"""

import io
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from edges.containers import Container, NotAContainer, take_apart

MAX_PIXELS = 16_800_000
MAX_SIDE_PX = 8192
MAX_JPEG_PIXELS = 64_000_000  # of a JPEG that is scaled down while it is decoded
MAX_JPEG_SIDE_PX = 16_384
ACCEPTED = {
    "formats": ["PNG", "JPEG", "WebP"],
    "max_pixels": MAX_PIXELS,
    "max_side_px": MAX_SIDE_PX,
    "max_jpeg_pixels": MAX_JPEG_PIXELS,
    "frames": 1,
}
MAX_SCANNED_PIXELS = 600_000_000  # of a JPEG: each scan is another pass over all of its pixels
_SCALES = (1, 2, 4, 8)  # what a JPEG can be decoded at

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_slots = threading.BoundedSemaphore(2)  # for decoding pictures that we have encoded ourselves


class NotAPicture(Exception):
    """The picture cannot be used; the message continues "the picture …" and says why.

    ACCEPTED says what can be used.
    """


@dataclass(frozen=True)
class NormalisedPicture:
    """Hold a picture as it is stored: PNG of mode L, RGB or RGBA."""

    content: bytes
    mode: str
    width_px: int
    height_px: int


def normalise(content: bytes) -> NormalisedPicture:
    """Decode an untrusted picture and encode it again. Raises NotAPicture."""
    try:
        container = take_apart(content)
        with Image.open(io.BytesIO(container.essence), formats=[container.kind]) as image:
            _scale_down(image, container)
            _check_header(image, container)
            return _encoded(_plain(image, container))
    except (NotAPicture, NotAContainer) as error:
        raise NotAPicture(str(error)) from None
    except Image.DecompressionBombError:
        raise NotAPicture(f"has more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise NotAPicture("takes too much memory to decode") from None
    except Exception as error:
        raise NotAPicture("is damaged or cut off") from error


def fitted(content: bytes, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Decode a stored picture to RGB [h, w, 3].

    Transparency is laid over white; the picture is scaled to cover the size and centre-cropped.
    """
    with _slots, Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.mode == "RGBA":
            over = Image.new("RGBA", image.size, "white")
            over.alpha_composite(image)
            flat = over.convert("RGB")
        else:
            flat = image.convert("RGB")
        return np.asarray(ImageOps.fit(flat, (width_px, height_px), Image.Resampling.LANCZOS))


def fitted_mask(content: bytes, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Decode a stored picture to a mask [h, w], 255 where the image is repainted.

    That is where the picture is at least half transparent, in a part that can be seen at this size.
    White decides instead if nothing is transparent, or if alpha is the same everywhere while some
    parts are white and others are not: a uniform alpha selects nothing.
    """
    with _slots, Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        light = _selected(image.convert("RGB").convert("L"), width_px, height_px)
        if image.mode != "RGBA":
            return light
        alpha = image.getchannel("A")
        holes = _selected(ImageOps.invert(alpha), width_px, height_px)
    least, most = alpha.getextrema()
    says_nothing = least == most and light.any() and not light.all()
    return light if says_nothing or not holes.any() else holes


def has_hole(content: bytes, width_px: int, height_px: int) -> bool:
    """Tell whether part of a stored picture is transparent, and can be seen at this size."""
    with _slots, Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return image.mode == "RGBA" and bool(
            _selected(ImageOps.invert(image.getchannel("A")), width_px, height_px).any()
        )


def selects(content: bytes, width_px: int, height_px: int) -> bool:
    """Tell whether this mask selects anything to repaint."""
    return bool(fitted_mask(content, width_px, height_px).any())


def _selected(grey: Image.Image, width_px: int, height_px: int) -> NDArray[np.uint8]:
    soft = ImageOps.fit(grey, (width_px, height_px), Image.Resampling.BOX)
    return np.asarray(soft.point(lambda value: 255 if value >= 128 else 0))


def _scale_down(image: Image.Image, container: Container) -> None:
    """Have Pillow decode a too large JPEG at a fraction of its size, to save memory."""
    width_px, height_px = image.size
    if (
        container.kind != "JPEG"
        or width_px * height_px > MAX_JPEG_PIXELS
        or max(image.size) > MAX_JPEG_SIDE_PX
    ):
        return
    if container.scans * width_px * height_px > MAX_SCANNED_PIXELS:
        raise NotAPicture(
            f"has too many progressive scans: {container.scans} over {width_px}x{height_px} pixels"
        )
    for scale in _SCALES:
        pixels = -(-width_px // scale) * -(-height_px // scale)
        side_px = -(-max(image.size) // scale)
        if pixels <= MAX_PIXELS and side_px <= MAX_SIDE_PX:
            image.draft(image.mode, (width_px // scale, height_px // scale))
            return


def _check_header(image: Image.Image, container: Container) -> None:
    """Raise NotAPicture for a size that is not accepted; no pixel is decoded yet."""
    width_px, height_px = image.size
    is_jpeg = container.kind == "JPEG"
    if not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE_PX:
        most = MAX_JPEG_SIDE_PX if is_jpeg else MAX_SIDE_PX
        raise NotAPicture(f"is {width_px}x{height_px} pixels; each side must be from 1 to {most}")
    if width_px * height_px > MAX_PIXELS:
        limit = f"{MAX_JPEG_PIXELS}" if is_jpeg else f"{MAX_PIXELS} (JPEG: {MAX_JPEG_PIXELS})"
        raise NotAPicture(f"is {width_px}x{height_px} pixels; at most {limit} pixels are accepted")


def _plain(image: Image.Image, container: Container) -> Image.Image:
    """Decode the picture: L, RGB or RGBA, sRGB, upright."""
    image.load()
    plain = _of_8_bits(image)
    if container.profile is not None:
        plain = _to_srgb(plain, container.profile)
    elif plain.mode == "CMYK":
        plain = plain.convert("RGB")
    if container.orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[container.orientation])
    return plain


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Convert to 8 bits: L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):  # 16 bits: convert() would clip all values above 255
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB by the picture's profile; ignore a profile that cannot be read or applied."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha is not None else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        converted = None
    result = converted or colours.convert("L" if colours.mode == "L" else "RGB")
    if alpha is not None:
        result.putalpha(alpha)
    return result.convert("L") if image.mode == "L" else result


def _encoded(plain: Image.Image) -> NormalisedPicture:
    plain.info.clear()  # or its profile and its text would be written again
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=1)
    return NormalisedPicture(buffer.getvalue(), plain.mode, *plain.size)
