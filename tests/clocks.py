"""Clocks that stand still until a test moves them."""

import threading
import time
from collections import Counter


class KeptClock:
    """A monotonic clock, to be put in the place of a module's `time`."""

    def __init__(self) -> None:
        self._now = time.monotonic()
        self._looks: Counter[int | None] = Counter()
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        with self._lock:
            self._looks[threading.get_ident()] += 1
            return self._now

    def sleep(self, seconds: float) -> None:
        """Sleep in earnest."""
        time.sleep(seconds)

    def go_on(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds
            self._looks.clear()

    def looks_of(self, thread: threading.Thread) -> int:
        """How often this thread has looked at the clock since it went on."""
        return self._looks[thread.ident]
