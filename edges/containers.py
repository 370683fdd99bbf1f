"""Take the files of PNG, JPEG and WebP apart: what a decoder needs of them, and the metadata.

Only the metadata that is needed (colour profile, orientation) is read, and it is read here: a
decoder never sees it. It is thrown away in any case, so neither its size nor damage to it decides
whether a picture is sound. Every loop is bounded by `MAX_PARTS` and linear in the file.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PARTS = 20_000  # chunks, segments: a file of millions of empty ones keeps its reader busy
MAX_ICC_BYTES = 4_000_000
MAX_TAGS = 512  # of an EXIF directory, searched for the orientation

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# Not stuffing, not a restart; of a run of FF the last one counts.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
# Searched at once: a search that never returns to Python keeps all other threads from running.
_WINDOW_BYTES = 65_536
_EOI = 0xD9
_SOS = 0xDA
_TEM = 0x01
_COM = 0xFE
_APP0 = 0xE0
_APP1 = 0xE1
_APP2 = 0xE2
_APP14 = 0xEE
_APP15 = 0xEF
_ICC_HEAD = b"ICC_PROFILE\0"
_EXIF_HEAD = b"Exif\0\0"
_WEBP_NEEDED = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_WITHOUT = ~0x2C  # the flags of VP8X that promise a profile, EXIF and XMP


class NotAContainer(Exception):
    """The file cannot be taken apart; the message continues "the picture …" and says why."""


@dataclass(frozen=True)
class Container:
    """Hold the parts of a file.

    kind: the format's name in Pillow.  essence: the same picture without metadata.
    orientation: 1 to 8, as EXIF counts; 1 is upright.
    scans: of a JPEG, how often a decoder passes over all of its pixels.
    """

    kind: str
    essence: bytes
    profile: bytes | None = None
    orientation: int = 1
    scans: int = 1


def take_apart(content: bytes) -> Container:
    """Take a PNG, JPEG or WebP file apart.

    Raises NotAContainer for any other format, and for a file that is cut off, animated, or made of
    more than `MAX_PARTS` parts.
    """
    if content.startswith(_PNG):
        return _png(content)
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp(content)
    raise NotAContainer("is empty" if not content else "is not a PNG, JPEG or WebP file")


def _png(content: bytes) -> Container:
    whole = memoryview(content)
    needed = [memoryview(_PNG)]
    profile = None
    orientation = 1
    at = len(_PNG)
    for _ in range(MAX_PARTS):
        if at + 12 > len(content):
            raise NotAContainer("is cut off")
        length, name = struct.unpack_from(">I4s", content, at)
        data, end = whole[at + 8 : at + 8 + length], at + 12 + length
        if end > len(content):
            raise NotAContainer("is cut off")
        if name in _PNG_NEEDED:
            needed.append(whole[at:end])
        elif name == b"acTL" and length >= 4 and struct.unpack_from(">I", data)[0] > 1:
            raise _animated(struct.unpack_from(">I", data)[0])
        elif name == b"iCCP" and profile is None:
            profile = _unpacked_profile(bytes(data))
        elif name == b"eXIf":
            orientation = _orientation(data)
        at = end
        if name == b"IEND":
            return Container("PNG", b"".join(needed), profile, orientation)
    raise _too_many(MAX_PARTS)


def _unpacked_profile(data: bytes) -> bytes | None:
    """Return the colour profile of an iCCP chunk; None if damaged or above MAX_ICC_BYTES."""
    _, _, packed = data.partition(b"\0")
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(packed[1:], MAX_ICC_BYTES + 1)
    except zlib.error:
        return None
    return profile if unpacking.eof and len(profile) <= MAX_ICC_BYTES else None


def _jpeg(content: bytes) -> Container:
    whole = memoryview(content)
    needed = [memoryview(b"\xff\xd8")]
    profile = list[memoryview]()
    orientation = 0
    scans = 0
    data_at = None
    for marker, at, end in _segments(content):
        if marker == _EOI:
            needed.append(whole[at:end] if data_at is None else whole[data_at:end])
            upright = orientation or 1
            return Container("JPEG", b"".join(needed), _joined_profile(profile), upright, scans)
        scans += marker == _SOS
        if data_at is None and marker == _SOS:
            data_at = at  # from here on parts are not taken out any more: pixels lie between them
        if data_at is not None:
            continue
        body = whole[at + 4 : end]
        if marker == _APP1 and not orientation and whole[at + 4 : at + 10] == _EXIF_HEAD:
            orientation = _orientation(body)
        elif marker == _APP2 and whole[at + 4 : at + 16] == _ICC_HEAD:
            profile.append(whole[at + 16 : end])
        elif marker in (_APP0, _APP14) or not (marker == _COM or _APP0 <= marker <= _APP15):
            needed.append(whole[at:end])
    raise NotAContainer("is cut off")


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, its start, its segment's end) of each segment, those between pixels too."""
    at = 2
    for _ in range(MAX_PARTS):
        if (found := _next_marker(content, at)) is None:
            return
        marker, begin, at = found[1][0], found.start(), found.end()
        if marker not in (_EOI, _TEM):
            if at + 2 > len(content):
                return
            length = struct.unpack_from(">H", content, at)[0]
            if length < 2:
                raise NotAContainer("is damaged or cut off")
            at += length
        yield marker, begin, min(at, len(content))
        if marker == _EOI:
            return
    raise _too_many(MAX_PARTS)


