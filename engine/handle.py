"""The caller's handle of an image in flight. Every method may be called from any thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from engine.errors import EngineError, SnapshotRefused
from engine.inflight import InFlight, RenderState
from engine.records import FinishedImage
from engine.request import ImageRequest


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an image stands; the numbers may be one step old."""

    state: RenderState
    step: int
    num_steps: int
    eta_s: float | None  # until the pixels are there; None before the first step
    device_seconds: float  # its share until now, also of an image that was canceled or failed


class EngineControls(Protocol):
    """What a handle asks of its engine.

    Each takes effect between two steps and is harmless for an image that has ended.
    """

    def cancel(self, image_id: str) -> None: ...

    def set_rank(self, image_id: str, rank: int) -> None: ...

    def watch(self, image_id: str, watched: bool) -> None: ...

    def snapshot(self, image_id: str) -> Future[bytes]: ...


class Handle:
    """One submitted image."""

    def __init__(self, image: InFlight, controls: EngineControls) -> None:
        self.request: ImageRequest = image.request
        self._image = image
        self._controls = controls
        self._done = threading.Event()
        self._finished: FinishedImage | None = None
        self._error: EngineError | None = None

    def cancel(self) -> None:
        """Ask the engine to drop the image at the next step boundary.

        Harmless at any moment, also after the end.
        """
        if not self.done():
            self._controls.cancel(self.request.id)

    def set_rank(self, rank: int) -> None:
        """Serve the image at this rank from the next step boundary on. No worker does so yet."""
        if not self.done():
            self._controls.set_rank(self.request.id, rank)

    def watch(self, watched: bool = True) -> None:
        """Ask for `Previewed` events from the next step on, or for no more of them.

        They cost time, so ask only while somebody looks.
        """
        if not self.done():
            self._controls.watch(self.request.id, watched)

    def snapshot(self, timeout_s: float | None = None) -> bytes:
        """Give all that is needed to go on elsewhere from the present step with the same bits.

        The image itself goes on too.

        Raises `SnapshotRefused` when it has ended, `UnsupportedRequest` where its family has none
        to give, `EngineStopped`, or `TimeoutError`.
        """
        if self.done():
            raise SnapshotRefused(f"image {self.request.id} is no longer in flight")
        return self._controls.snapshot(self.request.id).result(timeout_s)

    def done(self) -> bool:
        """Tell whether the image is finished, failed or canceled."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> FinishedImage:
        """Wait for the image.

        Raises its `EngineError`, or `TimeoutError` when it is not done in time (it goes on then).

        When this returns, the image's last event has been delivered.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"image {self.request.id} is not done after {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._finished is not None
        return self._finished

    def progress(self) -> Progress:
        """Tell where the image stands now; waits for nothing."""
        image = self._image
        return Progress(
            state=image.state,
            step=image.step,
            num_steps=image.num_steps,
            eta_s=image.eta_s,
            device_seconds=image.account.device_seconds,
        )

    def resolve(self, outcome: FinishedImage | EngineError) -> None:
        """Take the engine's word, once: later ones are ignored."""
        if self._done.is_set():
            return
        if isinstance(outcome, FinishedImage):
            self._finished = outcome
        else:
            self._error = outcome
        self._done.set()
