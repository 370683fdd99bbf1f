"""FLUX.1: a transformer over packed latents and T5's tokens, steered by one pooled CLIP vector, and
by a guidance scale where distilled.

Follows `FluxPipeline`, its img2img, its inpainting and `FluxFillPipeline` bit for bit.

`request.guidance` is what the checkpoint makes of it. Distilled for guidance (dev, Fill): the scale
it is fed, in one row; classifier-free guidance on top of that, in two, is asked for by the option
`true_cfg_scale`. Not distilled for it (schnell): the scale of classifier-free guidance, if there is
a negative prompt. Where `pipe(...)` makes a forward each for the two, here is one of two rows:
within 1e-5 of it in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from engine.capabilities import Capabilities, Guidance, Need, NegativePrompt
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.contract import Recall
from engine.families.flow import LATENTS_PER_TOKEN, FlowFamily
from engine.inflight import InFlight
from engine.previews import FACTORS
from engine.request import ImageRequest, Option
from engine.tensors import Rows


class Flux(FlowFamily):
    """One loaded FLUX.1 checkpoint."""

    published = FACTORS["flux"]

    NAME: ClassVar[str] = "flux"
    NETWORKS: ClassVar[Mapping[str, Any]] = {
        "transformer": FluxTransformer2DModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    TOKENIZERS: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": T5TokenizerFast,
    }
    TEXT_TOKENS: ClassVar[int] = 512
    MAX_SHIFT: ClassVar[float] = 1.15

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.is_distilled = bool(self._transformer.config.guidance_embeds)
        channels = self._transformer.config.in_channels // LATENTS_PER_TOKEN**2
        latent_channels = self._vae.config.latent_channels
        # Latents, the masked picture's, a mask pixel each.
        self._is_fill = channels == 2 * latent_channels + self.pixels_per_latent**2
        if channels != latent_channels and not self._is_fill:
            raise CheckpointCorrupt(
                "transformer/config.json",
                f"takes {channels} latent channels: a network of another task than Fill's",
            )

    # --- of a request ---

    def option_names(self) -> frozenset[str]:
        return super().option_names() | (
            {"true_cfg_scale"} if self.is_distilled and not self._is_fill else set()
        )

    def describe(self) -> Capabilities:
        pictured = Need.REQUIRED if self._is_fill else Need.OPTIONAL
        common = super().describe()
        common = replace(
            common, pictures={**common.pictures, "init_image": pictured, "mask": pictured}
        )
        if not self.is_distilled:
            return replace(common, guidance=Guidance.NEGATED)
        has_negative = self._true_cfg_scale(None) > 1
        rows = 2 if has_negative else 1
        return replace(
            common,
            negative_prompt=NegativePrompt.USED if has_negative else NegativePrompt.IGNORED,
            rows=rows,
            rows_guided=rows,
        )

    def check_options(self, options: Mapping[str, Option]) -> None:
        super().check_options(options)
        scale = options.get("true_cfg_scale", 1.0)
        if type(scale) not in (int, float):
            raise UnsupportedRequest("options", f"true_cfg_scale {scale!r} is not a number")

    def rows(self, request: ImageRequest) -> int:
        return 2 if self._true_cfg_scale(request) > 1 else 1

    def text_length(self, request: ImageRequest) -> int:
        """Return the number of T5's tokens; CLIP adds none."""
        return self.text_tokens(request)

    def _true_cfg_scale(self, request: ImageRequest | None) -> float:
        """Give the scale of classifier-free guidance; 1 or less: none.

        Without a request, that of one which says nothing.
        """
        if self.is_distilled:
            return float(self.option(request, "true_cfg_scale", 1.0))
        return request.guidance if request is not None and request.negative_prompt else 1.0

    def readers(self, request: ImageRequest | None = None) -> Mapping[str, tuple[Any, int]]:
        """Give T5 alone: what CLIP reads is one vector for the whole."""
        return {"text_encoder_2": (self._tokenizers["tokenizer_2"], self.text_tokens(request))}

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Encode to {"text": [rows, tokens, width], "pooled": [rows, width]}, uncond before cond.

        "guidance": [rows] where the network is distilled.
        """
        texts = (
            [request.negative_prompt, request.prompt]
            if self.rows(request) == 2
            else [request.prompt]
        )
        length = self.text_tokens(request)
        pooled = [
            recall(f"text_encoder {text}", partial(self._encode_clip, text))["pooled"]
            for text in texts
        ]
        t5_key = f"text_encoder_2 length={length}"
        hidden = [
            recall(f"{t5_key} {text}", partial(self.encode_t5, 2, text, length))["text"]
            for text in texts
        ]
        rows = {"text": torch.cat(hidden), "pooled": torch.cat(pooled)}
        if self.is_distilled:
            rows["guidance"] = torch.full((len(texts),), request.guidance, dtype=torch.float32)
        return rows

    def _encode_clip(self, text: str) -> Rows:
        """Encode by CLIP to {"pooled": [1, width]}."""
        ids = self.tokenize("tokenizer", text, self._tokenizers["tokenizer"].model_max_length)
        return {
            "pooled": self._networks["text_encoder"](
                ids, output_hidden_states=False
            ).pooler_output.to(self.dtype)
        }

    # --- noise levels ---

    def is_told_mu(self, config: Mapping[str, Any]) -> bool:
        """Give it always, whether or not the scheduler shifts by it."""
        return True

    def set_timesteps(self, sampler: Any, num_steps: int, more: dict[str, Any]) -> None:
        """Space evenly down to 1/num_steps, unless the scheduler uses a spacing of its own."""
        if sampler.config.get("use_flow_sigmas", False):
            sampler.set_timesteps(num_steps, device="cpu", **more)
        else:
            sampler.set_timesteps(
                sigmas=np.linspace(1.0, 1 / num_steps, num_steps), device="cpu", **more
            )

    # --- latents ---

    def pack(self, latents: Tensor) -> Tensor:
        """Turn [b, c, h, w] into [b, tokens, 4c], each token a patch of 2x2 latents."""
        b, c, h, w = latents.shape
        patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(b, (h // 2) * (w // 2), c * 4)

    def picture_latents(self, image: InFlight, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        b, _, c = latents.shape
        h = image.request.height_px // self.pixels_per_latent
        w = image.request.width_px // self.pixels_per_latent
        patches = latents.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(b, c // 4, h, w)

    def remember_mask(
        self,
        mask: Tensor,
        picture: Tensor,
        clean: Tensor,
        noise: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Give the channels of a Fill network: the masked picture's latents, every mask pixel."""
        if not self._is_fill:
            return super().remember_mask(mask, picture, clean, noise, generator)
        masked = self.encode_picture(picture * (1 - mask), generator)
        size = self.pixels_per_latent
        h, w = clean.shape[-2:]
        mask_pixels = (
            mask.reshape(1, h, size, w, size).permute(0, 2, 4, 1, 3).reshape(1, size * size, h, w)
        )
        return {"context": torch.cat([masked, mask_pixels], dim=1)}

    def inputs(self, image: InFlight) -> Rows:
        """Give latents unpacked, [rows, c, h, w]: the shape of a forward says its positions."""
        tensors = image.tensors
        latents = self.picture_latents(image, tensors.latents)
        if "context" in tensors.extras:
            latents = torch.cat([latents, tensors.extras["context"]], dim=1)
        return {
            "latents": latents.expand(image.rows, -1, -1, -1),
            # Rounded before it is divided.
            "timesteps": tensors.timesteps[image.step].to(latents.dtype).expand(image.rows),
            **tensors.conditioning,
        }

    def denoise(self, rows: Rows) -> Tensor:
        """Predict all rows, packed.

        Positions are shared by all rows: height and width are in the batch key.
        """
        latents = rows["latents"]
        text = rows["text"]
        h, w = latents.shape[-2:]
        prediction: Tensor = self._transformer(
            hidden_states=self.pack(latents),
            timestep=rows["timesteps"] / 1000,
            guidance=rows.get("guidance"),
            pooled_projections=rows["pooled"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=_positions(h // 2, w // 2, text),
            return_dict=False,
        )[0]
        return prediction

    def guide(self, image: InFlight, prediction: Tensor) -> Tensor:
        """Guide by the scale of classifier-free guidance, not by the one the network is fed."""
        if image.rows == 1:
            return prediction
        uncond, cond = prediction.chunk(2)
        return uncond + self._true_cfg_scale(image.request) * (cond - uncond)


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of every token, [rows * columns, 3], in the dtype of the text.

    bf16 rounds positions beyond 256, as in `pipe(...)`.
    """
    ids = torch.zeros(rows, columns, 3, device=like.device)
    ids[..., 1] += torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=like.device)[None, :]
    return ids.reshape(rows * columns, 3).to(like.dtype)
