"""Read the W3C Trace Context that a request came with (https://www.w3.org/TR/trace-context/)."""

import re

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LENGTH = 55


def read(header: str) -> str | None:
    """Return the header's first 55 characters if it is a `traceparent`, else None.

    A later version may add parts behind them. One that is not valid is as good as none.
    """
    found = _TRACEPARENT.fullmatch(header)
    if found is None or not int(found[2], 16) or not int(found[3], 16):
        return None
    if found[1] == "00" and found[5]:
        return None
    return header[:LENGTH]


def trace_id(traceparent: str) -> str:
    """Return the id that all parts of the trace share, 32 hexadecimal digits."""
    return traceparent.split("-")[1]
