"""Decide whether this worker is healthy. A sick one must leave before it fails the whole backlog.

A turn of the engine that does not end means a device that hangs: its leases must not be renewed,
and a warm shutdown would not end it. So does a load beside the turns that does not move. Unplanned
errors of different jobs in a row, with no image between them, are the worker's fault and not the
jobs'.
"""

import os
import threading
from collections.abc import Callable

import structlog

from edges import telemetry
from edges.notices import Notice
from engine.engine import Engine

log = structlog.get_logger(__name__)

STRIKES = 3
LOOK_EVERY_S = 1.0
LEAVE_WITHIN_S = 5.0
EX_SOFTWARE = 70


class Health:
    """Watch one worker's health; call `leave` when it has to go."""

    def __init__(
        self, engine: Engine, *, stuck_after_s: float, leave: Callable[[Notice], None]
    ) -> None:
        self._engine = engine
        self._stuck_after_s = stuck_after_s
        self._leave = leave
        # Jobs that ended in an unplanned error since the last image.
        self._strikes: set[str] = set()
        self.gave_up = ""  # why; then the process ends because of an error
        self._lock = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def note_image(self) -> None:
        """Note that the device made an image, which clears the strikes."""
        with self._lock:
            self._strikes.clear()

    def is_at_fault(self, job_id: str) -> bool:
        """Note an unplanned error of the job; True if it must be this worker's fault.

        Then the worker leaves.
        """
        with self._lock:
            self._strikes.add(job_id)
            is_sick = len(self._strikes) >= STRIKES
        if is_sick:
            self.give_up(f"{STRIKES} jobs in a row failed unplanned")
        return is_sick

    def give_up(self, reason: str) -> None:
        """Have the worker leave; its supervisor starts another."""
        telemetry.UNFIT.inc()
        self.gave_up = reason
        self._leave(Notice("health", LEAVE_WITHIN_S, reason))

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            turn_s = self._engine.turn_s
            load_silent_s = self._engine.load_silent_s
            if max(turn_s, load_silent_s) > self._stuck_after_s:
                log.critical(
                    "engine_stuck",
                    turn_s=round(turn_s, 1),
                    load_silent_s=round(load_silent_s, 1),
                )
                # A call that asks it to stop would not return. Its leases expire.
                os._exit(EX_SOFTWARE)
