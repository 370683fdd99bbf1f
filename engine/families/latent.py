"""The parts that native families share: latents, one sampler per image, rows in one forward.

A native family says how its checkpoint is loaded and its prompts encoded, what its denoiser is fed
and how latents become pixels; the life of an image between those is here. Each follows its
diffusers pipeline bit for bit, the order of its random draws included.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from engine.capabilities import Capabilities
from engine.errors import CheckpointCorrupt, PackageMissing, UnsupportedRequest
from engine.families.contract import Recall, State
from engine.families.inpainting import check_pixels
from engine.folders import check_weights, variant_of
from engine.inflight import InFlight
from engine.previews import Projector, clean_latents, fit
from engine.quantisation import quantise
from engine.request import Fork, ImageRequest, Option
from engine.samplers import sampler_step
from engine.samplerstate import load_generator, load_sampler, save_generator, save_sampler
from engine.tensors import Rows, Sampler, Tensors
from engine.texts import ReadTexts, count, cut_off, ignored, room
from engine.transfers import to_device

# How diffusers and transformers tell of a package that they lack.
_REQUIRES = re.compile(r"requires the (?P<package>[\w.-]+) library", re.IGNORECASE)
PUBLISHED_VAE = (128, 256, 512, 512)  # channels by level of every family's own VAE


@dataclass(frozen=True)
class Beginning:
    """The start of an image.

    It has its latents, the timesteps before it, and what it needs again at every step.
    """

    latents: Tensor  # [1, ...] on the device
    timesteps: Tensor  # [num_steps], on the CPU
    extras: dict[str, Tensor] = field(default_factory=dict)


class LatentFamily(ABC):
    """One loaded checkpoint of a native family."""

    pixels_per_latent: int
    follows_stream = True
    published: Projector | None = None  # what previews the latents of the family's own VAE
    _vae: Any
    device: torch.device
    dtype: torch.dtype
    # `denoise` recorded, where the checkpoint asks for CUDA graphs.
    graphs: Callable[[Rows], Tensor] | None = None

    # --- what a family says ---

    @abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """Give the networks an adapter can lie over, by the names of their folders."""

    @abstractmethod
    def rows(self, request: ImageRequest) -> int:
        """Tell how many rows of a forward the image takes."""

    @abstractmethod
    def describe(self) -> Capabilities:
        """Tell what may be asked of this checkpoint."""

    @abstractmethod
    def readers(self, request: ImageRequest | None = None) -> Mapping[str, tuple[Any, int]]:
        """Return the tokenizer of each text encoder that reads the whole text, by its folder.

        With it comes the length to which it pads and cuts; without a request, the usual one.
        """

    @abstractmethod
    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Turn the prompts into conditioning rows, each tensor [rows(request), ...]."""

    @abstractmethod
    def sampler(self, request: ImageRequest) -> Sampler:
        """Make a fresh sampler for this image alone, with its timesteps set.

        They are on the CPU: reading them never waits for a device.
        """

    @abstractmethod
    def begin(
        self, request: ImageRequest, sampler: Sampler, generator: torch.Generator
    ) -> Beginning:
        """Draw the initial noise, around the init image where there is one.

        The order of the draws is that of its pipeline.
        """

    @abstractmethod
    def inputs(self, image: InFlight) -> Rows:
        """Give the rows of the image's next forward; the image is left untouched."""

    @abstractmethod
    def denoise(self, rows: Rows) -> Tensor:
        """Predict all rows in one forward: [b, ...]. Row i of the result depends on row i alone."""

    @abstractmethod
    def decode(self, image: InFlight) -> Tensor:
        """Give the pixels of a denoised image, [1, 3, h, w], nominally in -1..1."""

    @abstractmethod
    def encode_picture(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the clean latents [n, c, h/8, w/8] of pixels [n, 3, h, w] from the VAE's posterior.

        The pixels are in -1..1.
        """

    def draw_noise(self, request: ImageRequest, generator: torch.Generator) -> Tensor:
        """Draw unit noise, [1, c, h/8, w/8], in the checkpoint's dtype, as `pipe(...)` does.

        Another dtype would give other noise.
        """
        side = self.pixels_per_latent
        shape = (1, self.latent_channels, request.height_px // side, request.width_px // side)
        return to_device(torch.randn(shape, generator=generator, dtype=self.dtype), self.device)

    def draw_posterior(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Draw what the VAE makes of a picture on the device, as `latent_dist.sample` does."""
        posterior: Any = self._vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=posterior.mean.dtype)
        drawn: Tensor = posterior.mean + posterior.std * to_device(noise, self.device)
        return drawn

    def guide(self, image: InFlight, prediction: Tensor) -> Tensor:
        """Apply classifier-free guidance: [rows, ...] in the order uncond, cond to [1, ...]."""
        if image.rows == 1:
            return prediction
        uncond, cond = prediction.chunk(2)
        return uncond + image.request.guidance * (cond - uncond)

    def repaint(self, image: InFlight) -> None:  # noqa: B027 - nothing to put back without a mask
        """Put back what inpainting must not change; called after a sampler step.

        `image.step` has not been counted yet.
        """

    def picture_latents(self, image: InFlight, latents: Tensor) -> Tensor:
        """Turn latents as the denoiser takes them into [1, c, h, w]; for most families the same."""
        return latents

    # --- what all of them do ---

    def modules(self) -> Sequence[nn.Module]:
        """Return every network whose weights are on the device, each once."""
        parts = [*self.networks().values(), *vars(self).values()]
        return list(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))

    @property
    def decoder(self) -> nn.Module:
        """Return the part of the VAE that makes pixels of latents."""
        decoder: nn.Module = self._vae.decoder
        return decoder

    @cached_property
    def capabilities(self) -> Capabilities:
        return self.describe()

    def check(self, request: ImageRequest) -> None:
        self.capabilities.check(request)
        self.check_options(request.options)
        check_pixels(request)
        _check_latents_kept(request)

    def option_names(self) -> frozenset[str]:
        """Tell what options may be named."""
        return frozenset()

    def check_options(self, options: Mapping[str, Option]) -> None:
        """Raise `UnsupportedRequest` for options that the family does not take."""
        if unknown := sorted(set(options) - self.option_names()):
            raise UnsupportedRequest(
                "options",
                f"{', '.join(unknown)}: not taken here; "
                f"taken: {', '.join(sorted(self.option_names())) or 'none'}",
            )

    def prompt_tokens(self) -> dict[str, int]:
        """Give the tokens of a text that each encoder reads, without those that frame it."""
        return {name: room(*reader) for name, reader in self.readers().items()}

    def read_texts(self, request: ImageRequest) -> ReadTexts:
        """Tell what is read: without a second row no negative prompt has an effect."""
        readers = list(self.readers(request).values())
        prompt = count(request.prompt, readers)
        found = [cut_off("prompt", prompt)]
        if negative := request.negative_prompt.strip() and request.negative_prompt:
            if self.rows(request) > 1:
                found.append(cut_off("negative_prompt", count(negative, readers)))
            else:
                found.append(ignored("negative_prompt", negative, readers))
        return ReadTexts(prompt=prompt, unread=tuple(text for text in found if text is not None))

    def start(self, image: InFlight, recall: Recall) -> None:
        conditioning = self.encode(image.request, recall)
        generator = torch.Generator("cpu").manual_seed(image.request.seed)
        sampler = self.sampler(image.request)
        beginning = self.begin(image.request, sampler, generator)
        image.num_steps = len(beginning.timesteps)
        image.held = Tensors(
            sampler=sampler,
            timesteps=beginning.timesteps,
            conditioning=conditioning,
            latents=beginning.latents,
            generator=generator,
            extras=beginning.extras,
        )

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """Run one forward; each part is [image.rows, ...]."""
        rows = stack_rows([self.inputs(image) for image in images], bucket_rows, self.device)
        is_plain = not any(image.request.adapters or image.skips_blocks for image in images)
        prediction = (
            self.graphs(rows) if self.graphs is not None and is_plain else self.denoise(rows)
        )
        used_rows = sum(image.rows for image in images)
        # In one layout, whatever layout the weights have: latents would inherit that, but a
        # restored image is contiguous.
        return list(
            torch.split(prediction[:used_rows].contiguous(), [image.rows for image in images])
        )

    def advance(self, image: InFlight, prediction: Any) -> None:
        # No isfinite() here: it would stall the device at every step; decoding checks.
        tensors = image.tensors
        guided = self.guide(image, prediction)
        timestep = tensors.timesteps[image.step]
        tensors.clean = (
            clean_latents(tensors.sampler, tensors.latents, guided, timestep)
            if image.is_watched
            else None
        )
        tensors.latents = sampler_step(
            tensors.sampler, guided, timestep, tensors.latents, tensors.generator
        )
        self.repaint(image)
        image.count_step()

    def clean_latents(self, image: InFlight) -> Tensor | None:
        clean = image.tensors.clean
        return None if clean is None else self.picture_latents(image, clean)

    @property
    def latent_channels(self) -> int:
        """Return the number of channels of latents as `encode_picture` gives them."""
        return int(self._vae.config.latent_channels)

    def projector(self) -> Projector:
        """Give the family's published table, or one fitted to this VAE.

        Published ones are for VAEs with the published one's layers.
        """
        if (
            self.published is not None
            and tuple(self._vae.config.block_out_channels) == PUBLISHED_VAE
        ):
            return self.published
        generator = torch.Generator("cpu").manual_seed(0)
        return fit(
            lambda pictures: self.encode_picture(pictures, generator),
            latent_channels=self.latent_channels,
            pixels_per_latent=self.pixels_per_latent,
            device=self.device,
            dtype=self.dtype,
        )

    def save(self, image: InFlight) -> State:
        """Copy all but the conditioning.

        It is larger than all the rest, and encoding again gives the same bits.
        """
        tensors = image.tensors
        sampler_tensors, sampler_facts = save_sampler(tensors.sampler)
        saved = {"latents": tensors.latents, "generator": save_generator(tensors.generator)}
        saved |= {f"extras.{name}": tensor for name, tensor in tensors.extras.items()}
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in saved.items()
        }
        facts = {"sampler": sampler_facts, "num_steps": image.num_steps}
        return State(
            copies | {f"sampler.{name}": tensor for name, tensor in sampler_tensors.items()}, facts
        )

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        conditioning = self.encode(image.request, recall)
        sampler = self.sampler(image.request)
        load_sampler(
            sampler, _under("sampler.", state.tensors), state.facts["sampler"], self.device
        )
        image.num_steps = state.facts["num_steps"]
        image.is_denoised = image.step >= image.num_steps
        image.held = Tensors(
            sampler=sampler,
            timesteps=sampler.timesteps[-image.num_steps :],
            conditioning=conditioning,
            latents=to_device(state.tensors["latents"], self.device),
            generator=load_generator(state.tensors["generator"]),
            extras={
                name: to_device(tensor, self.device)
                for name, tensor in _under("extras.", state.tensors).items()
            },
        )

    def fork(self, image: InFlight, latents: Tensor, recall: Recall) -> None:
        """Go on from latents of another image.

        A multi-step sampler starts its order again: it has no earlier predictions for the new
        prompt.
        """
        step = image.step
        self.start(image, recall)
        image.step = step
        begin_at(
            image.tensors.sampler, len(image.tensors.sampler.timesteps) - image.num_steps + step
        )
        dtype = image.tensors.latents.dtype
        image.tensors.latents = to_device(latents.clone(), self.device, dtype)

    def latents(self, image: InFlight) -> Tensor:
        return image.tensors.latents

    def release(self, image: InFlight) -> None:
        image.held = None


