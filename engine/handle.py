"""What a caller holds of an image in flight. Every method may be called from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EngineError
from engine.inflight import ImageState, InFlight
from engine.records import FinishedImage
from engine.request import ImageRequest


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an image stands; the numbers may be one step old."""

    state: ImageState
    step: int
    num_steps: int
    eta_s: float | None  # until the pixels are there; None before the first step
    device_seconds: float  # its share until now, also of an image that was canceled or failed


class Handle:
    """One submitted image."""

    def __init__(self, image: InFlight, cancel: Callable[[str], None]) -> None:
        self.request: ImageRequest = image.request
        self._image = image
        self._cancel = cancel
        self._done = threading.Event()
        self._finished: FinishedImage | None = None
        self._error: EngineError | None = None

    def cancel(self) -> None:
        """Ask the engine to drop the image at the next step boundary. Harmless at any moment, also after the end."""
        if not self.done():
            self._cancel(self.request.id)

    def done(self) -> bool:
        """Is it finished, failed or canceled?"""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> FinishedImage:
        """Wait for the image. Raises its `EngineError`, or `TimeoutError` when it is not done in time (it goes on then).

        When this returns, the image's last event has been delivered.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"image {self.request.id} is not done after {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._finished is not None
        return self._finished

    def progress(self) -> Progress:
        """Where the image stands now; waits for nothing."""
        image = self._image
        return Progress(
            state=image.state,
            step=image.step,
            num_steps=image.num_steps,
            eta_s=image.eta_s,
            device_seconds=image.account.device_seconds,
        )

    def resolve(self, outcome: FinishedImage | EngineError) -> None:
        """The engine's word, once: later ones are ignored."""
        if self._done.is_set():
            return
        if isinstance(outcome, FinishedImage):
            self._finished = outcome
        else:
            self._error = outcome
        self._done.set()
