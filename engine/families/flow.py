"""The parts that SD3 and FLUX share.

Both have a transformer that predicts a flow's velocity, latents that the VAE shifts, and
a T5 text encoder.

The denoiser, its text rows and the shift of its noise levels are each family's own. Random numbers
are drawn in the order of the diffusers pipelines: the posterior of the init image, the noise, the
posterior of the masked image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import Tensor, nn
from torch.nn.functional import interpolate

from engine.capabilities import Capabilities, Need, NegativePrompt
from engine.config import CheckpointSpec
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.inpainting import mask_tensor, picture_tensor
from engine.families.latent import (
    Beginning,
    LatentFamily,
    begin_at,
    load_network,
    load_sampler_config,
    load_tokenizer,
)
from engine.folders import part_names
from engine.inflight import InFlight
from engine.request import ImageRequest, Option
from engine.samplers import FLOW_SAMPLERS, Recipe, add_noise, fresh_sampler, sampler_limits
from engine.tensors import Rows, Sampler
from engine.transfers import to_device

LATENTS_PER_TOKEN = 2  # along each side: both transformers take patches of 2x2 latents
MOST_TEXT_TOKENS = 512  # of T5, in both pipelines


class FlowFamily(LatentFamily):
    """One loaded checkpoint of SD3 or FLUX."""

    NAME: ClassVar[str]  # of the family
    # The classes of the transformer and the text encoders, by folder.
    NETWORKS: ClassVar[Mapping[str, Any]]
    TOKENIZERS: ClassVar[Mapping[str, Any]]
    TEXT_TOKENS: ClassVar[int]  # of T5, unless a request says otherwise
    MAX_SHIFT: ClassVar[float]  # of a scheduler config that names none

    def __init__(
        self,
        *,
        networks: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        vae: Any,
        sampler_config: dict[str, Any],
        device: torch.device,
        options: Mapping[str, Option],
    ) -> None:
        self._options = options
        self._networks = networks
        self._tokenizers = tokenizers
        self._transformer = networks["transformer"]
        self._vae = vae
        self._sampler_config = sampler_config
        self.device = device
        self.dtype = self._transformer.dtype
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        return part_names(cls.NAME, path)

    @classmethod
    def load(cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> Self:
        path = Path(spec.path)
        present = cls.folders(path)
        family = cls(
            networks={
                folder: load_network(network_class, path, folder, dtype, device, spec.quantize)
                for folder, network_class in cls.NETWORKS.items()
                if folder in present
            },
            tokenizers={
                folder: load_tokenizer(tokenizer_class, path, folder)
                for folder, tokenizer_class in cls.TOKENIZERS.items()
                if folder in present
            },
            vae=load_network(AutoencoderKL, path, "vae", dtype, device),
            sampler_config=_load_flow_config(path),
            device=device,
            options=spec.options,
        )
        family.check_options(spec.options)
        return family

    def networks(self) -> Mapping[str, nn.Module]:
        return self._networks

    def facts(self) -> dict[str, Any]:
        text_encoders = [
            network for folder, network in self._networks.items() if folder != "transformer"
        ]
        processors = self._transformer.attn_processors.values()
        return {
            "attention": sorted({type(processor).__name__ for processor in processors}),
            "attention_backend": DIFFUSERS_ATTN_BACKEND,  # what those dispatch to
            "text_attention": [
                str(getattr(encoder.config, "_attn_implementation", None))
                for encoder in text_encoders
            ],
            "vae_tiling": bool(getattr(self._vae, "use_tiling", False)),
            "vae_slicing": bool(getattr(self._vae, "use_slicing", False)),
            **({"options": dict(self._options)} if self._options else {}),
        }

    # --- of a request ---

    def option_names(self) -> frozenset[str]:
        return frozenset({"max_sequence_length"})

    def describe(self) -> Capabilities:
        return Capabilities(
            family=self.NAME,
            side_multiple_px=self.pixels_per_latent * LATENTS_PER_TOKEN,
            pictures={
                "init_image": Need.OPTIONAL,
                "mask": Need.OPTIONAL,
                "control_image": Need.NONE,
            },
            samplers=sampler_limits(self._sampler_config, self._fitting_samplers()),
            rounds_steps_up=True,
            negative_prompt=NegativePrompt.GUIDED,
            rows_guided=2,
            prompt_tokens=self.prompt_tokens(),
        )

    def _fitting_samplers(self) -> dict[str, Recipe]:
        """Leave out those that cannot be told a shift which the checkpoint does not ask for."""
        config = self._sampler_config
        shifts_by_mu = (
            config.get("use_dynamic_shifting", False)
            and config.get("time_shift_type", "exponential") == "exponential"
        )
        has_idle_mu = self.is_told_mu(config) and not shifts_by_mu
        return {
            name: recipe
            for name, recipe in FLOW_SAMPLERS.items()
            if not (recipe.refuses_idle_mu and has_idle_mu)
        }

    def check(self, request: ImageRequest) -> None:
        super().check(request)
        if _skipped_steps(request) == request.num_steps:
            raise UnsupportedRequest(
                "strength", f"{request.noise_share} leaves none of {request.num_steps} steps"
            )

    def check_options(self, options: Mapping[str, Option]) -> None:
        super().check_options(options)
        length = options.get("max_sequence_length", self.TEXT_TOKENS)
        if type(length) is not int or not 1 <= length <= MOST_TEXT_TOKENS:
            raise UnsupportedRequest(
                "options",
                f"max_sequence_length {length!r} is not an integer within 1..{MOST_TEXT_TOKENS}",
            )

    def rows(self, request: ImageRequest) -> int:
        return 2 if request.is_guided else 1

    def option(self, request: ImageRequest | None, name: str, default: Option) -> Option:
        """Return an option: the request's, or else the checkpoint's own, or else the default."""
        own = self._options.get(name, default)
        return own if request is None else request.options.get(name, own)

    def text_tokens(self, request: ImageRequest | None = None) -> int:
        """Give the padded length of the T5 rows: `max_sequence_length` of the pipelines."""
        return int(self.option(request, "max_sequence_length", self.TEXT_TOKENS))

    # --- noise levels ---

    @abstractmethod
    def is_told_mu(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the pipeline passes `mu` to a scheduler of this config."""

    @abstractmethod
    def set_timesteps(self, sampler: Any, num_steps: int, more: dict[str, Any]) -> None:
        """Set the sampler's timesteps on the CPU.

        more: arguments besides the family's own.
        """

    def sampler(self, request: ImageRequest) -> Sampler:
        """Make a sampler that is told where it begins.

        Else it would look for its first timestep, which may be there twice.
        """
        sampler: Any = fresh_sampler(request.sampler, self._sampler_config)
        more = {"mu": self._mu(request, sampler.config)} if self.is_told_mu(sampler.config) else {}
        self.set_timesteps(sampler, request.num_steps, more)
        begin_at(sampler, _skipped_steps(request))
        fresh: Sampler = sampler
        return fresh

    def _mu(self, request: ImageRequest, config: Mapping[str, Any]) -> float:
        """Give the shift of the noise levels: larger images need more noise to be hidden.

        `calculate_shift` of the pipelines.
        """
        pixels_per_token = self.pixels_per_latent * LATENTS_PER_TOKEN
        tokens = (request.height_px // pixels_per_token) * (request.width_px // pixels_per_token)
        base_tokens = config.get("base_image_seq_len", 256)
        max_tokens = config.get("max_image_seq_len", 4096)
        base_shift = config.get("base_shift", 0.5)
        max_shift = config.get("max_shift", self.MAX_SHIFT)
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        offset = base_shift - slope * base_tokens
        return float(tokens * slope + offset)

    # --- latents ---

    def pack(self, latents: Tensor) -> Tensor:
        """Turn latents [1, c, h, w] into the form that an image keeps and the sampler steps.

        For SD3 that is the same.
        """
        return latents

    def begin(self, request: ImageRequest, sampler: Any, generator: torch.Generator) -> Beginning:
        """Draw in the checkpoint's dtype, as `pipe(...)` does: another dtype is another noise."""
        timesteps = sampler.timesteps[_skipped_steps(request) :]
        if request.init_image is None:
            return Beginning(self.pack(self.draw_noise(request, generator)), timesteps)
        picture = picture_tensor(request.init_image, self.dtype, self.device)
        clean = self.encode_picture(picture, generator)
        noise = self.draw_noise(request, generator)
        latents = self.pack(add_noise(sampler, clean, noise, timesteps[0]))
        if request.mask is None:
            return Beginning(latents, timesteps)
        mask = to_device(mask_tensor(request.mask), self.device, self.dtype)
        return Beginning(
            latents, timesteps, self.remember_mask(mask, picture, clean, noise, generator)
        )

    def encode_picture(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the latents [1, c, h, w] of a picture [1, 3, H, W] in -1..1 from the VAE's
        posterior.
        """
        drawn = self.draw_posterior(picture, generator)
        latents: Tensor = (drawn - self._vae.config.shift_factor) * self._vae.config.scaling_factor
        return latents

    def remember_mask(
        self,
        mask: Tensor,
        picture: Tensor,
        clean: Tensor,
        noise: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Tell what repainting needs at every step, for `Tensors.extras`.

        mask: [1, 1, H, W], 1 where it is repainted.  picture: [1, 3, H, W].  clean, noise: [1, c,
        h, w].
        """
        # The pipelines also encode the masked picture and draw from its posterior, though only
        # networks that take it as context need it. The same draw is made here.
        torch.randn(clean.shape, generator=generator, dtype=self.dtype)
        latent_mask = interpolate(mask, size=clean.shape[-2:])
        return {
            "mask": self.pack(latent_mask.expand_as(clean)),
            "clean": self.pack(clean),
            "noise": self.pack(noise),
        }

    def repaint(self, image: InFlight) -> None:
        """Lay the init image outside the mask, under the noise of the step that comes next."""
        tensors = image.tensors
        if "mask" not in tensors.extras:
            return
        kept = tensors.extras["clean"]
        mask = tensors.extras["mask"]
        if image.step < image.num_steps - 1:
            timestep = tensors.timesteps[image.step + 1]
            kept = add_noise(tensors.sampler, kept, tensors.extras["noise"], timestep)
        tensors.latents = (1 - mask) * kept + mask * tensors.latents

    def decode(self, image: InFlight) -> Tensor:
        """Decode with the shift undone, always.

        The `StableDiffusion3InpaintPipeline` of diffusers 0.42 forgets to.
        """
        latents = self.picture_latents(image, image.tensors.latents)
        latents = latents / self._vae.config.scaling_factor + self._vae.config.shift_factor
        pixels: Tensor = self._vae.decode(latents, return_dict=False)[0]
        return pixels

    # --- text ---

    def tokenize(self, tokenizer: str, text: str, length: int) -> Tensor:
        """Return token ids [1, length] on the device, padded or cut to `length`."""
        tokens = self._tokenizers[tokenizer](
            text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return to_device(tokens.input_ids, self.device)

    def encode_t5(self, number: int, text: str, length: int) -> Rows:
        """Encode one text alone by the T5 encoder of this number: {"text": [1, length, width]}.

        Padding is attended to.
        """
        hidden: Tensor = self._networks[f"text_encoder_{number}"](
            self.tokenize(f"tokenizer_{number}", text, length)
        )[0]
        return {"text": hidden.to(self.dtype)}


def _skipped_steps(request: ImageRequest) -> int:
    """Tell how many of the first steps an init image makes needless.

    `get_timesteps` of the pipelines.
    """
    return int(
        max(request.num_steps - min(request.num_steps * request.noise_share, request.num_steps), 0)
    )


def _load_flow_config(path: Path) -> dict[str, Any]:
    """Give the checkpoint's scheduler config.

    Raises `CheckpointCorrupt` for one that is not of a flow, or that no sampler can be made of.
    """
    file = "scheduler/scheduler_config.json"
    config = load_sampler_config(path)
    scheduler_class = str(config.get("_class_name"))
    if not scheduler_class.startswith("FlowMatch"):
        raise CheckpointCorrupt(file, f"names {scheduler_class}, which does not sample a flow")
    try:
        fresh_sampler("flow_euler", config)
    except (ImportError, TypeError, ValueError) as problem:
        raise CheckpointCorrupt(file, str(problem)) from problem
    return config
