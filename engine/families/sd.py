"""SD 1.x and 2.x: a UNet with cross-attention to one CLIP text encoder, and an 8x VAE.

Follows `StableDiffusionPipeline`, `StableDiffusionImg2ImgPipeline` and
`StableDiffusionInpaintPipeline` bit for bit (epsilon, sample and v prediction, zero terminal SNR,
all by the checkpoint's scheduler config), but reads the component folders itself: nothing named in
a model_index.json is ever imported. A UNet of nine input channels sees the mask and the picture to
repaint at every step; it serves nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPTextModel, CLIPTokenizer

from engine.capabilities import Capabilities, Need, NegativePrompt
from engine.config import CheckpointSpec
from engine.errors import CheckpointCorrupt
from engine.families.contract import Recall
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
from engine.previews import FACTORS
from engine.request import ImageRequest
from engine.samplers import add_noise, fresh_sampler, sampler_limits
from engine.tensors import Rows, Sampler
from engine.transfers import to_device


class StableDiffusion(LatentFamily):
    """One loaded SD 1.x or 2.x checkpoint."""

    NAME: ClassVar[str] = "sd"
    published = FACTORS["sd"]

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        sampler_config: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._unet = unet
        self._vae = vae
        self._sampler_config = sampler_config
        self._sees_mask = unet.config.in_channels == 9
        self.device = device
        self.dtype = unet.dtype
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        return part_names("sd", path)

    @classmethod
    def load(
        cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device
    ) -> StableDiffusion:
        path = Path(spec.path)
        return cls(
            tokenizer=load_tokenizer(CLIPTokenizer, path, "tokenizer"),
            text_encoder=load_network(
                CLIPTextModel, path, "text_encoder", dtype, device, spec.quantize
            ),
            unet=load_unet(path, dtype, device, spec.quantize, additions=None),
            vae=load_network(AutoencoderKL, path, "vae", dtype, device),
            sampler_config=_repaired(load_sampler_config(path)),
            device=device,
        )

    def networks(self) -> Mapping[str, nn.Module]:
        return {"unet": self._unet, "text_encoder": self._text_encoder}

    # --- of a request ---

    def describe(self) -> Capabilities:
        pictured = Need.REQUIRED if self._sees_mask else Need.OPTIONAL
        return Capabilities(
            family=self.NAME,
            side_multiple_px=max(8, self.pixels_per_latent),
            pictures={
                "init_image": pictured,
                "mask": pictured if self._takes_mask() else Need.NONE,
                "control_image": Need.NONE,
            },
            samplers=sampler_limits(self._sampler_config),
            negative_prompt=NegativePrompt.GUIDED,
            max_clip_skip=self._most_clip_skip(),
            rows_guided=2,
            prompt_tokens=self.prompt_tokens(),
        )

    def _takes_mask(self) -> bool:
        return True

    def _most_clip_skip(self) -> int:
        """Leave one layer."""
        return int(self._text_encoder.config.num_hidden_layers) - 1

    def rows(self, request: ImageRequest) -> int:
        return 2 if request.is_guided else 1

    def text_length(self, request: ImageRequest) -> int:
        """Return the tokenizer's full length: CLIP pads and truncates every prompt to it."""
        return int(self._tokenizer.model_max_length)

    # --- of an image ---

    def readers(self, request: ImageRequest | None = None) -> Mapping[str, tuple[Any, int]]:
        return {"text_encoder": (self._tokenizer, int(self._tokenizer.model_max_length))}

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Encode to {"text": [rows, tokens, width]}, uncond before cond.

        The negative prompt skips no layers, as in `pipe(...)`.
        """
        told = [(request.prompt, request.clip_skip)]
        if request.is_guided:
            told.insert(0, (request.negative_prompt, 0))
        encoded = [
            recall(f"text_encoder clip_skip={skip} {text}", partial(self._encode_text, text, skip))
            for text, skip in told
        ]
        return {"text": torch.cat([each["text"] for each in encoded])}

    def _encode_text(self, text: str, clip_skip: int) -> Rows:
        """Encode one text alone: {"text": [1, tokens, width]}.

        So its bits do not depend on another text.
        """
        tokens = self._tokenizer(
            text,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        uses_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = to_device(tokens.attention_mask, self.device) if uses_mask else None
        encoded = self._text_encoder(
            to_device(tokens.input_ids, self.device),
            attention_mask=mask,
            output_hidden_states=clip_skip > 0,
        )
        if clip_skip == 0:
            hidden = encoded.last_hidden_state
        else:
            hidden = self._text_encoder.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)])
        return {"text": hidden.to(self.dtype)}

    def sampler(self, request: ImageRequest) -> Sampler:
        sampler = fresh_sampler(request.sampler, self._sampler_config)
        sampler.set_timesteps(request.num_steps, device="cpu")
        return sampler

    def begin(self, request: ImageRequest, sampler: Any, generator: torch.Generator) -> Beginning:
        if request.init_image is None:
            return Beginning(
                self.draw_noise(request, generator) * sampler.init_noise_sigma, sampler.timesteps
            )
        skipped = _skipped_steps(request)
        begin_at(sampler, skipped)
        timesteps = sampler.timesteps[skipped:]
        picture = picture_tensor(request.init_image, torch.float32, torch.device("cpu"))
        if request.mask is not None:
            return self._begin_inpainting(
                request, picture, mask_tensor(request.mask), sampler, timesteps, generator
            )
        clean = self.encode_picture(picture, generator)
        noise = self.draw_noise(request, generator)
        return Beginning(add_noise(sampler, clean, noise, timesteps[0]), timesteps)

    def _begin_inpainting(
        self,
        request: ImageRequest,
        picture: Tensor,
        mask: Tensor,
        sampler: Any,
        timesteps: Tensor,
        generator: torch.Generator,
    ) -> Beginning:
        """Start inpainting: at strength 1 from noise alone, otherwise from the noisy picture.

        picture: [1, 3, h, w].  mask: [1, 1, h, w].
        """
        is_strongest = request.noise_share == 1.0
        clean: Any = (
            None if self._sees_mask and is_strongest else self.encode_picture(picture, generator)
        )
        noise = self.draw_noise(request, generator)
        latents = (
            noise * sampler.init_noise_sigma
            if is_strongest
            else add_noise(sampler, clean, noise, timesteps[0])
        )
        extras = self._remember_mask(mask, picture, clean, noise, generator)
        return Beginning(latents, timesteps, extras)

    def _remember_mask(
        self,
        mask: Tensor,
        picture: Tensor,
        clean: Any,
        noise: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """Tell what inpainting needs at every step, for `Tensors.extras`."""
        latent_mask = interpolate(mask, size=noise.shape[-2:])
        extras = {"mask": to_device(latent_mask, self.device, self.dtype)}
        if self._sees_mask:
            masked = self.encode_picture(picture * (mask < 0.5), generator)
            return extras | {"masked": masked}
        # The pipeline encodes the masked picture here too but never uses it. Only its random draw
        # must be repeated.
        torch.randn(noise.shape, generator=generator, dtype=self._encoder_dtype)
        return extras | {"clean": clean, "noise": noise}

    def encode_picture(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Encode one picture [1, 3, h, w] and draw from the VAE's posterior.

        Returns clean latents as the denoiser sees them.
        """
        picture = to_device(picture, self.device, self.dtype).to(self._encoder_dtype)
        return self._scaled(self.draw_posterior(picture, generator).to(self.dtype))

    @property
    def _encoder_dtype(self) -> torch.dtype:
        """Return the dtype in which the VAE encodes and its posterior is drawn."""
        dtype: torch.dtype = next(self._vae.encoder.parameters()).dtype
        return dtype

    def inputs(self, image: InFlight) -> Rows:
        """Give latents scaled for the image's own noise level, its timestep, its text."""
        tensors = image.tensors
        timestep = tensors.timesteps[image.step]
        latents = tensors.sampler.scale_model_input(tensors.latents, timestep)
        if self._sees_mask:
            latents = torch.cat([latents, tensors.extras["mask"], tensors.extras["masked"]], dim=1)
        return {
            "latents": latents.expand(image.rows, -1, -1, -1),
            # A batch may mix integer and fractional timesteps; float32 holds both exactly.
            "timesteps": timestep.to(torch.float32).expand(image.rows),
            **tensors.conditioning,
        }

    def denoise(self, rows: Rows) -> Tensor:
        prediction: Tensor = self._unet(
            rows["latents"],
            rows["timesteps"],
            encoder_hidden_states=rows["text"],
            return_dict=False,
        )[0]
        return prediction

    def repaint(self, image: InFlight) -> None:
        """Put the picture back where the mask is black, as noisy as the latents are now."""
        tensors = image.tensors
        if self._sees_mask or not tensors.extras:
            return
        mask = tensors.extras["mask"]
        kept = tensors.extras["clean"]
        if image.step + 1 < image.num_steps:
            timestep = tensors.timesteps[image.step + 1]
            kept = add_noise(tensors.sampler, kept, tensors.extras["noise"], timestep)
        tensors.latents = (1 - mask) * kept + mask * tensors.latents

    def decode(self, image: InFlight) -> Tensor:
        decoder_dtype = next(self._vae.decoder.parameters()).dtype
        pixels: Tensor = self._vae.decode(
            self._unscaled(image.tensors.latents.to(decoder_dtype)), return_dict=False
        )[0]
        return pixels

    def _scaled(self, latents: Tensor) -> Tensor:
        """Scale latents of the VAE to those of the denoiser."""
        scaled: Tensor = self._vae.config.scaling_factor * latents
        return scaled

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Scale latents of the denoiser back to those of the VAE."""
        unscaled: Tensor = latents / self._vae.config.scaling_factor
        return unscaled

    def facts(self) -> dict[str, Any]:
        return {
            "attention": sorted(
                {type(processor).__name__ for processor in self._unet.attn_processors.values()}
            ),
            "text_attention": str(getattr(self._text_encoder.config, "_attn_implementation", None)),
            "vae_tiling": bool(getattr(self._vae, "use_tiling", False)),
            "vae_slicing": bool(getattr(self._vae, "use_slicing", False)),
        }


def load_unet(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    *,
    additions: str | None,
) -> Any:
    """Read a UNet that takes text and, under the name diffusers gives them, these `additions`.

    Raises `CheckpointCorrupt` for others.
    """
    unet = load_network(UNet2DConditionModel, path, "unet", dtype, device, quantize)
    if unet.config.time_cond_proj_dim is not None:
        raise CheckpointCorrupt(
            "unet/config.json", "takes an embedded guidance scale, which is not served"
        )
    if unet.config.in_channels not in (unet.config.out_channels, 9):
        raise CheckpointCorrupt(
            "unet/config.json",
            f"takes {unet.config.in_channels} channels: neither its latents nor a mask with them",
        )
    if unet.config.addition_embed_type != additions:
        raise CheckpointCorrupt(
            "unet/config.json",
            f"takes {unet.config.addition_embed_type} beside its text, not {additions}",
        )
    return unet


def _skipped_steps(request: ImageRequest) -> int:
    """Return how many of the steps asked for are not made.

    The noise they would remove is not there.
    """
    return request.num_steps - int(request.num_steps * request.noise_share)


def _repaired(config: dict[str, Any]) -> dict[str, Any]:
    """Return the scheduler config with the two repairs that the pipeline makes to outdated ones."""
    if config.get("steps_offset", 1) != 1:
        config["steps_offset"] = 1
    if config.get("clip_sample") is True:
        config["clip_sample"] = False
    return config
