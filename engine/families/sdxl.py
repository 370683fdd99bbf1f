"""SDXL: a UNet with cross-attention to two CLIP text encoders, told the second's summary and the
size of the picture.

Follows `StableDiffusionXLPipeline` and its image-to-image and inpainting siblings bit for bit. What
is not served is the refiner: it has one text encoder and an aesthetic score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engine.config import CheckpointSpec
from engine.errors import CheckpointCorrupt
from engine.families.contract import Recall
from engine.families.latent import (
    Beginning,
    begin_at,
    load_network,
    load_sampler_config,
    load_tokenizer,
)
from engine.families.sd import StableDiffusion, load_unet
from engine.folders import part_names
from engine.inflight import InFlight
from engine.previews import FACTORS
from engine.request import ImageRequest
from engine.tensors import Rows
from engine.transfers import to_device

backends: Any = torch.backends  # half of what is used of it is not annotated


class StableDiffusionXL(StableDiffusion):
    """One loaded SDXL checkpoint."""

    NAME: ClassVar[str] = "sdxl"
    published = FACTORS["sdxl"]

    def __init__(
        self,
        *,
        tokenizer_2: Any,
        text_encoder_2: Any,
        zeros_for_no_prompt: bool,
        vae_tf32: bool,
        **others: Any,
    ) -> None:
        """Take what was loaded. vae_tf32: its VAE may use TF32 for what is float32."""
        super().__init__(**others)
        self._vae_tf32 = vae_tf32
        self._tokenizer_2 = tokenizer_2
        self._text_encoder_2 = text_encoder_2
        self._zeros_for_no_prompt = zeros_for_no_prompt

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        return part_names("sdxl", path)

    @classmethod
    def load(
        cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device
    ) -> StableDiffusionXL:
        path = Path(spec.path)
        unet = load_unet(path, dtype, device, spec.quantize, additions="text_time")
        text_encoder_2 = load_network(
            CLIPTextModelWithProjection, path, "text_encoder_2", dtype, device, spec.quantize
        )
        _check_told(unet, text_encoder_2)
        return cls(
            tokenizer=load_tokenizer(CLIPTokenizer, path, "tokenizer"),
            tokenizer_2=load_tokenizer(CLIPTokenizer, path, "tokenizer_2"),
            text_encoder=load_network(
                CLIPTextModel, path, "text_encoder", dtype, device, spec.quantize
            ),
            text_encoder_2=text_encoder_2,
            unet=unet,
            vae=upcast(load_network(AutoencoderKL, path, "vae", dtype, device)),
            sampler_config=load_sampler_config(path),
            zeros_for_no_prompt=_zeros_for_no_prompt(path),
            vae_tf32=takes_tf32(spec, dtype, device),
            device=device,
        )

    def networks(self) -> Mapping[str, nn.Module]:
        return {**super().networks(), "text_encoder_2": self._text_encoder_2}

    def _takes_mask(self) -> bool:
        """Refuse one where the VAE's latents have a mean.

        Diffusers' inpainting leaves it out, and spoils what is kept.
        """
        return self._mean_and_std() is None

    def _most_clip_skip(self) -> int:
        """Leave one layer; the last is never used."""
        encoders = (self._text_encoder, self._text_encoder_2)
        return min(int(encoder.config.num_hidden_layers) for encoder in encoders) - 2

    def readers(self, request: ImageRequest | None = None) -> Mapping[str, tuple[Any, int]]:
        second = (self._tokenizer_2, int(self._tokenizer_2.model_max_length))
        return {**super().readers(request), "text_encoder_2": second}

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Encode to "text" [rows, tokens, width], "pooled" [rows, width], "time_ids" [rows, 6].

        Uncond before cond.
        """
        encoded = [self._recalled(request.prompt, request.clip_skip, recall)]
        if request.is_guided and not request.negative_prompt and self._zeros_for_no_prompt:
            encoded.insert(
                0, {name: torch.zeros_like(tensor) for name, tensor in encoded[0].items()}
            )
        elif request.is_guided:
            encoded.insert(0, self._recalled(request.negative_prompt, 0, recall))
        size_ids = torch.tensor([_size_ids(request.height_px, request.width_px)], dtype=self.dtype)
        sizes = to_device(size_ids, self.device)
        rows = {name: torch.cat([each[name] for each in encoded]) for name in ("text", "pooled")}
        return {**rows, "time_ids": sizes.expand(len(encoded), -1)}

    def _recalled(self, text: str, clip_skip: int, recall: Recall) -> Rows:
        return recall(
            f"text_encoder text_encoder_2 clip_skip={clip_skip} {text}",
            partial(self._encode_text, text, clip_skip),
        )

    def _encode_text(self, text: str, clip_skip: int) -> Rows:
        """Encode one text alone.

        {"text": [1, tokens, both widths], "pooled": [1, width of the second]}.
        """
        hidden = []
        for tokenizer, text_encoder in (
            (self._tokenizer, self._text_encoder),
            (self._tokenizer_2, self._text_encoder_2),
        ):
            tokens = tokenizer(
                text,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            encoded = text_encoder(
                to_device(tokens.input_ids, self.device), output_hidden_states=True
            )
            hidden.append(encoded.hidden_states[-(clip_skip + 2)])
        return {"text": torch.cat(hidden, dim=-1).to(self.dtype), "pooled": encoded.text_embeds}

    def begin(self, request: ImageRequest, sampler: Any, generator: torch.Generator) -> Beginning:
        # Said here and not by SD's pipeline; it matters where a timestep occurs twice.
        begin_at(sampler, 0)
        return super().begin(request, sampler, generator)

    def denoise(self, rows: Rows) -> Tensor:
        prediction: Tensor = self._unet(
            rows["latents"],
            rows["timesteps"],
            encoder_hidden_states=rows["text"],
            added_cond_kwargs={"text_embeds": rows["pooled"], "time_ids": rows["time_ids"]},
            return_dict=False,
        )[0]
        return prediction

    def decode(self, image: InFlight) -> Tensor:
        """Decode as other families do, in TF32 where that is float32 only for its range.

        Float32 alone takes a GPU longer than five denoise steps. What the weights and latents were
        rounded to has no more digits than TF32.
        """
        with self._tf32_if_allowed():
            return super().decode(image)

    def encode_picture(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        with self._tf32_if_allowed():
            return super().encode_picture(picture, generator)

    @contextmanager
    def _tf32_if_allowed(self) -> Iterator[None]:
        """Let convolutions in float32 use TF32 within this context, as torch does unless told.

        The switch is the process's; nothing but the engine's thread computes meanwhile.
        """
        if not self._vae_tf32:
            yield
            return
        backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            backends.cudnn.allow_tf32 = False

    def _mean_and_std(self) -> tuple[Tensor, Tensor] | None:
        """Give mean and deviation of the VAE's latents by channel, [1, c, 1, 1] each, float32.

        None where it does not say.
        """
        mean = self._vae.config.latents_mean
        std = self._vae.config.latents_std
        if mean is None or std is None:
            return None
        return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)

    def _scaled(self, latents: Tensor) -> Tensor:
        known = self._mean_and_std()
        if known is None:
            return super()._scaled(latents)
        mean, std = (to_device(each, latents.device, latents.dtype) for each in known)
        scaled: Tensor = (latents - mean) * self._vae.config.scaling_factor / std
        return scaled

    def _unscaled(self, latents: Tensor) -> Tensor:
        known = self._mean_and_std()
        if known is None:
            return super()._unscaled(latents)
        mean, std = (to_device(each, latents.device, latents.dtype) for each in known)
        unscaled: Tensor = latents * std / self._vae.config.scaling_factor + mean
        return unscaled

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "vae_encoder": str(next(self._vae.encoder.parameters()).dtype),
            "vae_decoder": str(next(self._vae.decoder.parameters()).dtype),
            "zeros_for_no_prompt": self._zeros_for_no_prompt,
            **({"vae_tf32": True} if self._vae_tf32 else {}),
        }