def begin_at(sampler: Any, index: int) -> None:
    """Tell a sampler that it starts in the middle of its timesteps.

    A memoryless one needs not know.
    """
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(index)


def stack_rows(parts: Sequence[Rows], bucket_rows: int, device: torch.device) -> Rows:
    """Concatenate the rows of several images, pad with zeros to `bucket_rows`, move to the device.

    Zeros are cheap and stay finite in every network here: normalisations carry an epsilon, and
    attention over equal keys is uniform. Rows never mix, so the padding's results are dropped. The
    result is contiguous whatever the parts are: a convolution over another memory layout adds in
    another order, and one part's layout would decide for its neighbours.
    """
    stacked: Rows = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        padding = bucket_rows - sum(len(tensor) for tensor in tensors)
        if padding > 0:
            tensors.append(first.new_zeros((padding, *first.shape[1:])))
        together = torch.cat(tensors).contiguous()
        stacked[name] = to_device(together, device)
    return stacked


def _check_latents_kept(request: ImageRequest) -> None:
    """Raise `UnsupportedRequest` for latents that cannot be kept, or started from."""
    if request.keep_steps and request.init_image is not None:
        raise UnsupportedRequest(
            "keep_steps", "an image that starts from a picture cannot be forked"
        )
    if request.fork is not None:
        _check_fork(request.fork, request)


