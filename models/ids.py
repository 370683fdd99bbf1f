"""Make UUIDv7: ids that sort by the time they were made (RFC 9562, section 5.7)."""

import math
import os
import time
import uuid
from datetime import UTC, datetime, timedelta

_EPOCH = datetime.fromtimestamp(0, UTC)
_LAST_MS = 2**48 - 1


def new_id() -> uuid.UUID:
    """Make an id: 48 bits of Unix milliseconds, then 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


def first_id(at: datetime) -> uuid.UUID:
    """Return the lowest id that can be made in the millisecond of `at`.

    No id made then or later is below it; every one made before is.
    """
    unix_ms = math.floor((at - _EPOCH) / timedelta(milliseconds=1))
    return uuid.UUID(int=min(_LAST_MS, max(0, unix_ms)) << 80)
