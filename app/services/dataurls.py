"""Decode data URLs as browsers do, so that what works there works here.

This follows the Fetch standard's data URL processor and its forgiving base64: the type may be
missing; white space in and around the base64, its padding and percent-encoding do not matter.
"""

import base64
import binascii
import re

SCHEME = "data:"
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_HEX = "0123456789ABCDEFabcdef"
_MEANT = {(high + low).encode(): bytes([int(high + low, 16)]) for high in _HEX for low in _HEX}
_WHITE = b" \t\n\f\r"
_IS_BASE64 = re.compile(r";[ ]*base64[ ]*\Z", re.IGNORECASE)
_MAX_TYPE_CHARS = 1024


class Unreadable(Exception):
    """A data URL cannot be decoded; the message continues "… is a data URL" and says why."""


def is_one(text: str) -> bool:
    """Tell whether the text begins like a data URL."""
    return text[:64].lstrip()[: len(SCHEME)].lower() == SCHEME


def decoded(text: str) -> bytes:
    """Decode the data URL of a picture to bytes. Raises Unreadable."""
    said = text.strip("".join(map(chr, range(0x21))))[len(SCHEME) :]
    kind, comma, body = said.partition(",")
    if not comma or len(kind) > _MAX_TYPE_CHARS:
        raise Unreadable("without a comma between its type and its data")
    marked = _IS_BASE64.search(kind)
    _check_kind(kind[: marked.start()] if marked else kind)
    data = body.partition("#")[0].encode("utf-8", "surrogatepass")
    if b"%" in data:
        data = _ESCAPED.sub(lambda escape: _MEANT[escape[1]], data)
    return _from_base64(data) if marked else data


def _check_kind(said: str) -> None:
    kind = said.partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise Unreadable(f"of {kind[:64]!r}, not of a picture")


def _from_base64(data: bytes) -> bytes:
    plain = data.translate(None, _WHITE)
    if len(plain) % 4 == 0:
        plain = plain[:-2] + plain[-2:].rstrip(b"=")
    if b"=" in plain:  # padding before the end
        raise Unreadable("whose base64 is damaged")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        raise Unreadable("whose base64 is damaged") from None
