"""Pictures as tenants send them: sound ones, and files that only look like it."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

KINDS = ("PNG", "JPEG", "WEBP")
CONTENT_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
BEGINNING = b"\x89PNG\r\n\x1a\n"


def a_picture(
    width_px: int = 96, height_px: int = 64, *, mode: str = "RGB", seed: int = 0
) -> Image.Image:
    """A ramp with a disc in it: different everywhere, and its own mirror image nowhere."""
    ramp = Image.linear_gradient("L").resize((width_px, height_px))
    picture = Image.merge(
        "RGB",
        (
            ramp,
            ramp.transpose(Image.Transpose.ROTATE_180),
            Image.new("L", ramp.size, 40 * (seed % 6)),
        ),
    )
    draw = ImageDraw.Draw(picture)
    draw.ellipse(
        (width_px // 8, height_px // 8, width_px // 2, height_px // 2),
        fill=(200, (30 * seed) % 256, 60),
    )
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(picture: Image.Image | None = None, **options) -> bytes:
    return encoded(picture or a_picture(), "PNG", **options)


def decoded(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def turned(kind: str, orientation: int) -> bytes:
    """A picture that says in its EXIF how it has to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(a_picture(), kind, exif=exif.tobytes())


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(
    width_px: int,
    height_px: int,
    data: bytes,
    *,
    bits: int = 8,
    colours: int = 0,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG of these scan lines, whatever its header says.

    colours: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
    """
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, bits, colours, 0, 0, 0))
    return (
        BEGINNING + head + before + chunk(b"IDAT", zlib.compress(data, 9)) + after + chunk(b"IEND")
    )


def lines(pixels: np.ndarray) -> bytes:
    """The scan lines of a PNG with these pixels, big-endian and not filtered."""
    return b"".join(b"\0" + row.astype(f">u{pixels.dtype.itemsize}").tobytes() for row in pixels)


def grey_of_16_bits(width_px: int = 96, height_px: int = 64) -> np.ndarray:
    """Every brightness from 0 to 65535, evenly."""
    return (
        np.linspace(0, 65535, width_px * height_px).astype(np.uint16).reshape(height_px, width_px)
    )


def swapped_profile() -> bytes:
    """An ICC profile whose red is sRGB's green, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return (
        profile.replace(b"rXYZ", b"xxxx", 1)
        .replace(b"gXYZ", b"rXYZ", 1)
        .replace(b"xxxx", b"gXYZ", 1)
    )


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("evil.html", "<script>alert(1)</script>")
    return buffer.getvalue()


SECRET = b"who took it, and where"


