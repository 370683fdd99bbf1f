"""Have the workers of one host load one after the other.

A load needs the host's memory for a while, beside what the worker keeps: weights are read, turned
into another precision or quantised there before they are on the device. Workers that start together
would need that at once, and the kernel would kill some.

A lock on a file is the turn. A worker that dies gives it up, and nobody waits for longer than
WAITS_AT_MOST_S: a load that does not move ends its worker before (tasks/watchdog.py).
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from edges.filelocks import FileLock, try_lock

log = structlog.get_logger(__name__)

ASK_EVERY_S = 0.2
WAITS_AT_MOST_S = 900.0


def default_file() -> Path:
    """Return the file of this user's workers that share a temporary folder, as in a container."""
    return Path(tempfile.gettempdir()) / f"darkroom-load-{os.getuid()}.lock"


class LoadTurns:
    """The turns of the workers that share a file, as one of them takes them."""

    def __init__(
        self,
        file: Path,
        *,
        tell: Callable[[str], object] = str,
        waits_at_most_s: float = WAITS_AT_MOST_S,
    ) -> None:
        """tell: takes a sentence on what is waited for, and "" when that is over."""
        self._file = file
        self._tell = tell
        self._waits_at_most_s = waits_at_most_s

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn, and have it within this block."""
        lock = self._wait()
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _wait(self) -> FileLock | None:
        """Return the lock; None where it cannot be had, for a load is better than none."""
        began_at = time.monotonic()
        has_told = False
        try:
            while (lock := try_lock(self._file)) is None:
                if not has_told:
                    self._tell("waits for another worker of this host to load")
                    has_told = True
                if time.monotonic() - began_at > self._waits_at_most_s:
                    log.warning("load_turn_not_waited_for", file=str(self._file))
                    return None
                time.sleep(ASK_EVERY_S)
        except OSError as error:
            log.warning("load_turn_not_asked_for", file=str(self._file), reason=error.strerror)
            return None
        finally:
            if has_told:
                self._tell("")
        return lock
