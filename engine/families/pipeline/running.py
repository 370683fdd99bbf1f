"""One image's call of its pipeline on its way: begun on a copy, and let go on in turns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from engine.families.calls import CallForm, NetworkCall
from engine.families.coroutine import Ask, Coroutine, Returned
from engine.families.pipeline.signature import OWN_SAMPLER
from engine.families.standins import lay_over
from engine.inflight import InFlight
from engine.previews import clean_latents
from engine.samplers import fresh_sampler
from engine.transfers import without_waits


@dataclass(eq=False)
class RunningCall:
    """What an image holds: its pipeline's call on its way."""

    coroutine: Coroutine
    pipe: Any = None  # the image's copy, once the call has begun
    asked: NetworkCall | None = None  # what the call waits for
    form: CallForm | None = None  # of `asked`; None: it is made alone
    answers: list[Any] = field(default_factory=list)  # all that the call has got, on the CPU
    is_passed_on: bool = False  # is the last answer an argument of `asked`, another network's?
    returned: Returned | None = None  # what the call gave in the end
    clean: Tensor | None = None  # latents as the last step predicted them; only for who watches


def running_of(image: InFlight) -> RunningCall:
    """Give the call that an image holds, from its encode to its end."""
    assert image.held is not None, f"image {image.id} is {image.state} and holds no call"
    return cast(RunningCall, image.held)


def count_steps(image: InFlight) -> int:
    """Count how often the image's call will step its scheduler.

    Most pipelines say so; all set timesteps before they denoise.
    """
    pipe = running_of(image).pipe
    return int(getattr(pipe, "_num_timesteps", 0) or len(pipe.scheduler.timesteps))


class PipelineCalls:
    """Begins calls of one loaded pipeline and lets them run on. Used by the device thread."""

    def __init__(
        self,
        pipe: Any,
        *,
        decoders: Mapping[str, nn.Module],
        device: torch.device,
    ) -> None:
        self._pipe = pipe
        self._device = device
        weights = [weight for decoder in decoders.values() for weight in decoder.parameters()]
        self._as_loaded = [(weight, weight.dtype) for weight in weights]

    def begin(self, image: InFlight, call: Callable[[Any, Ask], Any]) -> None:
        """Let the image hold `call(its copy of the pipeline, ask)`, which has not begun yet."""

        def run(ask: Ask) -> Any:
            running.pipe = self._copy(image)
            return call(running.pipe, ask)

        coroutine = Coroutine(run, name=f"pipeline {image.id}", within=self.surroundings())
        running = image.held = RunningCall(coroutine)

    def go_on(self, image: InFlight, answer: Any) -> Any:
        """Let the image's call run on until it asks or ends; give what it asks.

        Raises what the call raised.
        """
        running = running_of(image)
        running.asked = None
        try:
            outcome = running.coroutine.resume(answer)
        except BaseException:
            # A pipeline that casts its VAE to decode has not cast it back.
            for weight, dtype in self._as_loaded:
                weight.data = weight.data.to(dtype)
            raise
        if isinstance(outcome, Returned):
            running.returned = outcome
            image.is_denoised = True
        elif isinstance(outcome, NetworkCall):
            running.asked = outcome
        return outcome

    def surroundings(self) -> Callable[[], AbstractContextManager[None]]:
        """Tell what must hold in a call's thread as it does in the device thread, which asks."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        num_threads = torch.get_num_threads()

        @contextmanager
        def within() -> Iterator[None]:
            # A new thread has as many as the machine has cores until something asks torch.
            torch.set_num_threads(num_threads)
            on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            with torch.inference_mode(), on_stream, without_waits(self._device):
                yield

        return within

    def _copy(self, image: InFlight) -> Any:
        """Give the pipeline with schedulers of this image's own; its networks are everybody's."""
        pipe = copy.copy(self._pipe)
        # Not by setattr: with it a pipeline notes a part's class and library in its config, and
        # stand-ins are of no library.
        places = vars(pipe)
        for name, part in self._pipe.components.items():
            if isinstance(part, SchedulerMixin):
                places[name] = part.from_config(part.config)
        if image.request.sampler != OWN_SAMPLER:
            config = self._pipe.scheduler.config
            places["scheduler"] = fresh_sampler(image.request.sampler, config)
        # It would reset what belongs to the neighbours on the shared networks.
        places["maybe_free_model_hooks"] = lambda: None
        _note_steps(places["scheduler"], image)
        return pipe


def _note_steps(sampler: Any, image: InFlight) -> None:
    """Count every step of the image's own sampler, and keep the clean latents for who watches."""
    parameters = inspect.signature(sampler.step)
    on_host: list[Tensor] = []  # the sampler's timesteps

    def set_timesteps(sampler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        on_host[:] = [sampler.timesteps.cpu()]  # the one wait for them
        return result

    def step(sampler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(*args, **kwargs)
        given = bound.arguments
        given["timestep"] = _timestep_on_host(sampler, given["timestep"], on_host)
        sample = given["sample"]
        # Others are packed, and only their pipeline knows how.
        is_seen = image.is_watched and sample.ndim == 4
        clean = (
            clean_latents(sampler, sample, given["model_output"], given["timestep"])
            if is_seen
            else None
        )
        with without_waits(sample.device, keeps_numbers=True):
            result = method(*bound.args, **bound.kwargs)
        running_of(image).clean = clean
        image.step += 1
        return result

    lay_over(sampler, "set_timesteps", set_timesteps)
    lay_over(sampler, "step", step)


def _timestep_on_host(sampler: Any, timestep: Any, on_host: list[Tensor]) -> Any:
    """Give the same timestep on the host, where it is one of the sampler's own.

    To look a factor up by a number that is on the device is to wait for the device.
    """
    timesteps = sampler.timesteps
    if not on_host or not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
        return timestep
    begins_at = timesteps.untyped_storage().data_ptr()
    if timestep.ndim or timestep.untyped_storage().data_ptr() != begins_at:
        return timestep
    return on_host[0][timestep.storage_offset() - timesteps.storage_offset()]
