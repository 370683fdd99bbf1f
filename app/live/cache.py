"""Remember what was read a moment ago, so that many who ask at once are one read.

Every cache of a gateway process is one of these: bounded, with ages by the monotonic clock. It
does not know what is read, nor from where.
"""

import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog
from cachetools import LRUCache

log = structlog.get_logger(__name__)

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

PATIENCE_S = 5.0  # with whoever reads for all: another read under load makes it later still


@dataclass(slots=True)
class _Entry(Generic[Value]):
    """What was read, when that began, and from when on it is to be read again."""

    value: Value
    read_at: float
    refresh_at: float


class Cache(Generic[Key, Value]):
    """What was read in the last moment, by key; any thread may ask.

    An age counts from when its read began: the answer may lack what changed since. So cachetools
    gives the bound here, where the key asked for longest ago goes first, and not the ages: its
    TTLCache counts from when the answer was there.
    """

    def __init__(
        self,
        most: int,
        *,
        keep_for_s: float = math.inf,
        refresh_after_s: float = math.inf,
        refresher: Executor | None = None,
    ) -> None:
        """most: entries.  refresher: reads what is asked for from `refresh_after_s` on."""
        self._keep_for_s = keep_for_s
        self._refresh_after_s = refresh_after_s
        self._refresher = refresher
        self._entries: LRUCache[Key, _Entry[Value]] = LRUCache(most)
        # The read that is under way for a key, if any; set when it is over, or nobody is to wait.
        self._reads: dict[Key, threading.Event] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key, read: Callable[[], Value]) -> Value:
        """Give what was read at most `keep_for_s` before this question, or else `read()`.

        One thread reads and the others wait for its answer; whoever has waited for `PATIENCE_S`
        reads too. What grows old is read by the refresher while all take what is there, so that
        under load no request waits. What `read` raises is its caller's: it is not remembered, and
        one of those who wait tries next.
        """
        asked_at = time.monotonic()
        is_due = False
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and asked_at >= entry.refresh_at:
                is_due = True
                entry.refresh_at = asked_at + self._refresh_after_s  # once more if that fails
        if entry is None or asked_at - entry.read_at >= self._keep_for_s:
            return self._wait_or_read(key, read, asked_at)
        if is_due and self._refresher is not None:
            self._refresher.submit(self._refresh, key, read).add_done_callback(_log_failure)
        return entry.value

    def forget(self, key: Key) -> None:
        """Make whoever asks from now on see what has just changed.

        What was being read meanwhile is not remembered, and nobody waits for it any more.
        """
        with self._lock:
            self._entries.pop(key, None)
            self._replace_read(key, None)

    def _wait_or_read(self, key: Key, read: Callable[[], Value], asked_at: float) -> Value:
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and asked_at - entry.read_at < self._keep_for_s:
                    return entry.value
                running = self._reads.get(key)
                left_s = asked_at + PATIENCE_S - time.monotonic()
                if running is None or left_s <= 0:
                    own = threading.Event()
                    self._replace_read(key, own)
                    break
            running.wait(left_s)
        return self._read(key, read, own)

    def _refresh(self, key: Key, read: Callable[[], Value]) -> None:
        """Read again, unless somebody did who could not wait for that, or does."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or time.monotonic() - entry.read_at < self._refresh_after_s:
                return
            if key in self._reads:
                return
            own = threading.Event()
            self._replace_read(key, own)
        self._read(key, read, own)

    def _replace_read(self, key: Key, own: threading.Event | None) -> None:
        """Have others wait for this read, and no more for one that is late or outdated."""
        running = self._reads.pop(key, None)
        if running is not None:
            running.set()
        if own is not None:
            self._reads[key] = own

    def _read(self, key: Key, read: Callable[[], Value], own: threading.Event) -> Value:
        """Read, and remember it unless another read has taken the place of this one."""
        began_at = time.monotonic()
        try:
            value = read()
            with self._lock:
                if self._reads.get(key) is own:
                    refresh_at = began_at + self._refresh_after_s
                    self._entries[key] = _Entry(value, began_at, refresh_at)
            return value
        finally:
            with self._lock:
                if self._reads.get(key) is own:
                    self._replace_read(key, None)


def _log_failure(refresh: Future[None]) -> None:
    """Log that a refresh failed; whoever asks for what is too old reads, and hears of it."""
    error = None if refresh.cancelled() else refresh.exception()
    if error is not None:
        log.info("refresh_failed", reason=type(error).__name__)