def _size_ids(height_px: int, width_px: int) -> list[int]:
    """Give the size the picture is said to have had, where it was cropped, and the size it has."""
    return [height_px, width_px, 0, 0, height_px, width_px]


def _check_told(unet: Any, text_encoder_2: Any) -> None:
    """Raise `CheckpointCorrupt` unless the UNet is told what `_size_ids` says, and the text."""
    told = (
        unet.config.addition_time_embed_dim * len(_size_ids(0, 0))
        + text_encoder_2.config.projection_dim
    )
    if unet.add_embedding.linear_1.in_features != told:
        raise CheckpointCorrupt(
            "unet/config.json", "is not told three sizes and a text's summary: a refiner?"
        )


def takes_tf32(spec: CheckpointSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the VAE uses TF32: on a GPU, for a checkpoint whose weights are not float32."""
    return spec.vae_tf32 and dtype != torch.float32 and device.type == "cuda"


def upcast(vae: Any) -> Any:
    """Return the VAE with those halves in float32 that the pipelines upcast for every call.

    This VAE overflows in float16. Upcast are the encoder always, and the decoder where it would be
    float16. Weights were rounded to the checkpoint's precision before.
    """
    if vae.config.force_upcast:
        halves = [vae.encoder, vae.quant_conv]
        if vae.dtype == torch.float16:
            halves += [vae.decoder, vae.post_quant_conv]
        for half in halves:
            if half is not None:
                half.float()
    return vae


def _zeros_for_no_prompt(path: Path) -> bool:
    """Tell whether an empty negative prompt is encoded as zeros.

    Only the pipeline's own config says it.
    """
    file = path / "model_index.json"
    try:
        return bool(
            json.loads(file.read_text(encoding="utf-8")).get("force_zeros_for_empty_prompt", True)
        )
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt("model_index.json", str(problem)) from problem