def harmless() -> Iterator[tuple[str, bytes]]:
    """Strange, and pictures all the same: (name, content).

    None of what is in them besides may come out again.
    """
    for kind in KINDS:
        for orientation in range(1, 9):
            yield f"{kind} turned {orientation}", turned(kind, orientation)
        yield (
            f"{kind} with EXIF and XMP",
            encoded(a_picture(), kind, exif=_exif(), xmp=b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>"),
        )
        yield f"{kind} with a broken profile", encoded(a_picture(), kind, icc_profile=SECRET * 20)
        yield f"{kind} with broken EXIF", encoded(a_picture(), kind, exif=b"Exif\0\0MM\0*" + SECRET)
        for name, tail in (
            ("zip", a_zip()),
            ("html", b"<html><script>alert(1)</script>"),
            ("js", b"\n/*" + SECRET + b"*/"),
            ("self", png()),
        ):
            yield f"{kind} and {name} behind it", encoded(a_picture(), kind) + tail
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield (
            f"PNG {mode}",
            png(a_picture().convert("L").convert(mode) if mode == "I;16" else a_picture(mode=mode)),
        )
    for colours, pixels in enumerate(_of_16_bits()):
        kinds = (0, 2, 4, 6)
        yield (
            f"PNG 16 bits, colours {kinds[colours]}",
            raw_png(96, 64, lines(pixels), bits=16, colours=kinds[colours]),
        )
    yield "JPEG L", encoded(a_picture(mode="L"), "JPEG")
    yield "JPEG CMYK", encoded(a_picture(mode="CMYK"), "JPEG")
    yield "JPEG progressive", encoded(a_picture(), "JPEG", progressive=True)
    yield (
        "JPEG with pictures behind it",
        encoded(a_picture(), "MPO", save_all=True, append_images=[a_picture(seed=1)]),
    )
    yield "WebP lossless RGBA", encoded(a_picture(mode="RGBA"), "WEBP", lossless=True)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET.decode() * 1000)
    yield "PNG with text", png(pnginfo=text)
    for name, before in _metadata():
        yield f"PNG with {name}", raw_png(8, 8, b"\0" * 72, before=before)
    yield (
        "PNG with text that unpacks to 60 MB, behind the pixels",
        raw_png(8, 8, b"\0" * 72, after=_unpacking(60_000_000)),
    )
    yield "PNG with damaged text", raw_png(8, 8, b"\0" * 72, before=_unpacking(1000)[:-4] + b"crc!")
    for kind in KINDS:
        yield (
            f"{kind} whose EXIF leads nowhere",
            encoded(a_picture(), kind, exif=b"MM\0*\xff\xff\xff\xff"),
        )
        yield (
            f"{kind} whose EXIF says the same 60,000 times",
            encoded(a_picture(), kind, exif=_endless_exif()),
        )
    yield (
        "JPEG with 20 MB of EXIF",
        _with_segments(b"".join(_segment(0xE1, b"Exif\0\0" + b"\0" * 65_000) for _ in range(300))),
    )
    yield (
        "JPEG with 20 MB of profile",
        _with_segments(
            b"".join(
                _segment(0xE2, b"ICC_PROFILE\0" + bytes([n % 255 + 1, 255]) + b"\0" * 65_000)
                for n in range(300)
            )
        ),
    )
    yield "JPEG with a long run of FF", _with_segments(b"\xff" * 2_000_000)
    yield "JPEG of 24 megapixels", encoded(Image.new("L", (6000, 4000)), "JPEG")
    yield (
        "PNG with 4 MB of text",
        raw_png(8, 8, b"\0" * 72, before=chunk(b"tEXt", b"a\0" + SECRET * 190_000)),
    )
    yield "PNG with many parts", raw_png(8, 8, b"\0" * 72, before=chunk(b"prIv") * 15_000)
    yield "PNG with more pixels than it says", raw_png(8, 8, b"\0" * 20_000_000)
    yield "PNG wrongly called JPEG by its name", png()


def hostile() -> Iterator[tuple[str, bytes]]:
    """No pictures, or none that may be decoded: (name, content)."""
    yield "nothing", b""
    yield "one byte", b"\x89"
    for name, text in _documents().items():
        yield name, text
        yield f"{name} behind a PNG's first bytes", BEGINNING + text
        yield f"{name} behind a JPEG's first bytes", b"\xff\xd8\xff\xe0" + text
        yield (
            f"{name} behind a WebP's first bytes",
            b"RIFF" + struct.pack("<I", len(text) + 4) + b"WEBP" + text,
        )
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PDF", "EPS", "PCX", "JPEG2000"):
        yield kind, encoded(a_picture(), kind)
    frames = {"save_all": True, "append_images": [a_picture(seed=1), a_picture(seed=2)]}
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"animated {kind}", encoded(a_picture(), kind, **frames)
    for kind in KINDS:
        content = encoded(a_picture(), kind)
        for place in sorted(
            {
                1,
                8,
                11,
                12,
                16,
                20,
                24,
                30,
                33,
                41,
                *(len(content) * part // 16 for part in range(1, 16)),
                len(content) - 1,
            }
        ):
            yield f"{kind} cut off after {place} bytes", content[:place]
    yield from _bombs()
    yield from _lies()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = SECRET.decode(), SECRET.decode()
    return exif.tobytes()


def _of_16_bits() -> Iterator[np.ndarray]:
    grey = grey_of_16_bits()
    yield grey
    yield np.stack([grey, grey[::-1], grey], axis=-1).reshape(64, -1)
    yield np.stack([grey, grey[::-1]], axis=-1).reshape(64, -1)
    yield np.stack([grey, grey[::-1], grey, grey], axis=-1).reshape(64, -1)


def _unpacking(size_bytes: int, name: bytes = b"zTXt") -> bytes:
    return chunk(name, b"a\0\0" + zlib.compress(b"A" * size_bytes, 9))


def _metadata() -> Iterator[tuple[str, bytes]]:
    """Chunks that are thrown away, whatever they hold: (what, chunks)."""
    workflow = SECRET * 90_000
    yield "2 MB of packed text", chunk(b"zTXt", b"workflow\0\0" + zlib.compress(workflow))
    yield (
        "2 MB of packed international text",
        chunk(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(workflow)),
    )
    yield "text that unpacks to 60 MB", _unpacking(60_000_000)
    yield "a profile that unpacks to 60 MB", _unpacking(60_000_000, b"iCCP")
    yield "90 MB of packed text", _unpacking(1_000_000) * 90


def _segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def _with_segments(segments: bytes) -> bytes:
    """A sound JPEG that begins with these."""
    jpeg = encoded(a_picture(), "JPEG")
    return jpeg[:2] + segments + jpeg[2:]


def _endless_exif() -> bytes:
    """Entries that each mean the same 40 kB."""
    entries = b"".join(
        struct.pack(">HHII", 0x8000 + n % 0x7000, 7, 40_000, 8) for n in range(5_000)
    )
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">IH", 8, 60_000) + entries


