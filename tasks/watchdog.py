"""End this process when its device hangs, whatever it hangs in.

A call into a device that hangs does not return. It cannot be interrupted, and whoever asks the
engine to stop waits for it. So the process ends at once, by another thread: in a step, an encode, a
decode, a preview or a snapshot, in a load, a warm-up or an unload, before the engine is ready and
while it stops. Jobs that it holds are given back first, for the device is at fault.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from engine.engine import Engine
from engine.errors import DeviceLost, EngineStopped
from settings import EX_DEVICE_LOST

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
GIVE_BACK_WITHIN_S = 5.0  # then leases that are held expire
EX_SOFTWARE = 70


@dataclass(frozen=True)
class _Hang:
    """What hangs. status: with which the process ends.  error: that jobs which it holds get."""

    what: str
    status: int
    error: EngineStopped


def _nothing(error: EngineStopped) -> None:
    """Give nothing back: no job is held."""


class Watchdog:
    """Watch one process and its engine, from before that starts until the process ends."""

    def __init__(self, *, stuck_after_s: float, warm_up_stuck_after_s: float = 0.0) -> None:
        """Watch nothing yet.

        stuck_after_s: of a turn or a load.  warm_up_stuck_after_s: of a turn that compiles, if that
        is more.
        """
        self._stuck_after_s = stuck_after_s
        self._compiling_s = max(stuck_after_s, warm_up_stuck_after_s)
        self._engine: Engine | None = None
        self._ends_at: float | None = None  # on the monotonic clock
        self._lock = threading.Lock()
        # Gives back the jobs that are held, with the error that says why.
        self.give_back: Callable[[EngineStopped], None] = _nothing

    def start(self) -> None:
        """Begin to watch; nothing ends it but the end of the process."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def watch(self, engine: Engine) -> None:
        """Watch this engine, too. It need not have been started."""
        self._engine = engine

    def end_within(self, within_s: float) -> None:
        """End the process if it still runs after so many seconds; an earlier end stays."""
        ends_at = time.monotonic() + within_s
        with self._lock:
            self._ends_at = min(ends_at, self._ends_at or ends_at)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """End the process if this block, which asks the device, takes longer than a turn may."""
        before = self._ends_at
        self.end_within(self._stuck_after_s)
        yield
        self._ends_at = before

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            hang = self._hang()
            if hang is not None:
                self._end(hang)
                return

    def _hang(self) -> _Hang | None:
        """Say what hangs; None if nothing does."""
        limit_s = self._stuck_after_s
        turn_s = self._engine.turn_s if self._engine is not None else 0.0
        is_compiling = self._engine is not None and self._engine.is_compiling
        if turn_s > (self._compiling_s if is_compiling else limit_s):
            error = DeviceLost(f"the device hangs: a turn of the engine takes {turn_s:.0f} s")
            return _Hang("turn", EX_DEVICE_LOST, error)
        silent_s = self._engine.load_silent_s if self._engine is not None else 0.0
        if silent_s > limit_s:  # the disk may hang as well
            error = DeviceLost(f"a load has not moved for {silent_s:.0f} s")
            return _Hang("load", EX_SOFTWARE, error)
        if self._ends_at is not None and time.monotonic() > self._ends_at:
            is_lost = self._engine is not None and self._engine.is_device_lost
            status = EX_DEVICE_LOST if is_lost else EX_SOFTWARE
            return _Hang("end", status, EngineStopped("its worker did not end in time"))
        return None

    def _end(self, hang: _Hang) -> None:
        log.critical("engine_stuck", hangs_in=hang.what, reason=str(hang.error))
        giving = threading.Thread(target=self.give_back, args=(hang.error,), daemon=True)
        giving.start()
        giving.join(GIVE_BACK_WITHIN_S)
        os._exit(hang.status)
