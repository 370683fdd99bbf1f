"""Any diffusers pipeline as it is: its own `__call__` runs as a coroutine that the engine advances step by step.

Two families. Both run the call on a shallow copy of the pipeline with schedulers of the image's own:

    Pipeline        stand-ins take the denoisers' places in the copy and hand every call to the engine, which makes the calls of
                    strangers as one. The first use of the VAE after that is the end of denoising; `decode` runs the rest.
    PlainPipeline   nothing is taken apart: the call runs alone, in turns of one scheduler step. The last resort, for who breaks above.

A call that is not known to keep its rows apart (see `calls.py`) is made alone. That goes for pipelines that pass a key-value cache
or other objects into the denoiser, and for calls of a kind that the trial run at the checkpoint's load did not show. Not served at
all: cascades of several pipelines, and pipelines that do not give one picture.

An image goes on elsewhere by replay: the answers its call has got are kept, and given again to a call begun anew.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from PIL import Image
from torch import Tensor, nn

from engine.config import CheckpointSpec
from engine.errors import CheckpointCorrupt, EngineError, UnsupportedRequest
from engine.families.calls import Call, CallForm, Run, Unlike, learn, read, tensors_of, with_tensors, written
from engine.families.contract import Recall, State
from engine.families.coroutine import Ask, Coroutine, Returned
from engine.families.latent import check_side, load_network
from engine.families.standins import Decoder, Denoiser, lay_over
from engine.inflight import BatchKey, InFlight
from engine.previews import Projector, clean_latents, fit
from engine.request import ImageRequest, Option, Picture
from engine.samplers import FLOW_SAMPLERS, SAMPLERS, Recipe, check_sampler, fresh_sampler
from engine.texts import UnreadText

log = logging.getLogger(__name__)

INDEX = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
NOT_LOADED = "safety_checker"  # what may be seen is decided elsewhere in the house
OWN_SAMPLER = "default"  # the checkpoint's own scheduler class and config
SAID_BY_THE_REQUEST = (
    *("prompt", "negative_prompt", "height", "width", "num_inference_steps", "generator", "strength", "clip_skip"),
    *("image", "mask_image", "control_image"),
)
SAID_BY_NOBODY = (
    *("num_images_per_prompt", "latents", "output_type", "return_dict", "callback", "callback_steps"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)


@dataclass(eq=False)
class Running:
    """What an image holds: its pipeline's call on its way."""

    coroutine: Coroutine
    pipe: Any = None  # the image's copy, once the call has begun
    asked: Call | None = None  # what the call waits for
    form: CallForm | None = None  # of `asked`; None: it is made alone
    answers: list[Any] = field(default_factory=list)  # all that the call has got, on the CPU
    is_passed_on: bool = False  # is the last answer an argument of `asked`, which is another network's?
    returned: Returned | None = None  # what the call gave in the end
    clean: Tensor | None = None  # the clean latents as the last step predicted them; only while somebody watches


