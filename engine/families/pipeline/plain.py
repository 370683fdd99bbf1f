"""A pipeline whose calls run whole, each alone, in turns of one scheduler step: the last resort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.errors import UnsupportedRequest
from engine.families.contract import Recall, State
from engine.families.coroutine import Ask
from engine.families.pipeline.called import CalledPipeline
from engine.families.pipeline.running import count_steps
from engine.families.pipeline.trial import TrialCalls, image_in_trial, try_calls
from engine.families.standins import lay_over
from engine.inflight import InFlight
from engine.request import ImageRequest


class PlainPipeline(CalledPipeline):
    """One loaded pipeline whose denoiser calls are its own affair."""

    def start(self, image: InFlight, recall: Recall) -> None:
        """Run up to where the pipeline sets its timesteps; most have encoded by then."""
        self._begin(image)
        image.batch_key = replace(image.batch_key, call=f"alone {image.id}")
        self._take_turn(image)

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """Give nothing, for the pipeline calls its own denoiser in `advance`."""
        return [None for _ in images]

    def advance(self, image: InFlight, prediction: Any) -> None:
        """Make the forward and the step."""
        self._take_turn(image)

    def save(self, image: InFlight) -> State:
        """Refuse: what the call holds cannot be seen."""
        raise UnsupportedRequest("snapshot", f"is not for {self._signature.name} in family plain")

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        """Refuse, likewise."""
        raise UnsupportedRequest("snapshot", f"is not for {self._signature.name} in family plain")

    def _try(self) -> None:
        """Make one step.

        Raises `UnsupportedRequest` for adapters, which nobody could lay over forwards that are not
        the engine's.
        """
        if self._spec.adapters:
            raise UnsupportedRequest("adapters", "are not for family plain")
        try_calls(self._signature, self._spec, self._make_one_step)

    def _make_one_step(self, request: ImageRequest) -> list[TrialCalls]:
        image = image_in_trial(request)
        self._begin(image)
        try:
            while not image.step and not image.is_denoised:
                self._take_turn(image)
        finally:
            self.release(image)
        return []

    def _take_turn(self, image: InFlight) -> None:
        self._calls.go_on(image, None)
        image.num_steps = count_steps(image)
        image.is_denoised = image.is_denoised or image.step >= image.num_steps

    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        def then_ask(_sampler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            ask(None)
            return result

        for name in ("set_timesteps", "step"):
            lay_over(pipe.scheduler, name, then_ask)
