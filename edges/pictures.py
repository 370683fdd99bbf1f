"""Pictures that strangers send: looked at before a pixel is decoded, then encoded again as plain PNG, so that nothing else of them is left.

PNG, JPEG and WebP, one frame, of a size that fits into memory. What comes out is 8 bits, sRGB, upright and without metadata; what hid
behind or inside the file is gone. How many are decoded at once in a process is limited, and with it what decoding takes of memory.
"""

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

MAX_PIXELS, MAX_SIDE_PX = 16_800_000, 8192
ACCEPTED = {"formats": ["PNG", "JPEG", "WebP"], "max_pixels": MAX_PIXELS, "max_side_px": MAX_SIDE_PX, "frames": 1}
AT_ONCE = 2  # some 350 MB each at worst
WAIT_S = 10.0
MAX_PARTS = 20_000  # chunks of a PNG: a file of millions of empty ones keeps its reader busy
MAX_SCANS = 100  # of a JPEG: each is another pass over all of its pixels
MAX_ICC_BYTES = 4_000_000

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # not stuffing, not a restart
_slots = threading.BoundedSemaphore(AT_ONCE)


class NotAPicture(Exception):
    """What was sent cannot be used; the message continues "the picture …" and says why. ACCEPTED says what could be."""


class TooBusy(Exception):
    """As many pictures are being decoded as may be at once; a moment later will do."""


@dataclass(frozen=True)
class Picture:
    """A picture as it is kept: PNG of mode L, RGB or RGBA."""

    content: bytes
    mode: str
    width_px: int
    height_px: int


def normalise(source: bytes | BinaryIO) -> Picture:
    """Decode what a stranger sent and encode it again. Raises NotAPicture, TooBusy.

    source: a file is read only once it is this picture's turn, so that those that wait take no memory.
    """
    with _turn():
        content = source if isinstance(source, bytes) else source.read()
        kind = _kind(content)
        _check_structure(kind, content)
        try:
            with Image.open(io.BytesIO(content), formats=[kind]) as image:
                _check_header(image)
                return _encoded(_plain(image))
        except NotAPicture:
            raise
        except Image.DecompressionBombError:
            raise NotAPicture(f"has more than {MAX_PIXELS} pixels") from None
        except Exception as error:
            raise NotAPicture("is damaged or cut off") from error


def fitted(content: bytes, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """A kept picture as RGB [h, w, 3]: over white where it is transparent, scaled to cover the size, the middle cut out."""
    with _slots, Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.mode == "RGBA":
            over = Image.new("RGBA", image.size, "white")
            over.alpha_composite(image)
            flat = over.convert("RGB")
        else:
            flat = image.convert("RGB")
        return np.asarray(ImageOps.fit(flat, (width_px, height_px), Image.Resampling.LANCZOS))


def fitted_mask(content: bytes, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """A kept picture as a mask [h, w], 255 where it is repainted: where it is transparent, or white if it is transparent nowhere."""
    with _slots, Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        if alpha is None or alpha.getextrema() == (255, 255):
            grey = image.convert("RGB").convert("L")
        else:
            grey = ImageOps.invert(alpha)
        soft = ImageOps.fit(grey, (width_px, height_px), Image.Resampling.BOX)
    return np.asarray(soft.point(lambda value: 255 if value >= 128 else 0))


@contextmanager
def _turn() -> Iterator[None]:
    if not _slots.acquire(timeout=WAIT_S):
        raise TooBusy
    try:
        yield
    finally:
        _slots.release()


def _kind(content: bytes) -> str:
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    raise NotAPicture("is empty" if not content else "is neither PNG nor JPEG nor WebP, by its first bytes")


def _check_structure(kind: str, content: bytes) -> None:
    """Is the file whole, and not one that was made to keep its reader busy? Raises NotAPicture."""
    parts, is_whole = {"PNG": _png_parts, "JPEG": _jpeg_scans, "WEBP": _webp_parts}[kind](content)
    if not is_whole:
        raise NotAPicture("is cut off")
    if parts > (MAX_SCANS if kind == "JPEG" else MAX_PARTS):
        raise NotAPicture(f"consists of more parts than any picture needs ({parts} or more)")


def _png_parts(content: bytes) -> tuple[int, bool]:
    """Its chunks, and whether its end is there."""
    at = 8
    for count in range(1, MAX_PARTS + 2):
        if at + 12 > len(content):
            return count, False
        length, name = struct.unpack_from(">I4s", content, at)
        at += 12 + length
        if name == b"IEND":
            return count, at <= len(content)
    return MAX_PARTS + 1, True


def _jpeg_scans(content: bytes) -> tuple[int, bool]:
    """Its scans, and whether its end is there."""
    at, scans = 2, 0
    while scans <= MAX_SCANS and (found := _JPEG_MARKER.search(content, at)):
        marker, at = found[1][0], found.end()
        if marker == 0xD9:
            return scans, True
        if marker == 0x01 or at + 2 > len(content):
            continue
        scans += marker == 0xDA
        at += struct.unpack_from(">H", content, at)[0]
    return scans, scans > MAX_SCANS


def _webp_parts(content: bytes) -> tuple[int, bool]:
    return 1, len(content) >= 20 and struct.unpack_from("<I", content, 4)[0] + 8 <= len(content)


def _check_header(image: Image.Image) -> None:
    """Raises NotAPicture; no pixel is decoded yet."""
    width_px, height_px = image.size
    if not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE_PX:
        raise NotAPicture(f"is {width_px}x{height_px} pixels; each side must be from 1 to {MAX_SIDE_PX}")
    if width_px * height_px > MAX_PIXELS:
        raise NotAPicture(f"is {width_px}x{height_px} pixels; at most {MAX_PIXELS} pixels are accepted")
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != "MPO":  # what some cameras call a JPEG with further pictures behind it
        raise NotAPicture(f"is animated: it has {frames} frames")


def _plain(image: Image.Image) -> Image.Image:
    """The decoded picture: L, RGB or RGBA, sRGB, upright."""
    image.load()
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    plain = _of_8_bits(image)
    if isinstance(profile, bytes) and len(profile) <= MAX_ICC_BYTES:
        plain = _to_srgb(plain, profile)
    elif plain.mode == "CMYK":
        plain = plain.convert("RGB")
    if orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[orientation])
    return plain


def _of_8_bits(image: Image.Image) -> Image.Image:
    """L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):  # 16 bits, of which convert() would cut off whatever is above 255
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """By the profile that came with it; a profile that cannot be read, or is another kind of picture's, is none."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha is not None else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        converted = None
    result = converted or colours.convert("L" if colours.mode == "L" else "RGB")
    if alpha is not None:
        result.putalpha(alpha)
    return result.convert("L") if image.mode == "L" else result


def _orientation(image: Image.Image) -> int:
    """By the EXIF of a loaded picture (of another it would be loaded here, and errors lost); 1, upright, where that cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - as above
        return 1


def _encoded(plain: Image.Image) -> Picture:
    plain.info.clear()  # or its profile and its text would be written again
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=1)
    return Picture(buffer.getvalue(), plain.mode, *plain.size)
