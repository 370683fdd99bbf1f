"""Divide the time of the device thread among what it does, for whoever pays for the device."""

import threading
import time
from collections.abc import Mapping

IDLE = "idle"  # no image is here
TURNS = "turns"  # images are: device time, and what the host needs between
LOADS = "loads"  # pieces of warm-ups beside images, and unloads


class WallTime:
    """Add up the seconds of each thing that one thread does. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = {IDLE: 0.0, TURNS: 0.0, LOADS: 0.0}
        self._doing: str | None = None  # None: nothing yet, or nothing any more
        self._since = 0.0  # on the monotonic clock

    def begin(self, doing: str | None) -> None:
        """Note what the thread does from now on; None: it has ended."""
        with self._lock:
            self._settle()
            self._doing = doing

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds of each thing until now, what is under way included."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = time.monotonic()
        if self._doing is not None:
            self._seconds[self._doing] += now - self._since
        self._since = now