def _documents() -> dict[str, bytes]:
    return {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "SVG with an entity": (
            b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM '
            b'"file:///etc/passwd">]><svg>&e;</svg>'
        ),
        "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\n",
        "zip": a_zip(),
        "MVG": (
            b"push graphic-context\nimage over 0,0 0,0 'https://example.com/x'\npop graphic-context"
        ),
        "text": "Ein Bild, 画像".encode(),
        "zeros": b"\0" * 4096,
        "an object of Python": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a.",
    }


def _bombs() -> Iterator[tuple[str, bytes]]:
    for width_px, height_px in (
        (8193, 1),
        (1, 8193),
        (4100, 4100),
        (8192, 8192),
        (20_000, 20_000),
        (65_535, 65_535),
        (2**31 - 1, 2**31 - 1),
    ):
        yield (
            f"PNG {width_px}x{height_px}",
            raw_png(width_px, height_px, b"\0" * min(10_000_000, height_px * (width_px + 1))),
        )
    flat = Image.new("L", (9000, 2000))
    for kind in ("PNG", "WEBP"):
        yield f"{kind} 9000x2000", encoded(flat, kind)
    for width_px, height_px in ((9000, 8000), (17_000, 100)):
        yield f"JPEG {width_px}x{height_px}", encoded(Image.new("L", (width_px, height_px)), "JPEG")
    yield "JPEG with nothing but FF", b"\xff\xd8" + b"\xff" * 4_000_000 + b"\0" * 8
    yield "JPEG with a million comments", b"\xff\xd8" + _segment(0xFE, b"") * 1_000_000
    yield "PNG with a million parts", raw_png(8, 8, b"\0" * 72, before=chunk(b"prIv") * 1_000_000)
    progressive = encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield "JPEG with 5000 scans", progressive[:-2] + scan * 5000 + b"\xff\xd9"


def _lies() -> Iterator[tuple[str, bytes]]:
    yield "PNG 0x0", raw_png(0, 0, b"")
    yield "PNG with fewer pixels than it says", raw_png(500, 500, b"\0" * 100)
    yield "PNG of 3 bits", raw_png(8, 8, b"\0" * 72, bits=3)
    yield "PNG of colours 9", raw_png(8, 8, b"\0" * 72, colours=9)
    yield (
        "PNG without pixels",
        BEGINNING + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)) + chunk(b"IEND"),
    )
    yield (
        "PNG without a header",
        BEGINNING + chunk(b"IDAT", zlib.compress(b"\0" * 72)) + chunk(b"IEND"),
    )
    yield (
        "PNG whose pixels are no zlib",
        raw_png(8, 8, b"").replace(zlib.compress(b"", 9), SECRET[:8]),
    )
    sound = bytearray(png())
    sound[60] ^= 0xFF
    yield "PNG with a wrong checksum", bytes(sound)
    lossless = bytearray(encoded(a_picture(mode="RGBA"), "WEBP", exif=_exif()))
    lossless[24:30] = b"\xfd\x3f\x00\xfd\x3f\x00"
    yield "WebP that says 16382x16382", bytes(lossless)
    short = bytearray(encoded(a_picture(), "WEBP"))
    short[4:8] = struct.pack("<I", len(short) + 100)
    yield "WebP that says it is longer", bytes(short)
    jpeg = encoded(a_picture(), "JPEG")
    start = jpeg.index(b"\xff\xc0")
    yield "JPEG that says 65535x65535", jpeg[: start + 5] + b"\xff\xff\xff\xff" + jpeg[start + 9 :]
    yield "JPEG of 12 bits", jpeg[: start + 4] + b"\x0c" + jpeg[start + 5 :]
    yield "JPEG without tables", jpeg.replace(b"\xff\xdb", b"\xff\xfe")
    yield "JPEG with nothing in it", b"\xff\xd8\xff\xd9"
