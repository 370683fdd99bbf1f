"""Hold a lease that this worker has, and say whether and why its job must be released.

Several threads use one: the task that renders, the one that renews leases, the one that listens for
cancels, the one that empties a leaving worker. They change it only by its methods here.
"""

import threading
import time
from collections.abc import Mapping
from typing import Protocol

from models.leases import Lease


class Rendering(Protocol):
    """Tell how far a job's images in the engine are. Every method returns at once."""

    def wake(self) -> None:
        """Look at the lease again, because it changed."""

    def steps(self) -> Mapping[int, int]:
        """Tell how far each image that has not ended has come, by index."""

    def unfinished_s(self) -> float:
        """Return the device seconds of its images that are not on record yet."""

    def expected_s(self) -> float | None:
        """Estimate the seconds until the last image's pixels; None: nobody can say."""


class HeldLease:
    """Hold one lease. It is released when it is lost or its worker has to leave."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._taken_at = time.monotonic()
        self._unrendered = len(lease.pending)
        self._lost = threading.Event()
        self._leaving = ""
        self._is_exclusive = False
        self._rendering: Rendering | None = None

    @property
    def is_lost(self) -> bool:
        """Tell whether the job no longer belongs to this attempt."""
        return self._lost.is_set()

    @property
    def leaving(self) -> str:
        """Say why the worker has to leave; empty while it has not."""
        return self._leaving

    @property
    def is_released(self) -> bool:
        """Tell whether work on the job must stop."""
        return self.is_lost or bool(self._leaving)

    @property
    def is_exclusive(self) -> bool:
        """Tell whether the job has the worker to itself, or waits until it has."""
        return self._is_exclusive

    @property
    def unrendered(self) -> int:
        """Count the images whose pixels are not handed on."""
        return self._unrendered

    @property
    def run_left_s(self) -> float | None:
        """Return the seconds left until the job's run deadline; None: it has none."""
        within_s = self.lease.run_within_s
        if within_s is None:
            return None
        return max(0.0, within_s - (time.monotonic() - self._taken_at))

    def steps(self) -> Mapping[int, int]:
        """Tell how far each of its images has come, by index; {} while nothing is rendered."""
        return self._rendering.steps() if self._rendering is not None else {}

    def unfinished_s(self) -> float:
        """Return the device seconds of its images that are not on record yet."""
        return self._rendering.unfinished_s() if self._rendering is not None else 0.0

    def expected_s(self) -> float | None:
        """Estimate the seconds until its last pixels; None: nobody can say."""
        return self._rendering.expected_s() if self._rendering is not None else None

    def lose(self) -> None:
        """Release it because the job is not this attempt's any more. Harmless when repeated."""
        if not self.is_lost:
            self._lost.set()
            self._wake()

    def leave(self, reason: str) -> None:
        """Release it because the worker has to go; the first reason stays."""
        if not self._leaving:
            self._leaving = reason
            self._wake()

    def attach(self, rendering: Rendering) -> None:
        """Have `rendering` asked and woken from now on. The job may be released already."""
        self._rendering = rendering

    def set_exclusive(self, is_exclusive: bool) -> None:
        """Note that the job wants or has the worker to itself, or does so no more."""
        self._is_exclusive = is_exclusive

    def note_handed_on(self) -> None:
        """Note that the pixels of one image are handed on."""
        self._unrendered -= 1

    def _wake(self) -> None:
        if self._rendering is not None:
            self._rendering.wake()
