"""Decide whether this worker is healthy. A sick one must leave before it fails the whole backlog.

Unplanned errors of different jobs in a row, with no image between them, are the worker's fault and
not the jobs'. A device that hangs is watched for elsewhere (tasks/watchdog.py).
"""

import threading
from collections.abc import Callable

from edges import telemetry
from edges.notices import Notice

STRIKES = 3
LEAVE_WITHIN_S = 5.0


class Health:
    """Judge one worker's health; call `leave` when it has to go."""

    def __init__(self, *, leave: Callable[[Notice], None]) -> None:
        self._leave = leave
        # Jobs that ended in an unplanned error since the last image.
        self._strikes: set[str] = set()
        self.gave_up = ""  # why; then the process ends because of an error
        self._lock = threading.Lock()

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
