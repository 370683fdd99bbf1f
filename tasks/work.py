"""Track a job's images in this worker's engine: how far they are, and how each ends."""

import queue
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from engine.errors import EngineError
from engine.events import Failed, Finished
from engine.handle import Handle
from engine.records import FinishedImage
from engine.texts import UnreadText
from models.leases import Lease
from tasks.held import HeldLease

DROP_WITHIN_S = 20.0  # no step takes that long


class End(Enum):
    """Name how the rendering of a job ended on this worker."""

    RENDERED = auto()  # every pending image is handed on
    LOST = auto()  # the job is not this attempt's any more: nothing more is written
    LEAVING = auto()  # the worker has to go: what is not finished goes on elsewhere
    FAILED = auto()  # an error; tasks/verdicts.py says what it means


@dataclass(frozen=True)
class RenderResult:
    """Tell how a job's rendering ended. error: of one that FAILED."""

    end: End
    error: BaseException | None = None


@dataclass(frozen=True)
class ImageEnding:
    """Hold the last event of the job's image `index`."""

    index: int
    event: Finished | Failed


@dataclass(frozen=True)
class TextsUnread:
    """Say which parts of the job's texts the model did not read: they have no effect."""

    texts: tuple[UnreadText, ...]


class RenderWork:
    """Track the images of one job in the engine, by index.

    The engine's thread adds messages, the task takes them.
    """

    def __init__(self, held: HeldLease) -> None:
        self.held = held
        self.handles: dict[int, Handle] = {}
        self.resumed: dict[int, int] = {}  # the step at which each began: 0, or its snapshot's
        self.first_preview_at: float | None = None  # on the monotonic clock
        self._accounted: set[int] = set()
        self._messages: queue.SimpleQueue[ImageEnding | TextsUnread | None] = queue.SimpleQueue()
        self._is_begun = False
        held.attach(self)

    @property
    def lease(self) -> Lease:
        """Return the lease under which the job is rendered."""
        return self.held.lease

    def add(self, index: int, handle: Handle, *, first_step: int) -> None:
        """Note that the image is in the engine, where it goes on after `first_step`."""
        self.handles[index] = handle
        self.resumed[index] = first_step

    def begin(self) -> None:
        """Tell of steps from now on: until then the rows say how far earlier attempts had come."""
        self._is_begun = True

    def put(self, message: ImageEnding | TextsUnread) -> None:
        """Note what an image has to tell. Returns at once."""
        self._messages.put(message)

    def wait(self) -> ImageEnding | TextsUnread | None:
        """Wait for a message about an image, or about the lease: None."""
        return self._messages.get()

    def drain_finished(self) -> Iterator[tuple[int, FinishedImage]]:
        """Take what has come by now and yield the images that are finished, with their index."""
        while not self._messages.empty():
            message = self._messages.get()
            if isinstance(message, ImageEnding) and isinstance(message.event, Finished):
                yield message.index, message.event.image

    def note_handed_on(self, index: int) -> None:
        """Note that the image's pixels are in the hand-off and its device time is on record."""
        self._accounted.add(index)
        self.held.note_handed_on()

    def note_snapshot_left(self, index: int) -> None:
        """Note that another attempt goes on from the image's snapshot: its time is on record."""
        self._accounted.add(index)

    def unaccounted(self) -> dict[int, Handle]:
        """Return the images whose device time is not on record."""
        known = self._accounted
        return {index: one for index, one in list(self.handles.items()) if index not in known}

    def open_handles(self) -> dict[int, Handle]:
        """Return the images that have not ended."""
        return {index: handle for index, handle in list(self.handles.items()) if not handle.done()}

    def cancel(self) -> None:
        """Stop the images at their next step."""
        for handle in list(self.handles.values()):
            handle.cancel()

    def drop(self) -> None:
        """Stop the images and wait until they have: their account is complete, their slots free."""
        self.cancel()
        for handle in self.handles.values():
            with suppress(EngineError, TimeoutError):
                handle.result(DROP_WITHIN_S)

    def wake(self) -> None:
        """Have the task look at its lease; a lost one stops the images whatever the task does."""
        if self.held.is_lost:
            self.cancel()
        self._messages.put(None)

    def steps(self) -> dict[int, int]:
        """Tell how far each image that has not ended has come; {} until `begin`."""
        if not self._is_begun:
            return {}
        return {index: handle.progress().step for index, handle in self.open_handles().items()}

    def unfinished_s(self) -> float:
        """Return the device seconds of its images that are not on record yet."""
        return sum(handle.progress().device_seconds for handle in self.unaccounted().values())

    def expected_s(self) -> float | None:
        """Estimate the seconds until the last image's pixels; None while one has not begun."""
        if len(self.handles) < len(self.lease.pending):
            return None
        etas = [handle.progress().eta_s for handle in self.open_handles().values()]
        known = [eta for eta in etas if eta is not None]
        return max(known, default=0.0) if len(known) == len(etas) else None
