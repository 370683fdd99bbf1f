"""Hold what callers leave for the device thread, and the images that it has yet to end.

One lock. Callers put in and go on; the device thread takes everything out between two turns. The
scheduler's list of images changes under this lock alone, so that `stats` finds each once.
It knows no tensors, nor what becomes of what it hands over.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from engine.errors import EngineError, EngineStopped, UnsupportedRequest
from engine.events import OnEvent
from engine.families.contract import State
from engine.handle import Handle
from engine.inflight import InFlight, RenderState
from engine.previews import Pace
from engine.records import FinishedImage
from engine.scheduler import Scheduler

Note = Callable[[], None]


@dataclass(eq=False)
class OpenImage:
    """An image that has not ended: whom to tell of it, and how it comes to its latents."""

    image: InFlight
    handle: Handle
    on_event: OnEvent | None
    begin: Callable[[InFlight], None] | None  # None once it has begun
    is_new: bool  # does it begin with noise of its own, not with a state or latents from elsewhere?
    unstarted: State | None  # what a snapshot holds until then; None for a fork: no snapshot yet
    pace: Pace  # of its previews
    due_at: float  # on the monotonic clock; infinity: whenever it is done


@dataclass(frozen=True)
class InboxContents:
    """What callers left since the last turn."""

    arrivals: list[InFlight]  # in the scheduler already
    late: list[InFlight]  # their deadline has passed
    canceled: list[InFlight]
    notes: list[Note]  # what else is to be done on the device thread


class Inbox:
    """The shared state of an engine's callers and its device thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._changed = threading.Condition()
        self._arrivals: deque[InFlight] = deque()
        self._cancels: set[str] = set()
        self._notes: deque[Note] = deque()
        self._open: dict[str, OpenImage] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap of (due_at, id), ended ones too
        self._is_stopping = False
        self._is_accepting = False

    # --- from any thread ---

    @property
    def is_accepting(self) -> bool:
        """Tell whether the device thread takes more images."""
        return self._is_accepting

    def start_accepting(self) -> None:
        """Let callers in, unless they asked to stop meanwhile."""
        with self._changed:
            self._is_accepting = not self._is_stopping

    def stop(self) -> None:
        """Take nothing more, and let the device thread come to its end after the turn it is in."""
        with self._changed:
            self._is_stopping = True
            self._is_accepting = False
            self._changed.notify_all()

    def put(self, entry: OpenImage) -> None:
        """Leave a newcomer. Raises `EngineStopped`, or `UnsupportedRequest` for an id in flight."""
        image = entry.image
        with self._changed:
            if not self._is_accepting:
                raise EngineStopped("the engine is not running")
            if image.id in self._open:
                reason = f"an image with id {image.id!r} is already in this engine"
                raise UnsupportedRequest("id", reason)
            self._open[image.id] = entry
            if entry.due_at < math.inf:
                heappush(self._deadlines, (entry.due_at, image.id))
            self._arrivals.append(image)
            self._changed.notify_all()

    def cancel(self, image_id: str) -> None:
        """Ask for the end of an image. Harmless when there is no such image."""
        with self._changed:
            if image_id in self._open:
                self._cancels.add(image_id)
                self._changed.notify_all()

    def post(self, note: Note) -> bool:
        """Have `note` called on the device thread between two turns.

        False when it takes no more.
        """
        with self._changed:
            if not self._is_accepting:
                return False
            self._notes.append(note)
            self._changed.notify_all()
        return True

    def stats(self) -> dict[str, int]:
        """Count the images that have not ended, by where they stand."""
        with self._changed:
            states = Counter(image.state for image in self._scheduler.in_order())
            arriving = len(self._arrivals)
        return {
            "inflight": states[RenderState.RUNNING] + states[RenderState.DENOISED],
            "parked": states[RenderState.PARKED],
            "waiting": states[RenderState.QUEUED] + arriving,
        }

    # --- from the device thread ---

    def take(self, *, may_wait: bool = True) -> InboxContents | None:
        """Sleep until there is something to do; take out what was left. None: time to stop.

        may_wait: without it, do not sleep: the device thread has other work.
        """
        with self._changed:
            while may_wait and not (self._has_mail or self._is_stopping or len(self._scheduler)):
                self._changed.wait()
            arrivals = list(self._arrivals)
            self._arrivals.clear()
            for image in arrivals:
                self._scheduler.add(image, time.monotonic())
            if self._is_stopping:
                return None
            late = self._take_late()
            found = map(self._scheduler.get, self._cancels)
            canceled = [image for image in found if image is not None]
            self._cancels.clear()
            notes = list(self._notes)
            self._notes.clear()
        return InboxContents(arrivals, late, canceled, notes)

    @property
    def _has_mail(self) -> bool:
        return bool(self._arrivals or self._cancels or self._notes)

    def _take_late(self) -> list[InFlight]:
        """Give the images whose deadline has passed.

        No deadline needs to wake the device thread: it never sleeps while an image is here.
        """
        late = []
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self._open.get(heappop(self._deadlines)[1])
            if entry is not None and entry.due_at <= now:  # not another of that id
                late.append(entry.image)
        return late

    def is_canceled(self, image_id: str) -> bool:
        """Tell whether an image is to be dropped before the next turn."""
        with self._changed:
            return image_id in self._cancels

    def open_images_of(self, checkpoint: str) -> list[InFlight]:
        """List the images of a checkpoint that have not ended, those that arrive included."""
        with self._changed:
            images = [entry.image for entry in self._open.values()]
        return [image for image in images if image.request.checkpoint == checkpoint]

    def __getitem__(self, image_id: str) -> OpenImage:
        """Find an image that has not ended; only the device thread ends one."""
        return self._open[image_id]

    def resolve(self, image_id: str, outcome: FinishedImage | EngineError) -> None:
        """End an image: its handle has the outcome before its id is free for another."""
        with self._changed:
            self._scheduler.remove(image_id)
            self._cancels.discard(image_id)
            self._open.pop(image_id).handle.resolve(outcome)

    def shut(self) -> tuple[list[InFlight], list[Note]]:
        """Take nothing more, for good; give the images left and the notes nobody has called."""
        with self._changed:
            self._is_accepting = False
            # Not the scheduler's word: its books may be what broke.
            left = [entry.image for entry in self._open.values()]
            self._arrivals.clear()
            notes = list(self._notes)
            self._notes.clear()
        return left, notes