def _next_marker(content: bytes, at: int) -> re.Match[bytes] | None:
    while at < len(content):
        if (found := _MARKER.search(content, at, at + _WINDOW_BYTES + 1)) is not None:
            return found
        at += _WINDOW_BYTES
    return None


def _joined_profile(parts: list[memoryview]) -> bytes | None:
    """Join the segments of a profile; each begins with its number and the number of segments."""
    if not parts or sum(map(len, parts)) > MAX_ICC_BYTES or any(len(part) < 2 for part in parts):
        return None
    return b"".join(part[2:] for part in sorted(parts, key=lambda part: part[0]))


def _webp(content: bytes) -> Container:
    stop = struct.unpack_from("<I", content, 4)[0] + 8
    if len(content) < 20 or stop > len(content):
        raise NotAContainer("is cut off")
    whole = memoryview(content)
    needed = list[memoryview | bytes]()
    profile = None
    orientation = 1
    frames = 0
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > stop:
            body = b"".join(needed)
            essence = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
            return Container("WEBP", essence, profile, orientation)
        name, length = struct.unpack_from("<4sI", content, at)
        data, end = whole[at + 8 : at + 8 + length], at + 8 + length + length % 2
        if at + 8 + length > stop:
            raise NotAContainer("is damaged or cut off")
        frames += name == b"ANMF"
        if frames > 1:
            raise _animated(frames)
        if name == b"VP8X" and length:
            flags = bytes([data[0] & _WEBP_WITHOUT & 0xFF])
            needed += [whole[at : at + 8], flags, whole[at + 9 : end]]
        elif name in _WEBP_NEEDED:
            needed.append(whole[at:end])
        elif name == b"ICCP" and profile is None and length <= MAX_ICC_BYTES:
            profile = bytes(data)
        elif name == b"EXIF":
            orientation = _orientation(data)
        at = end
    raise _too_many(MAX_PARTS)


def _orientation(exif: memoryview) -> int:
    """Read the orientation from the first directory of an EXIF; 1 if it has none."""
    head = len(_EXIF_HEAD) if exif[: len(_EXIF_HEAD)] == _EXIF_HEAD else 0
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(exif[head : head + 4]))
    if order is None:
        return 1
    try:
        at = head + struct.unpack_from(order + "I", exif, head + 4)[0]
        for place in range(min(struct.unpack_from(order + "H", exif, at)[0], MAX_TAGS)):
            tag, kind, count, value = struct.unpack_from(order + "HHI4s", exif, at + 2 + 12 * place)
            if tag == _ORIENTATION and count == 1 and kind in (3, 4):
                said = struct.unpack(
                    order + ("H" if kind == 3 else "I"), value[: 2 if kind == 3 else 4]
                )[0]
                return said if 1 <= said <= 8 else 1
    except struct.error:  # it leads out of what there is
        pass
    return 1


def _animated(frames: int) -> NotAContainer:
    return NotAContainer(f"is animated: it has {frames} frames")


def _too_many(parts: int) -> NotAContainer:
    return NotAContainer(f"consists of more parts than any picture needs ({parts} or more)")
