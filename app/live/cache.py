"""Cache what was read a moment ago, so that many simultaneous callers cause one read.

Every cache of a gateway process is a `Cache`: bounded, with ages by the monotonic clock. This
module knows neither what is read nor from where.
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

PATIENCE_S = 5.0  # with the thread that reads; more reads under load would only make it later


@dataclass(slots=True)
class _Entry(Generic[Value]):
    """A value, when its read began, and when to refresh it."""

    value: Value
    read_at: float
    refresh_at: float


class _Reading:
    """A read in progress; `is_over` is set when it has ended or when nobody should wait for it."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.is_outdated = False


class Cache(Generic[Key, Value]):
    """Recently read values by key, for any thread.

    The age of a value counts from the start of its read, because it may lack what changed during
    the read. So only the bound comes from cachetools (least recently used goes first): its TTLCache
    would count from the end of the read.
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
        """Make an empty cache.

        name: for the log. most: the number of entries. refresher: rereads entries older than
        `refresh_after_s`.

        stale_for_s: how much older than `keep_for_s` a value may be while a read is in progress.
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
        """Return the value that was read at most `keep_for_s` ago, or else `read()`.

        One thread reads. The others take a value that is up to `stale_for_s` older, or wait for the
        read; after `PATIENCE_S` a waiting thread reads itself. The refresher rereads an ageing
        value while callers still get it. An error of `read` goes to its caller and is not cached;
        one of the waiting threads tries next.
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
        """Drop the key, so that the next `get` sees a change that was just made.

        A read that is in progress is not cached, and nobody waits for it any more.
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
                allowed_s = self._keep_for_s + (self._stale_for_s if running else 0.0)
                if entry is not None and age_s < allowed_s:
                    return entry.value
                left_s = asked_at + PATIENCE_S - time.monotonic()
                if not running or left_s <= 0:
                    own = self._begin(key)
                    break
                last = running[-1]
            last.is_over.wait(left_s)
        return self._read(key, read, own)

    def _refresh(self, key: Key, read: Callable[[], Value]) -> None:
        """Read again, unless another thread just did or is doing so."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or time.monotonic() - entry.read_at < self._refresh_after_s:
                return
            if self._reads.get(key):
                return
            own = self._begin(key)
        self._read(key, read, own)

    def _begin(self, key: Key) -> _Reading:
        """Register a read that later callers wait for; earlier waiters keep waiting for theirs."""
        own = _Reading()
        self._reads.setdefault(key, []).append(own)
        return own

    def _read(self, key: Key, read: Callable[[], Value], own: _Reading) -> Value:
        """Read and cache the value, unless the key was forgotten or a newer value is there."""
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
        """Log a failed refresh; once the value is too old, a caller's own read raises the error."""
        error = None if refresh.cancelled() else refresh.exception()
        if error is not None:
            log.info("refresh_failed", cache=self._name, reason=type(error).__name__)
