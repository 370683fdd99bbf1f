"""A pipeline whose denoiser calls the engine makes: those of strangers as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import CheckpointSpec
from engine.errors import UnsupportedRequest
from engine.families.calls import (
    CallForm,
    CallsDiffer,
    NetworkCall,
    Run,
    learn,
    read,
    tensors_of,
    with_tensors,
    written,
)
from engine.families.contract import Recall, State
from engine.families.coroutine import Ask
from engine.families.pipeline.called import CalledPipeline
from engine.families.pipeline.running import count_steps, running_of
from engine.families.pipeline.trial import TrialCalls, image_in_trial, try_calls
from engine.families.standins import Decoder, Denoiser
from engine.inflight import InFlight
from engine.request import ImageRequest
from engine.transfers import to_device

log = logging.getLogger(__name__)

DENOISED = "denoised"  # not a question: the call is about to decode


class Pipeline(CalledPipeline):
    """One loaded pipeline whose denoiser calls are batched."""

    def __init__(
        self,
        pipe: Any,
        spec: CheckpointSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(pipe, spec, dtype=dtype, device=device)
        self._forms: list[CallForm] = []

    def start(self, image: InFlight, recall: Recall) -> None:
        """Run up to the first call of a denoiser."""
        self._begin(image)
        self._go_on(image, None)
        image.num_steps = count_steps(image)

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """Make one forward; rows in the order of the images, the very first one's as padding."""
        form = running_of(images[0]).form
        calls = [cast(NetworkCall, running_of(image).asked) for image in images]
        if form is None:
            return [self._make(calls[0])]
        counts = [image.rows for image in images]
        # Alone, a call is made as the pipeline made it: those are the bits of `pipe(...)`.
        call = calls[0] if counts == [bucket_rows] else form.stack(calls, counts, bucket_rows)
        return form.split(self._make(call), counts)

    def advance(self, image: InFlight, prediction: Any) -> None:
        kept = with_tensors(prediction, _copied_to_cpu)
        self._answer(image, kept, prediction)

    def save(self, image: InFlight) -> State:
        """Copy all answers the call has got.

        Raises `UnsupportedRequest` for answers that are not plain data.
        """
        if self.device.type == "cuda":
            # The copies made in `advance` were not waited for.
            torch.cuda.synchronize(self.device)
        tensors: list[Tensor] = []
        try:
            answers = [written(answer, tensors) for answer in running_of(image).answers]
        except CallsDiffer:
            reason = f"{self._signature.name} was answered with what is not plain data"
            raise UnsupportedRequest("snapshot", reason) from None
        saved = {str(index): tensor for index, tensor in enumerate(tensors)}
        return State(saved, {"answers": answers})

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        """Replay the call, in which `image.step` counts up to where it was."""
        tensors = [state.tensors[str(index)] for index in range(len(state.tensors))]
        image.step = 0
        image.is_denoised = False
        self._begin(image)
        self._go_on(image, None)
        for facts in state.facts["answers"]:
            kept = read(facts, tensors)
            self._answer(image, kept, with_tensors(kept, self._to_device))
        image.num_steps = count_steps(image)

    def _answer(self, image: InFlight, kept: Any, answer: Any) -> None:
        """Give the call its answer, and keep a copy of it.

        What one network gives straight to another, as a control network does, is forgotten once the
        other has answered, but for its shape: whatever it was, that second answer is all that is
        left of it. It would be most of a snapshot's bytes.
        """
        running = running_of(image)
        asked = running.asked
        if running.is_passed_on:
            running.answers[-1] = with_tensors(running.answers[-1], _shape_only)
        running.answers.append(kept)
        self._go_on(image, answer)
        running.is_passed_on = False
        following = running.asked
        if asked is not None and following is not None and following.network != asked.network:
            arguments = {id(tensor) for tensor in tensors_of((following.args, following.kwargs))}
            running.is_passed_on = all(id(tensor) in arguments for tensor in tensors_of(answer))

    def _go_on(self, image: InFlight, answer: Any) -> None:
        """Let the call run to its next question, and name that: who can share the forward?"""
        if self._calls.go_on(image, answer) == DENOISED:
            image.is_denoised = True
        running = running_of(image)
        if running.asked is None:
            return
        exactly = image.request.is_reproducible
        running.form, image.rows, name = self._recognised(running.asked, exactly=exactly)
        alone = f"{running.asked.network} alone {image.id}"
        image.batch_key = replace(image.batch_key, call=name or alone)

    def _recognised(self, call: NetworkCall, *, exactly: bool) -> tuple[CallForm | None, int, str]:
        """Give a call's form, its rows and its name; calls of one name are made as one.

        A strange call has no form, one row, no name.
        """
        found: list[tuple[CallForm | None, int, str]] = []
        for form in self._forms:
            try:
                found.append((form, *form.describe(call, exactly=exactly)))
            except CallsDiffer:
                continue
        return found[0] if len(found) == 1 else (None, 1, "")

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.zeros_like(tensor, device=self.device)
        return to_device(tensor.clone(), self.device)

    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        def about_to_decode() -> None:
            # Before the first step it is done for the picture that the image starts from.
            if image.step and not image.is_denoised:
                ask(DENOISED)

        places = vars(pipe)
        for name, network in self._denoisers.items():
            places[name] = Denoiser(network, name, ask)
        for name, network in self._decoders.items():
            places[name] = Decoder(network, about_to_decode)

    # --- the trial ---

    def _try(self) -> None:
        """Find out how many rows an image takes, and which calls can be made as one.

        Two steps with guidance and two without.
        """
        trials = try_calls(self._signature, self._spec, self._trials)
        self._forms = learn([(trial.of_one, trial.of_two) for trial in trials], self._make)
        strange = set()
        for trial in trials:
            for call, _ in trial.of_one:
                form, rows, _ = self._recognised(call, exactly=True)
                self._rows[trial.is_guided] = max(self._rows[trial.is_guided], rows)
                if form is None:
                    strange.add(call.network)
        if strange:
            found = {"checkpoint": self._spec.name, "networks": sorted(strange)}
            log.warning("calls_not_batched", extra=found)

    def _trials(self, request: ImageRequest) -> list[TrialCalls]:
        """Record all calls for one image and for two, with guidance too where there is any."""
        trials = []
        for guidance in (1.0, 2.0) if self._signature.knows_guidance else (1.0,):
            guided = replace(request, guidance=guidance)
            of_two: Run = []
            if self._signature.can_double:
                of_two = self._recorded(guided, num_images_per_prompt=2)
            trials.append(TrialCalls(guided.is_guided, self._recorded(guided), of_two))
        return trials

    def _recorded(self, request: ImageRequest, **more: Any) -> Run:
        """Record every call that a pipeline makes up to its decode, with what the networks give."""
        image = image_in_trial(request)
        self._begin(image, **more)
        running = running_of(image)
        run = []
        try:
            self._calls.go_on(image, None)
            while running.asked is not None:
                run.append((running.asked, self._make(running.asked)))
                self._calls.go_on(image, run[-1][1])
        finally:
            self.release(image)
        return run


def _copied_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, non_blocking=True)


def _shape_only(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