def _check_fork(fork: Fork, request: ImageRequest) -> None:
    if request.init_image is not None:
        raise UnsupportedRequest(
            "fork", "starts from kept latents: give it or an init_image, not both"
        )
    if not 0 < fork.step < request.num_steps:
        raise UnsupportedRequest(
            "fork", f"step {fork.step} is not within 1..{request.num_steps - 1}"
        )


def load_network(
    network_class: Any,
    path: Path,
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
) -> Any:
    """Read one network of diffusers or transformers, frozen, in eval mode, and quantised if asked.

    Raises `CheckpointCorrupt` rather than fill a missing tensor by chance. The weights become ours
    alone: safetensors maps the file, and a file rewritten in place would change running weights.
    """
    check_weights(path, folder)
    options = _loading_options(network_class, dtype)
    if quantize is None and _goes_straight_to(device):
        options["device_map"] = {"": device}  # tensor by tensor: the host holds no second copy
    options["variant"] = variant_of(path / folder)
    network = _read_whole(network_class, path, folder, options)
    network.requires_grad_(False)
    network.eval()
    quantise(network, folder, quantize)  # before the move, which then takes less memory
    network.to(device)
    if device.type == "cpu":  # moved to a GPU they are ours already
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.data = tensor.data.clone()
    return network