class CalledPipeline(ABC):
    """What both families have in common: a loaded pipeline, and one call of it per image."""

    follows_stream = False  # a call stays on the stream it began on

    def __init__(self, pipe: Any, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.dtype = dtype
        self._pipe = pipe
        self._spec = spec
        self._name = type(pipe).__name__
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        networks: dict[str, Any] = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        ours = {name: network for name, network in networks.items() if type(network).__module__.startswith("diffusers.")}
        self._decoders = {name: network for name, network in ours.items() if hasattr(network, "decode")}
        self._denoisers = {name: network for name, network in ours.items() if name not in self._decoders}
        self._text_encoders = {name: network for name, network in networks.items() if name.startswith("text_encoder")}
        self._as_loaded = [(weight, weight.dtype) for decoder in self._decoders.values() for weight in decoder.parameters()]
        self._samplers = _samplers_for(pipe.scheduler)
        self._pictures = _picture_parameters(self._parameters, is_controlled="controlnet" in networks)
        self._guidance = _guidance_parameter(self._parameters)
        self._needs_pictures = False
        self._index_sha256 = hashlib.sha256((Path(spec.path) / INDEX).read_bytes()).hexdigest()
        scale = int(getattr(pipe, "vae_scale_factor", 8))
        # UNets shrink latents themselves, and their pipelines ask for multiples of 8; transformers take them in patches of 2x2.
        self.pixels_per_latent: int = max(8, scale) if "unet" in ours else 2 * scale

    def unread(self, request: ImageRequest) -> tuple[UnreadText, ...]:
        """See the contract: what a call makes of its texts is its own affair."""
        return ()

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        """See the contract."""
        return tuple(sorted(_components(_read_index(path))))

    @classmethod
    def load(cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> Self:
        """See the contract. Ends with trial calls at the smallest size.

        Raises `UnsupportedRequest` for a pipeline class or options that cannot be served.
        """
        path = Path(spec.path)
        index = _read_index(path)
        pipeline_class = _pipeline_class(spec.pipeline_class or index.get("_class_name"))
        taken = inspect.signature(pipeline_class.__init__).parameters
        given: dict[str, Any] = {
            name: load_network(kind, path, name, dtype, device)
            for name, kind in _components(index).items()
            if name in taken and issubclass(kind, nn.Module)
        }
        given |= {name: value for name, value in ((NOT_LOADED, None), ("requires_safety_checker", False)) if name in taken}
        try:
            pipe = pipeline_class.from_pretrained(str(path), local_files_only=True, use_safetensors=True, **given)
        except Exception as problem:
            raise CheckpointCorrupt(INDEX, f"{pipeline_class.__name__} cannot be made of it: {problem}") from problem
        if not isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
            raise UnsupportedRequest("pipeline_class", f"{pipeline_class.__name__} has no scheduler to count steps by")
        pipe.set_progress_bar_config(disable=True)
        family = cls(pipe, spec, dtype=dtype, device=device)
        family._check_options(spec.options)
        with torch.inference_mode():
            family._try()
        return family

    def networks(self) -> Mapping[str, nn.Module]:
        """See the contract."""
        return self._denoisers | self._text_encoders

    def facts(self) -> dict[str, Any]:
        """See the contract."""
        processors = {name: getattr(network, "attn_processors", {}).values() for name, network in self._denoisers.items()}
        return {
            "pipeline": self._name,
            "model_index": self._index_sha256,  # it lies in no folder of its own, so the digest of the weights does not cover it
            "options": dict(self._spec.options),
            "attention_backend": DIFFUSERS_ATTN_BACKEND,
            "attention": {name: sorted({type(one).__name__ for one in found}) for name, found in processors.items()},
            "text_attention": {
                name: str(getattr(encoder.config, "_attn_implementation", None)) for name, encoder in self._text_encoders.items()
            },
            "vae_tiling": any(getattr(decoder, "use_tiling", False) for decoder in self._decoders.values()),
            "vae_slicing": any(getattr(decoder, "use_slicing", False) for decoder in self._decoders.values()),
        }

    # --- of a request ---

    def check(self, request: ImageRequest) -> None:
        """See the contract. Guidance is ignored, not refused, where the pipeline knows of none: every request has some."""
        check_side("width_px", request.width_px, self.pixels_per_latent)
        check_side("height_px", request.height_px, self.pixels_per_latent)
        check_sampler(request.sampler, request.num_steps, self._pipe.scheduler.config, self._samplers)
        self._check_options(request.options)
        self._check_pictures(request)
        refused = {
            "negative_prompt": bool(request.negative_prompt) and "negative_prompt" not in self._parameters,
            "strength": request.strength != 1 and "strength" not in self._parameters,
            "clip_skip": request.clip_skip > 0 and "clip_skip" not in self._parameters,
            "fork": request.fork is not None,
            "keep_steps": bool(request.keep_steps),
            "block_cache": request.block_cache,
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise UnsupportedRequest(name, f"is not for {self._name}")
        if request.num_steps * request.strength < 1:
            raise UnsupportedRequest("strength", f"{request.strength} of {request.num_steps} steps leaves none")

    def rows(self, request: ImageRequest) -> int:
        """See the contract."""
        return 1

    def text_length(self, request: ImageRequest) -> int:
        """Always 0: how long a prompt has become shows in the calls, and so in their names."""
        return 0

    def _check_options(self, options: Mapping[str, Option]) -> None:
        for name in options:
            if name not in self._parameters or name in SAID_BY_THE_REQUEST or name in SAID_BY_NOBODY:
                raise UnsupportedRequest("options", f"{name!r} is no option of {self._name}")

    def _check_pictures(self, request: ImageRequest) -> None:
        for name in ("init_image", "mask", "control_image"):
            picture: Picture | None = getattr(request, name)
            if picture is None:
                if self._needs_pictures and name in self._pictures:
                    raise UnsupportedRequest(name, f"is needed by {self._name}")
            elif name not in self._pictures:
                raise UnsupportedRequest(name, f"is not taken by {self._name}")
            elif picture.pixels.shape[:2] != (request.height_px, request.width_px):
                height_px, width_px = picture.pixels.shape[:2]
                raise UnsupportedRequest(name, f"is {width_px}x{height_px}, the image {request.width_px}x{request.height_px}")

    def _arguments(self, request: ImageRequest) -> dict[str, Any]:
        """What `pipe(...)` is called with. Guidance is what the pipeline takes it to be: Z-Image guides from 0 upward, not from 1."""
        wishes: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height_px,
            "width": request.width_px,
            "num_inference_steps": request.num_steps,
            "strength": request.strength,
            "clip_skip": request.clip_skip or None,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            "output_type": "pt",
        }
        if self._guidance is not None:
            wishes[self._guidance] = request.guidance
        for name, parameter in self._pictures.items():
            picture: Picture | None = getattr(request, name)
            wishes[parameter] = None if picture is None else Image.fromarray(picture.pixels)
        taken = {name: wish for name, wish in wishes.items() if name in self._parameters}
        arguments = taken | dict(self._spec.options) | dict(request.options)
        if arguments.get("true_cfg_scale", 2) <= 1:
            arguments.pop("negative_prompt", None)  # it would be ignored, with a warning each time
        return arguments

    # --- the trial ---

    @abstractmethod
    def _try(self) -> None:
        """Find out by calling what cannot be read off the pipeline's signature; in inference mode."""

    def _tried(self, call: Callable[[ImageRequest], list[Trial]]) -> list[Trial]:
        """Make trial calls with every picture the pipeline takes, and with none, to see whether it can do without.

        Raises `CheckpointCorrupt` when it cannot even be called with all of them.
        """
        width_px, height_px = min(self._spec.sizes, key=lambda size: size[0] * size[1])
        bare = ImageRequest(
            id="trial",
            group="trial",
            checkpoint=self._spec.name,
            prompt="a picture",
            width_px=width_px,
            height_px=height_px,
            num_steps=2,
            guidance=1.0,
            sampler=OWN_SAMPLER,
            seed=0,
        )
        grey = np.full((height_px, width_px, 3), 127, np.uint8)
        pictures: dict[str, Any] = {name: Picture(grey[..., 0] if name == "mask" else grey) for name in self._pictures}
        trials: list[Trial] = []
        if pictures:
            try:
                trials += call(bare)
            except Exception:  # noqa: BLE001  whatever it says, it does not go without
                self._needs_pictures = True
        try:
            return trials + call(replace(bare, **pictures))
        except Exception as problem:
            raise CheckpointCorrupt(INDEX, f"a trial call of {self._name} failed: {problem}") from problem

    # --- of an image ---

    @abstractmethod
    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        """Put into the image's own copy of the pipeline what will ask; in the call's own thread."""

    def clean_latents(self, image: InFlight) -> Tensor | None:
        """See the contract. None also where latents are packed, and of a sampler that the house does not know."""
        return _running(image).clean

    def decode(self, image: InFlight) -> Tensor:
        """See the contract; in float64, for pipelines give 0..1, and in less that would not survive -1..1 and back.

        A call that fails in here is over: to decode again fails too."""
        running = _running(image)
        while running.returned is None:
            self._hear(image, None if running.asked is None else self._make(running.asked))
        pictures = running.returned.value[0]
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        if not isinstance(pictures, Tensor) or pictures.shape[:-2] != (1, 3):
            raise EngineError(f"{self._name} did not give one picture")
        return pictures.double() * 2 - 1

    def fork(self, image: InFlight, latents: Tensor, recall: Recall) -> None:
        """See the contract: refused, the latents are the pipeline's own."""
        raise UnsupportedRequest("fork", f"is not for {self._name}")

    def latents(self, image: InFlight) -> Tensor:
        """See the contract: refused."""
        raise UnsupportedRequest("keep_steps", f"is not for {self._name}")

    def release(self, image: InFlight) -> None:
        """See the contract."""
        running, image.held = image.held, None
        if running is not None:
            running.coroutine.close()

    def projector(self) -> Projector | None:
        """See the contract: fitted to the VAE, where that has one scale for its latents."""
        vae = self._decoders.get("vae")
        if vae is None or "scaling_factor" not in vae.config:
            return None

        def encode(pictures: Tensor) -> Tensor:
            encoded = vae.encode(pictures, return_dict=False)[0]
            raw = encoded if isinstance(encoded, Tensor) else encoded.mode()
            latents: Tensor = (raw - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
            return latents

        return fit(
            encode,
            latent_channels=vae.config.latent_channels,
            pixels_per_latent=self._pipe.vae_scale_factor,
            device=self.device,
            dtype=self.dtype,
        )

    def _begin(self, image: InFlight, **more: Any) -> None:
        """Let the image hold its call, not begun yet, with `more` arguments than its request has."""

        def run(ask: Ask) -> Any:
            running.pipe = self._copy(image)
            self._let_ask(running.pipe, image, ask)
            return running.pipe(**self._arguments(image.request) | more)

        running = image.held = Running(Coroutine(run, name=f"pipeline {image.id}", within=self._surroundings()))

    def _surroundings(self) -> Callable[[], AbstractContextManager[None]]:
        """What must hold in the thread of a call as it does in the engine's, where this is asked."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        num_threads = torch.get_num_threads()

        @contextmanager
        def within() -> Iterator[None]:
            torch.set_num_threads(num_threads)  # a new thread has as many as the machine has cores until something asks torch
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                yield

        return within

    def _copy(self, image: InFlight) -> Any:
        """The pipeline with schedulers of this image's own; its networks are everybody's."""
        pipe = copy.copy(self._pipe)
        # Not by setattr: with it a pipeline notes a part's class and library in its config, and stand-ins are of no library.
        places = vars(pipe)
        places.update({name: part.from_config(part.config) for name, part in _schedulers(self._pipe)})
        if image.request.sampler != OWN_SAMPLER:
            places["scheduler"] = fresh_sampler(image.request.sampler, self._pipe.scheduler.config)
        places["maybe_free_model_hooks"] = lambda: None  # it resets what belongs to the neighbours on the shared networks
        _count_steps(places["scheduler"], image)
        return pipe

    def _hear(self, image: InFlight, answer: Any) -> Any:
        """Let the image's call run on until it asks or ends; what it asks."""
        running = _running(image)
        running.asked = None
        try:
            outcome = running.coroutine.resume(answer)
        except BaseException:
            for weight, dtype in self._as_loaded:  # a pipeline that casts its VAE to decode has not cast it back
                weight.data = weight.data.to(dtype)
            raise
        if isinstance(outcome, Returned):
            running.returned = outcome
            image.is_denoised = True
        elif isinstance(outcome, Call):
            running.asked = outcome
        return outcome

    def _make(self, call: Call) -> Any:
        return self._denoisers[call.network](*call.args, **call.kwargs)


class Pipeline(CalledPipeline):
    """One loaded pipeline whose denoiser calls are batched."""

    def __init__(self, pipe: Any, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(pipe, spec, dtype=dtype, device=device)
        self._forms: list[CallForm] = []
        self._rows = {False: 1, True: 1}  # by whether the image is guided

    def rows(self, request: ImageRequest) -> int:
        """See the contract: as many as the trial took."""
        return self._rows[request.is_guided]

    def start(self, image: InFlight, recall: Recall) -> None:
        """See the contract: up to the first call of a denoiser."""
        self._begin(image)
        self._go_on(image, None)
        image.num_steps = _num_steps(image)

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """See the contract. The rows are in the order of the images; what is left of the bucket is filled with the very first."""
        form = _running(images[0]).form
        calls = [cast(Call, _running(image).asked) for image in images]
        if form is None:
            return [self._make(calls[0])]
        counts = [image.rows for image in images]
        # Alone, a call is made as the pipeline made it: those are the bits of `pipe(...)`.
        call = calls[0] if counts == [bucket_rows] else form.stack(calls, counts, bucket_rows)
        return form.split(self._make(call), counts)

    def advance(self, image: InFlight, prediction: Any) -> None:
        """See the contract."""
        kept = with_tensors(prediction, lambda tensor: tensor.to("cpu", copy=True, non_blocking=True))
        self._answer(image, kept, prediction)

    def save(self, image: InFlight) -> State:
        """See the contract: all answers the call has got. Raises `UnsupportedRequest` for answers that are not plain data."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies made in `advance` were not waited for
        tensors: list[Tensor] = []
        try:
            answers = [written(answer, tensors) for answer in _running(image).answers]
        except Unlike:
            raise UnsupportedRequest("snapshot", f"{self._name} was answered with what is not plain data") from None
        return State({str(index): tensor for index, tensor in enumerate(tensors)}, {"answers": answers})

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        """See the contract: by replay, in which `image.step` counts up to where it was."""
        tensors = [state.tensors[str(index)] for index in range(len(state.tensors))]
        image.step, image.is_denoised = 0, False
        self._begin(image)
        self._go_on(image, None)
        for facts in state.facts["answers"]:
            kept = read(facts, tensors)
            self._answer(image, kept, with_tensors(kept, self._to_device))
        image.num_steps = _num_steps(image)

    def _answer(self, image: InFlight, kept: Any, answer: Any) -> None:
        """Give the call its answer, and keep a copy of it.

        What one network gives straight to another, as a control network does, is forgotten once the other has answered, but for its
        shape: whatever it was, that second answer is all that is left of it. It would be most of a snapshot's bytes.
        """
        running = _running(image)
        asked = running.asked
        if running.is_passed_on:
            running.answers[-1] = with_tensors(running.answers[-1], lambda tensor: torch.empty_like(tensor, device="meta"))
        running.answers.append(kept)
        self._go_on(image, answer)
        running.is_passed_on = False
        if asked is not None and running.asked is not None and running.asked.network != asked.network:
            arguments = {id(tensor) for tensor in tensors_of((running.asked.args, running.asked.kwargs))}
            running.is_passed_on = all(id(tensor) in arguments for tensor in tensors_of(answer))

    def _go_on(self, image: InFlight, answer: Any) -> None:
        """Let the call run to its next question, and put the image's name on that: who can share the forward?"""
        if self._hear(image, answer) == _DENOISED:
            image.is_denoised = True
        running = _running(image)
        if running.asked is not None:
            running.form, image.rows, name = self._recognised(running.asked, exactly=image.request.is_reproducible)
            image.batch_key = replace(image.batch_key, call=name or f"{running.asked.network} alone {image.id}")

    def _recognised(self, call: Call, *, exactly: bool) -> tuple[CallForm | None, int, str]:
        """A call's form, its rows and its name; calls of one name are made as one. A strange call has no form, one row, no name."""
        found: list[tuple[CallForm | None, int, str]] = []
        for form in self._forms:
            try:
                found.append((form, *form.describe(call, exactly=exactly)))
            except Unlike:
                continue
        return found[0] if len(found) == 1 else (None, 1, "")

    def _to_device(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor, device=self.device) if tensor.is_meta else tensor.to(self.device, copy=True)

    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        def about_to_decode() -> None:
            """Before the first step it is done for the picture that the image starts from."""
            if image.step and not image.is_denoised:
                ask(_DENOISED)

        places = vars(pipe)
        places.update({name: Denoiser(network, name, ask) for name, network in self._denoisers.items()})
        places.update({name: Decoder(network, about_to_decode) for name, network in self._decoders.items()})

    def _try(self) -> None:
        """How many rows an image takes, and which calls can be made as one: two steps with guidance and two without."""
        trials = self._tried(self._trials)
        self._forms = learn([(trial.of_one, trial.of_two) for trial in trials], self._make)
        strange = set()
        for trial in trials:
            for call, _ in trial.of_one:
                form, rows, _ = self._recognised(call, exactly=True)
                self._rows[trial.is_guided] = max(self._rows[trial.is_guided], rows)
                if form is None:
                    strange.add(call.network)
        if strange:
            log.warning("calls_not_batched", extra={"checkpoint": self._spec.name, "networks": sorted(strange)})

    def _trials(self, request: ImageRequest) -> list[Trial]:
        """All calls for one image and for two, without guidance, and with it where the pipeline knows of any."""
        can_double = "num_images_per_prompt" in self._parameters
        trials = []
        for guidance in (1.0,) if self._guidance is None else (1.0, 2.0):
            guided = replace(request, guidance=guidance)
            of_two = self._recorded(guided, num_images_per_prompt=2) if can_double else []
            trials.append(Trial(guided.is_guided, self._recorded(guided), of_two))
        return trials

    def _recorded(self, request: ImageRequest, **more: Any) -> Run:
        """Every call that a pipeline makes up to its decode, with what the networks give."""
        image = _in_trial(request)
        self._begin(image, **more)
        running = _running(image)
        run = []
        try:
            self._hear(image, None)
            while running.asked is not None:
                run.append((running.asked, self._make(running.asked)))
                self._hear(image, run[-1][1])
        finally:
            self.release(image)
        return run


class PlainPipeline(CalledPipeline):
    """One loaded pipeline whose calls run whole, each alone, in turns of a step."""

    def start(self, image: InFlight, recall: Recall) -> None:
        """See the contract: up to where the pipeline sets its timesteps; most have encoded by then."""
        self._begin(image)
        image.batch_key = replace(image.batch_key, call=f"alone {image.id}")
        self._take_turn(image)

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """See the contract: nothing, for the pipeline calls its own denoiser in `advance`."""
        return [None for _ in images]

    def advance(self, image: InFlight, prediction: Any) -> None:
        """See the contract: forward and step."""
        self._take_turn(image)

    def save(self, image: InFlight) -> State:
        """See the contract: refused, what the call holds cannot be seen."""
        raise UnsupportedRequest("snapshot", f"is not for {self._name} in family plain")

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        """See the contract: refused."""
        raise UnsupportedRequest("snapshot", f"is not for {self._name} in family plain")

    def _try(self) -> None:
        """One step. Raises `UnsupportedRequest` for adapters, which nobody could lay over forwards that are not the engine's."""
        if self._spec.adapters:
            raise UnsupportedRequest("adapters", "are not for family plain")
        self._tried(self._one_step)

    def _one_step(self, request: ImageRequest) -> list[Trial]:
        image = _in_trial(request)
        self._begin(image)
        try:
            while not image.step and not image.is_denoised:
                self._take_turn(image)
        finally:
            self.release(image)
        return []

    def _take_turn(self, image: InFlight) -> None:
        self._hear(image, None)
        image.num_steps = _num_steps(image)
        image.is_denoised = image.is_denoised or image.step >= image.num_steps

    def _let_ask(self, pipe: Any, image: InFlight, ask: Ask) -> None:
        def then_ask(_sampler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            ask(None)
            return result

        for name in ("set_timesteps", "step"):
            lay_over(pipe.scheduler, name, then_ask)


@dataclass(frozen=True)
class Trial:
    """What calls a request makes, for one image and for two."""

    is_guided: bool
    of_one: Run
    of_two: Run


_DENOISED = "denoised"  # not a question: the call is about to decode


def _running(image: InFlight) -> Running:
    assert image.held is not None, f"image {image.id} is {image.state} and holds no call"
    return cast(Running, image.held)


def _in_trial(request: ImageRequest) -> InFlight:
    return InFlight(request, BatchKey(request.checkpoint, request.height_px, request.width_px, 0), rows=1)


def _num_steps(image: InFlight) -> int:
    """How often the image's call steps its scheduler. Most pipelines say so; all set timesteps before they denoise."""
    pipe = _running(image).pipe
    return int(getattr(pipe, "_num_timesteps", 0) or len(pipe.scheduler.timesteps))


def _count_steps(sampler: Any, image: InFlight) -> None:
    """Count every step of the image's own sampler, and keep the clean latents for who watches."""
    parameters = inspect.signature(sampler.step)

    def step(sampler: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        is_seen = image.is_watched and given["sample"].ndim == 4  # others are packed, and only their pipeline knows how
        clean = clean_latents(sampler, given["sample"], given["model_output"], given["timestep"]) if is_seen else None
        result = method(*args, **kwargs)
        _running(image).clean = clean
        image.step += 1
        return result

    lay_over(sampler, "step", step)


def _schedulers(pipe: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in pipe.components.items() if isinstance(part, SchedulerMixin)]


def _samplers_for(own: Any) -> dict[str, Recipe]:
    """The checkpoint's own sampler, and by their names those of the house that its config is good for."""
    own_class = type(own).__name__
    is_flow = "FlowMatch" in own_class or own.config.get("prediction_type") == "flow_prediction"
    fitting = {own_class, *(kind.__name__ for kind in own.compatibles)}
    named = {name: recipe for name, recipe in (FLOW_SAMPLERS if is_flow else SAMPLERS).items() if recipe.scheduler_class in fitting}
    is_distilled = any(recipe.is_distilled for recipe in named.values() if recipe.scheduler_class == own_class)
    return {OWN_SAMPLER: Recipe(own_class, is_distilled=is_distilled)} | named


def _picture_parameters(parameters: Mapping[str, inspect.Parameter], *, is_controlled: bool) -> dict[str, str]:
    """Which argument takes which picture of a request. Where a control network has only `image`, it follows that."""
    pictures = {"init_image": "image", "mask": "mask_image", "control_image": "control_image"}
    if is_controlled and "control_image" not in parameters:
        pictures = {"control_image": "image"}
    return {name: parameter for name, parameter in pictures.items() if parameter in parameters}


def _guidance_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The argument that is classifier-free guidance, or what a distilled network takes in its stead.

    Where `guidance_scale` has no default, as in Qwen-Image, it is for distilled networks to come, and `true_cfg_scale` guides."""
    scale = parameters.get("guidance_scale")
    if scale is not None and scale.default is not None:
        return "guidance_scale"
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in parameters), None)


# --- the folder ---------------------------------------------------------------------------------------------------------------------


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt(INDEX, str(problem)) from problem
    if not isinstance(index, dict):
        raise CheckpointCorrupt(INDEX, "is no object")
    return index


def _components(index: Mapping[str, Any]) -> dict[str, Any]:
    """The class of every part that is read, by the name of its folder. Raises `CheckpointCorrupt` for one from elsewhere."""
    components = {}
    for name, place in index.items():
        if name.startswith("_") or name == NOT_LOADED or not isinstance(place, list) or place == [None, None]:
            continue
        library, kind = map(str, place) if len(place) == 2 else ("", "")
        found = getattr(LIBRARIES.get(library), kind, None)
        if not isinstance(found, type):
            raise CheckpointCorrupt(INDEX, f"{name} is {place}, which is no class of {' or '.join(LIBRARIES)}")
        components[name] = found
    return components


def _pipeline_class(name: Any) -> Any:
    found: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        raise UnsupportedRequest("pipeline_class", f"{name!r} is no pipeline of diffusers {diffusers.__version__}")
    if getattr(found, "_load_connected_pipes", False):
        raise UnsupportedRequest("pipeline_class", f"{name} is a cascade of pipelines")
    return found
