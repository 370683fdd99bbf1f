"""Bodies that no gateway should stand still for.

Every format, every prefix, repeated markers, cut off, bombs, 30 MB of one byte.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

from PIL import Image

LARGE_BYTES = 30_000_000
FILES = "/v1/files"
EDITS = "/v1/images/edits"
JOBS = "/v1/jobs"
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_PREFIXES = (_PNG, _JPEG, b"RIFF\xff\xff\xff\x01WEBP", b"RIFF\x08\0\0\0WEBP", b"\xff\xd8", b"")
_MARKERS = bytes.fromhex("00 01 c0 c2 c4 d0 d7 d8 d9 da db e0 e1 e2 ee fe")
_PIECES = [bytes([0xFF, marker]) for marker in _MARKERS]
_PIECES += [
    b"\xff",
    b"\0",
    b"\xff\xff\0",
    b"\xff\xfe\0\2",
    b"\xff\xda\0\2",
    b"\xff\xe1\0\x08Exif\0\0",
    b"\0\0\0\0IDAT\0\0\0\0",
]
_PIECES += [b"\0\0\0\0tEXt\0\0\0\0", b"VP8 \0\0\0\0", b"EXIF\0\0\0\0", b"ANMF\0\0\0\0"]
_PIECES += [b"\r\n", b"--x", b"\r\n--x", b"\r", b"\n", b"%", b"=", b" "]
_ENDS = (b"", b"\0" * 8, b"\xff\xd9", b"\0\0\0\0IEND\xaeB`\x82")
_FORM_HEAD = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
_FORM_TYPE = "multipart/form-data; boundary=x"
_KINDS = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}}


@dataclass(frozen=True)
class Upload:
    """One body, and where it goes."""

    name: str
    path: str
    content: bytes
    content_type: str


def uploads(count: int, *, seed: int = 0, large: int) -> Iterator[Upload]:
    """Make so many, always the same ones.

    `large` of them beside the others have some 30 MB, or that many pixels.
    """
    draw = random.Random(seed)
    makers: list[Callable[[random.Random], Upload]] = [
        _sound,
        _altered,
        _cut_off,
        _run,
        _run,
        _metadata,
        _form,
        _data_url,
    ]
    for place in range(count):
        yield makers[place % len(makers)](draw)
    giants = [*_giants()]
    for place in range(large):
        yield giants[place]() if place < len(giants) else _run(draw, LARGE_BYTES)


@cache
def _picture(kind: str, mode: str, side_px: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side_px, side_px)).convert(mode).save(
        buffer, kind, **_KINDS[kind]
    )
    return buffer.getvalue()


def _some_picture(draw: random.Random) -> tuple[str, bytes]:
    kind = draw.choice(list(_KINDS))
    mode = draw.choice(
        {
            "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
            "JPEG": ["L", "RGB", "CMYK"],
            "WEBP": ["RGB", "RGBA"],
        }[kind]
    )
    return f"{kind} {mode}", _picture(kind, mode, draw.choice([16, 128, 300]))


def _as_file(name: str, content: bytes) -> Upload:
    return Upload(name, FILES, content, "image/png")


def _sound(draw: random.Random) -> Upload:
    return _as_file(*_some_picture(draw))


def _altered(draw: random.Random) -> Upload:
    name, picture = _some_picture(draw)
    content = bytearray(picture)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.choice([0, 255, draw.randrange(256)])
    return _as_file(f"{name}, altered", bytes(content))


def _cut_off(draw: random.Random) -> Upload:
    name, picture = _some_picture(draw)
    return _as_file(f"{name}, cut off", picture[: draw.randrange(len(picture))])


def _run(draw: random.Random, size_bytes: int = 0) -> Upload:
    size_bytes = size_bytes or draw.choice([1_000, 40_000, 200_000, 400_000])
    prefix = draw.choice(_PREFIXES)
    piece = draw.choice(_PIECES)
    end = draw.choice(_ENDS)
    content = prefix + piece * (size_bytes // len(piece)) + end
    return _as_file(f"{prefix[:6]!r} and {size_bytes} bytes of {piece!r}, {end[:4]!r}", content)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _endless_exif(size_bytes: int) -> bytes:
    """Make a directory whose every entry is all of it."""
    entries = b"".join(struct.pack(">HHII", tag, 7, size_bytes, 8) for tag in range(1, 2_000))
    return b"MM\0*" + struct.pack(">IH", 8, 1_999) + entries.ljust(size_bytes, b"\0")


def _in_png(chunks: bytes) -> bytes:
    """Put chunks behind the header of a PNG."""
    png = _picture("PNG", "RGB", 128)
    return png[:33] + chunks + png[33:]


def _metadata(draw: random.Random) -> Upload:
    jpeg = _picture("JPEG", "RGB", 128)
    exif = b"Exif\0\0" + _endless_exif(50_000)[:60_000]
    exif_segment = b"\xff\xe1" + struct.pack(">H", 60_008) + exif
    last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"A" * 5_000_000, 9))
    profile = _chunk(b"iCCP", b"a\0\0" + zlib.compress(b"A" * 9_000_000, 9))
    empty_chunks = _chunk(b"prIv", b"") * draw.choice([1_000, 19_000, 30_000])
    empty_segments = b"\xff\xfe\0\2" * draw.choice([1_000, 19_000, 90_000])
    name, content = draw.choice(
        [
            ("text", _in_png(text * 20)),
            ("profile", _in_png(profile)),
            ("EXIF in PNG", _in_png(_chunk(b"eXIf", _endless_exif(400_000)))),
            ("chunks", _in_png(empty_chunks)),
            ("EXIF in JPEG", jpeg[:2] + exif_segment + jpeg[2:]),
            ("segments", jpeg[:2] + empty_segments + jpeg[2:]),
            ("scans", jpeg[:-2] + last_scan * 400 + b"\xff\xd9"),
        ]
    )
    return _as_file(f"metadata: {name}", content)


def _form(draw: random.Random) -> Upload:
    piece = draw.choice([b"\r\n", b"\r", b"\n", b"--x", b"\r\n--", b"\r\n--x", b"-", b"a" * 100])
    body = piece * (draw.choice([1_000, 300_000]) // len(piece))
    content = draw.choice(
        [
            _FORM_HEAD + body + b"\r\n--x--\r\n",
            _FORM_HEAD + body,
            b"--x\r\nContent-Disposition: form-data; name=" + body,
            (b"--x\r\n" + body[:2_000] + b"\r\n\r\n\r\n") * 30,
            body + b"\r\n--x--",
        ]
    )
    return Upload(f"a form of {piece[:6]!r}", EDITS, content, _FORM_TYPE)


def _data_url(draw: random.Random) -> Upload:
    piece = draw.choice(["%", "%41", "A", "=", " ", "A ", "%0A"])
    repeated = piece * (draw.choice([1_000, 1_000_000]) // len(piece))
    picture = base64.b64encode(_some_picture(draw)[1]).decode()
    body = draw.choice([repeated, picture])
    heads = ["data:image/png;base64,", "data:,", "data:;base64,"]
    url = draw.choice([*heads, "data:" + ";" * 900 + ";base64,"]) + body
    return _as_job("a data URL", url)


def _as_job(name: str, url: str) -> Upload:
    job = {"prompt": "x", "tier": "batch", "init_image": url}
    return Upload(name, JOBS, json.dumps(job).encode(), "application/json")


def _giants() -> Iterator[Callable[[], Upload]]:
    """Give the largest that are accepted, and runs of 30 MB; each made when its turn comes."""
    for piece in (b"\xff", b"\xff\x01", b"\xff\xfe\0\2", b"\xff\0"):
        yield partial(_large_jpeg, piece)
    for kind, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGBA")):
        yield partial(_large_flat, f"{kind} of 16.8 megapixels", kind, mode, 4096, 4096)
    yield lambda: _as_file("JPEG of 16.8 megapixels of noise", _noise(4096, 4096))
    yield partial(_large_flat, "JPEG of 48 megapixels", "JPEG", "RGB", 8064, 6048)
    progressive = "progressive JPEG of 48 megapixels"
    yield partial(_large_flat, progressive, "JPEG", "RGB", 8064, 6048, progressive=True)
    exif = partial(_endless_exif, 28_000_000)
    yield lambda: _as_file("PNG with 28 MB of EXIF", _in_png(_chunk(b"eXIf", exif())))
    for piece in (b"\r\n", b"\r", b"\n", b"\r\n--x"):
        yield partial(_large_form, piece)
    for text in ("%", "%41", "A", " "):
        url = "data:image/png;base64," + text * (4_000_000 // len(text))
        yield partial(_as_job, f"a data URL of 4 MB of {text!r}", url)


def _large_jpeg(piece: bytes) -> Upload:
    content = _JPEG + piece * (LARGE_BYTES // len(piece)) + b"\0" * 8
    return _as_file(f"30 MB of {piece!r}", content)


def _large_form(piece: bytes) -> Upload:
    body = _FORM_HEAD + piece * (LARGE_BYTES // len(piece)) + b"\r\n--x--\r\n"
    return Upload(f"a form of 30 MB of {piece!r}", EDITS, body, _FORM_TYPE)


def _large_flat(
    name: str, kind: str, mode: str, width_px: int, height_px: int, **options: bool
) -> Upload:
    buffer = io.BytesIO()
    Image.new(mode, (width_px, height_px), 77).save(buffer, kind, **options)
    return _as_file(name, buffer.getvalue())


def _noise(width_px: int, height_px: int) -> bytes:
    buffer = io.BytesIO()
    band = Image.effect_noise((width_px, height_px), 90)
    Image.merge("RGB", [band] * 3).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
