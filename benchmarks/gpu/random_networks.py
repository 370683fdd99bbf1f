"""Families of the engine whose networks are drawn at random where they run, instead of being read.

Only `folders` and `load` differ from the families they build on. Networks drawn for one checkpoint
are kept until others are drawn, so that the plain pipeline and an engine hold one copy; who changes
them in place (layout, compilation) calls `forget` before and after.
"""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks.gpu.checkpoints import FILE, FOLDER
from engine.config import CheckpointSpec
from engine.families.flow import FlowFamily
from engine.families.flux import Flux
from engine.families.sd import StableDiffusion
from engine.families.sd3 import StableDiffusion3
from engine.families.sdxl import StableDiffusionXL, takes_tf32, upcast
from engine.quantisation import quantise
from engine.request import ImageRequest

CLIP_TOKENS = 77
# Of 512 tokens; the others are words.
START = 510
END = 511
# Of a pipeline that is called with embeddings.
_NO_TEXT: dict[str, Any] = dict.fromkeys(
    ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
)


class Words:
    """Stands for a tokenizer: a token for each word, by its checksum; nothing has to be read."""

    model_max_length = CLIP_TOKENS

    def num_special_tokens_to_add(self) -> int:
        """Count START and END."""
        return 2

    def __call__(
        self, text: str, *, max_length: int | None = None, **_as_always: Any
    ) -> SimpleNamespace:
        """Return `.input_ids` and `.attention_mask`, each [1, max_length]: padded or cut.

        Without `max_length` the ids of the words alone.
        """
        words = [zlib.crc32(word.encode()) % START for word in text.split()]
        if max_length is None:
            return SimpleNamespace(input_ids=words)
        words = words[: max_length - 2]
        ids = [START, *words] + [END] * (max_length - 1 - len(words))
        mask = [1] * (len(words) + 2) + [0] * (max_length - 2 - len(words))
        return SimpleNamespace(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]))


def forget() -> None:
    """Let go of the networks drawn last."""
    _drawn.cache_clear()


@lru_cache(maxsize=1)
def _drawn(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    how: str | None,
    classes: tuple[tuple[str, Any], ...],
) -> tuple[dict[str, Any], Any]:
    """Draw the networks of a checkpoint, frozen and in eval mode; with its scheduler config.

    By name. The same path, the same weights.  how: they are quantised.
    """
    told = json.loads((Path(path) / FOLDER / FILE).read_text(encoding="utf-8"))
    configs = told["networks"]
    torch.manual_seed(told["seed"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            networks = {
                name: _made(network_class, configs[name]) for name, network_class in classes
            }
    finally:
        torch.set_default_dtype(before)
    frozen = {name: network.requires_grad_(False).eval() for name, network in networks.items()}
    for name, network in frozen.items():
        quantise(network, name, how)
    return frozen, configs["scheduler"]


def _made(network_class: Any, config: dict[str, Any]) -> Any:
    if network_class is T5EncoderModel:
        return T5EncoderModel(T5Config(**config))
    if network_class in (CLIPTextModel, CLIPTextModelWithProjection):
        return network_class(CLIPTextConfig(**config))
    return network_class.from_config(config)


class _Drawn:
    """The files of a checkpoint whose networks are drawn at random."""

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        """See the contract."""
        return (FOLDER,)


class DrawnStableDiffusion(_Drawn, StableDiffusion):
    """SD 1.x with weights drawn at random."""

    @classmethod
    def load(
        cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device
    ) -> DrawnStableDiffusion:
        """See the contract; nothing but configs is read."""
        classes = (
            ("unet", UNet2DConditionModel),
            ("text_encoder", CLIPTextModel),
            ("vae", AutoencoderKL),
        )
        networks, scheduler = _drawn(spec.path, dtype, device, spec.quantize, classes)
        return cls(tokenizer=Words(), sampler_config=scheduler, device=device, **networks)


class DrawnStableDiffusionXL(_Drawn, StableDiffusionXL):
    """SDXL with weights drawn at random."""

    @classmethod
    def load(
        cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device
    ) -> DrawnStableDiffusionXL:
        """See the contract; nothing but configs is read."""
        classes = (
            ("unet", UNet2DConditionModel),
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
            ("vae", AutoencoderKL),
        )
        networks, scheduler = _drawn(spec.path, dtype, device, spec.quantize, classes)
        upcast(networks["vae"])  # as for weights that are read
        return cls(
            tokenizer=Words(),
            tokenizer_2=Words(),
            zeros_for_no_prompt=True,
            vae_tf32=takes_tf32(spec, dtype, device),
            sampler_config=scheduler,
            device=device,
            **networks,
        )

    def pipeline(self) -> Any:
        """Make diffusers' own pipeline over the same networks."""
        pipe = StableDiffusionXLPipeline(
            **_NO_TEXT,
            unet=self._unet,
            vae=self._vae,
            scheduler=EulerDiscreteScheduler.from_config(self._sampler_config),
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, request: ImageRequest) -> dict[str, Any]:
        """Return what that pipeline is called with for this guided request, but for the generator.

        Its prompts are encoded as the engine does.
        """
        rows = _encoded(self, request)
        return _sizes_and_steps(request) | {
            "negative_prompt_embeds": rows["text"][:1],
            "prompt_embeds": rows["text"][1:],
            "negative_pooled_prompt_embeds": rows["pooled"][:1],
            "pooled_prompt_embeds": rows["pooled"][1:],
        }


class _DrawnFlow(_Drawn, FlowFamily):
    @classmethod
    def load(cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> Any:
        """See the contract; nothing but configs is read."""
        networks, scheduler = _drawn(
            spec.path,
            dtype,
            device,
            spec.quantize,
            (*cls.NETWORKS.items(), ("vae", AutoencoderKL)),
        )
        return cls(
            networks={name: network for name, network in networks.items() if name != "vae"},
            tokenizers={name: Words() for name in cls.TOKENIZERS},
            vae=networks["vae"],
            sampler_config=scheduler,
            device=device,
            options=spec.options,
        )


class DrawnStableDiffusion3(_DrawnFlow, StableDiffusion3):
    """SD3 with weights drawn at random."""


class DrawnFlux(_DrawnFlow, Flux):
    """FLUX.1 with weights drawn at random."""

    def pipeline(self) -> Any:
        """Make diffusers' own pipeline over the same networks."""
        pipe = FluxPipeline(
            **_NO_TEXT,
            transformer=self._transformer,
            vae=self._vae,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self._sampler_config),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, request: ImageRequest) -> dict[str, Any]:
        """Return what that pipeline is called with for this request, but for the generator.

        Its prompt is encoded as the engine does.
        """
        rows = _encoded(self, request)
        return _sizes_and_steps(request) | {
            "prompt_embeds": rows["text"],
            "pooled_prompt_embeds": rows["pooled"],
        }


@torch.no_grad()
def _encoded(family: StableDiffusionXL | Flux, request: ImageRequest) -> dict[str, Tensor]:
    return family.encode(request, lambda key, encode: encode())


def _sizes_and_steps(request: ImageRequest) -> dict[str, Any]:
    return {
        "width": request.width_px,
        "height": request.height_px,
        "num_inference_steps": request.num_steps,
        "guidance_scale": request.guidance,
        "output_type": "np",
    }