def _goes_straight_to(device: torch.device) -> bool:
    """Tell whether weights are read straight into the memory of this device.

    Not beside a working engine: threads of the library would copy in the stream that the forwards
    run in.
    """
    if device.type != "cuda" or not is_accelerate_available():
        return False
    cuda: Any = torch.cuda
    return bool(cuda.current_stream(device) == cuda.default_stream(device))


def _read_whole(network_class: Any, path: Path, folder: str, options: Mapping[str, Any]) -> Any:
    """Read a network of which no tensor is missing. Raises `CheckpointCorrupt`."""
    try:
        network, info = network_class.from_pretrained(str(path / folder), **options)
    except Exception as problem:
        raise not_loadable(folder, "cannot be read", problem) from problem
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing or info.get("error_msgs"):
        raise CheckpointCorrupt(folder, f"lacks {len(missing)} tensors, such as {missing[:3]}")
    return network


def _loading_options(network_class: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` is told: the two libraries name the dtype differently."""
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if network_class.__module__.startswith("transformers"):
        return options | {"dtype": dtype}
    return options | {"torch_dtype": dtype, "low_cpu_mem_usage": is_accelerate_available()}


def not_loadable(file: str, reason: str, problem: Exception) -> CheckpointCorrupt | PackageMissing:
    """Return what to raise for a problem of a library with a part of a checkpoint.

    Either a package is missing, or the part is not sound.
    """
    package = _missing_package(problem)
    if package:
        return PackageMissing(file, package)
    return CheckpointCorrupt(file, f"{reason}: {problem}")


def _missing_package(problem: BaseException) -> str:
    """Name the package whose absence a problem tells of; "" for any other problem."""
    if isinstance(problem, ModuleNotFoundError):
        return (problem.name or "").partition(".")[0]
    if isinstance(problem, ImportError):
        told = _REQUIRES.search(str(problem))
        return told["package"].lower() if told else " ".join(str(problem).split())
    cause = problem.__cause__ or problem.__context__
    return _missing_package(cause) if cause is not None else ""


def load_tokenizer(tokenizer_class: Any, path: Path, folder: str) -> Any:
    """Read one tokenizer. Raises `CheckpointCorrupt`."""
    try:
        return tokenizer_class.from_pretrained(str(path / folder), local_files_only=True)
    except Exception as problem:
        raise not_loadable(folder, "cannot be read", problem) from problem


def load_sampler_config(path: Path) -> dict[str, Any]:
    """Give the checkpoint's own scheduler config. Raises `CheckpointCorrupt`."""
    file = path / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt("scheduler/scheduler_config.json", str(problem)) from problem
    return config


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
