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


class _Reading:
    """A read that is under way; `is_over` is set when it has ended or nobody is to wait for it."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.is_outdated = False


class Cache(Generic[Key, Value]):
    """What was read in the last moment, by key; any thread may ask.

    An age counts from when its read began: the answer may lack what changed since. So cachetools
    gives the bound here, where the key asked for longest ago goes first, and not the ages: its
    TTLCache counts from when the answer was there.
    """

    def __init__(
        self,
        name: str,
        most: int,
        *,
        keep_for_s: float = math.inf,
        stale_for_s: float = 0.0,
        refresh_after_s: float = math.inf,
        refresher: Executor | None = None,
    ) -> None:
        """name: for the log.  most: entries.  refresher: reads what is asked for from `refresh_after_s` on.

        stale_for_s: how much older than `keep_for_s` an answer may be while somebody reads.
        """
        self._name = name
        self._keep_for_s = keep_for_s
        self._stale_for_s = stale_for_s
        self._refresh_after_s = refresh_after_s
        self._refresher = refresher
        self._entries: LRUCache[Key, _Entry[Value]] = LRUCache(most)
        self._reads: dict[Key, list[_Reading]] = {}  # those under way; others wait for the last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key, read: Callable[[], Value]) -> Value:
        """Give what was read at most `keep_for_s` before this question, or else `read()`.

        One thread reads. The others take what is there, if it is not older than `stale_for_s`
        beyond, or wait for its answer; whoever has waited for `PATIENCE_S` reads too. What grows
        old is read by the refresher while all take what is there. What `read` raises is its
        caller's: it is not remembered, and one of those who wait tries next.
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
            refresh = self._refresher.submit(self._refresh, key, read)
            refresh.add_done_callback(self._log_failure)
        return entry.value

    def forget(self, key: Key) -> None:
        """Make whoever asks from now on see what has just changed.

        What was being read meanwhile is not remembered, and nobody waits for it any more.
        """
        with self._lock:
            self._entries.pop(key, None)
            for reading in self._reads.pop(key, ()):
                reading.is_outdated = True
                reading.is_over.set()

    def _wait_or_read(self, key: Key, read: Callable[[], Value], asked_at: float) -> Value:
        while True:
            with self._lock:
                entry = self._entries.get(key)
                age_s = asked_at - entry.read_at if entry is not None else math.inf
                running = self._reads.get(key)
                if entry is not None and age_s < self._keep_for_s + (
                    self._stale_for_s if running else 0.0
                ):
                    return entry.value
                left_s = asked_at + PATIENCE_S - time.monotonic()
                if not running or left_s <= 0:
                    own = self._begin(key)
                    break
                last = running[-1]
            last.is_over.wait(left_s)
        return self._read(key, read, own)

    def _refresh(self, key: Key, read: Callable[[], Value]) -> None:
        """Read again, unless somebody did who could not wait for that, or does."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or time.monotonic() - entry.read_at < self._refresh_after_s:
                return
            if self._reads.get(key):
                return
            own = self._begin(key)
        self._read(key, read, own)

    def _begin(self, key: Key) -> _Reading:
        """Have others wait for this read from now on; those who wait for an earlier one still do."""
        own = _Reading()
        self._reads.setdefault(key, []).append(own)
        return own

    def _read(self, key: Key, read: Callable[[], Value], own: _Reading) -> Value:
        """Read, and remember it unless the key was forgotten meanwhile or a younger answer is there."""
        began_at = time.monotonic()
        try:
            value = read()
            with self._lock:
                there = self._entries.get(key)
                if not own.is_outdated and (there is None or there.read_at <= began_at):
                    self._entries[key] = _Entry(value, began_at, began_at + self._refresh_after_s)
            return value
        finally:
            with self._lock:
                own.is_over.set()
                running = self._reads.get(key, [])
                if own in running:
                    running.remove(own)
                    if not running:
                        del self._reads[key]

    def _log_failure(self, refresh: Future[None]) -> None:
        """Log that a refresh failed; whoever asks for what is too old reads, and hears of it."""
        error = None if refresh.cancelled() else refresh.exception()
        if error is not None:
            log.info("refresh_failed", cache=self._name, reason=type(error).__name__)
