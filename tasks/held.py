"""A lease in this worker's hands, and why its job should be let go of.

Several threads look at one: the task that renders, the one that renews, whoever hears of a cancel,
the one that empties a leaving worker. All that they change of it is changed by its methods here.
"""

import threading
import time
from collections.abc import Mapping
from typing import Protocol

from models.leases import Lease


class Rendering(Protocol):
    """What is asked of a job's images in the engine. Every method returns at once."""

    def wake(self) -> None:
        """Look at the lease: something changed."""

    def steps(self) -> Mapping[int, int]:
        """Tell how far each image that has not ended has come, by index."""

    def expected_s(self) -> float | None:
        """Estimate the seconds until the last image's pixels; None: nobody can say."""


class Held:
    """A lease in hand. It is released when it is lost or its worker has to leave."""

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
        """Is the job somebody else's, or nobody's any more?"""
        return self._lost.is_set()

    @property
    def leaving(self) -> str:
        """Why the worker has to go; empty while it has not."""
        return self._leaving

    @property
    def is_released(self) -> bool:
        """Should the job be let go of?"""
        return self.is_lost or bool(self._leaving)

    @property
    def is_exclusive(self) -> bool:
        """Does the job have the worker to itself, or wait until it has?"""
        return self._is_exclusive

    @property
    def unrendered(self) -> int:
        """Images whose pixels are not handed on."""
        return self._unrendered

    @property
    def run_left_s(self) -> float | None:
        """What is left of the job's run deadline, in seconds; None: it has none."""
        within_s = self.lease.run_within_s
        if within_s is None:
            return None
        return max(0.0, within_s - (time.monotonic() - self._taken_at))

    def steps(self) -> Mapping[int, int]:
        """Tell how far each of its images has come, by index; {} while nothing is rendered."""
        return self._rendering.steps() if self._rendering is not None else {}

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
