"""SD3 and SD3.5: a transformer over image and text tokens, fed by two CLIP text encoders and T5,
and a VAE of 16 channels.

Follows `StableDiffusion3Pipeline`, its img2img and its inpainting bit for bit. A checkpoint without
T5 gets zeros in its place, as there. Not served: skip-layer guidance (one more forward with a
constant of its own), image prompts, and networks of 33 channels that take the masked picture as
context (no public checkpoint is one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from engine.capabilities import Capabilities
from engine.errors import CheckpointCorrupt
from engine.families.contract import Recall
from engine.families.flow import FlowFamily
from engine.inflight import InFlight
from engine.previews import FACTORS
from engine.request import ImageRequest
from engine.tensors import Rows


class StableDiffusion3(FlowFamily):
    """One loaded SD3 or SD3.5 checkpoint."""

    published = FACTORS["sd3"]

    NAME: ClassVar[str] = "sd3"
    NETWORKS: ClassVar[Mapping[str, Any]] = {
        "transformer": SD3Transformer2DModel,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    TOKENIZERS: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5TokenizerFast,
    }
    TEXT_TOKENS: ClassVar[int] = 256
    MAX_SHIFT: ClassVar[float] = 1.16

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        channels = self._transformer.config.in_channels
        if channels != self._vae.config.latent_channels:
            raise CheckpointCorrupt(
                "transformer/config.json",
                f"takes {channels} channels, more than the VAE's: an inpainting network?",
            )

    def describe(self) -> Capabilities:
        layers = min(
            self._networks[name].config.num_hidden_layers
            for name in ("text_encoder", "text_encoder_2")
        )
        return replace(super().describe(), max_clip_skip=layers - 1)

    def text_length(self, request: ImageRequest) -> int:
        """Return the number of CLIP's tokens and T5's together.

        Both are padded to a length that no prompt changes.
        """
        return self._clip_tokens + self.text_tokens(request)

    @property
    def _clip_tokens(self) -> int:
        return int(self._tokenizers["tokenizer"].model_max_length)

    def readers(self, request: ImageRequest | None = None) -> Mapping[str, tuple[Any, int]]:
        """Give T5 as well where it is there: it reads further than CLIP."""
        found = {
            "text_encoder": (self._tokenizers["tokenizer"], self._clip_tokens),
            "text_encoder_2": (self._tokenizers["tokenizer_2"], self._clip_tokens),
        }
        if "text_encoder_3" in self._networks:
            t5 = self._tokenizers["tokenizer_3"]
            found["text_encoder_3"] = (t5, self.text_tokens(request))
        return found

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Encode to {"text": [rows, tokens, width], "pooled": [rows, width]}, uncond first."""
        texts = [(request.prompt, request.clip_skip)]
        if self.rows(request) == 2:
            # `pipe(...)` skips no layers for the negative prompt.
            texts.insert(0, (request.negative_prompt, 0))
        parts = [
            self._encode_text(text, clip_skip, self.text_tokens(request), recall)
            for text, clip_skip in texts
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in ("text", "pooled")}

    def _encode_text(self, text: str, clip_skip: int, length: int, recall: Recall) -> Rows:
        """Encode one text by all encoders.

        CLIP's widths stand side by side and filled up to T5's; then come T5's tokens.
        """
        clips = [
            recall(
                f"text_encoder{suffix} clip_skip={clip_skip} {text}",
                partial(self._encode_clip, suffix, text, clip_skip),
            )
            for suffix in ("", "_2")
        ]
        clip = torch.cat([part["text"] for part in clips], dim=-1)
        t5 = self._encode_t5(text, length, recall)
        clip = pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "text": torch.cat([clip, t5], dim=-2),
            "pooled": torch.cat([part["pooled"] for part in clips], dim=-1),
        }

    def _encode_clip(self, suffix: str, text: str, clip_skip: int) -> Rows:
        """Encode by one CLIP to {"text": [1, tokens, width], "pooled": [1, projected width]}."""
        ids = self.tokenize(f"tokenizer{suffix}", text, self._clip_tokens)
        encoded = self._networks[f"text_encoder{suffix}"](ids, output_hidden_states=True)
        return {
            "text": encoded.hidden_states[-(clip_skip + 2)].to(self.dtype),
            "pooled": encoded[0],
        }

    def _encode_t5(self, text: str, length: int, recall: Recall) -> Tensor:
        if "text_encoder_3" not in self._networks:
            width = self._transformer.config.joint_attention_dim
            return torch.zeros((1, length, width), device=self.device, dtype=self.dtype)
        return recall(
            f"text_encoder_3 length={length} {text}", partial(self.encode_t5, 3, text, length)
        )["text"]

    def is_told_mu(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dynamic_shifting", False))

    def set_timesteps(self, sampler: Any, num_steps: int, more: dict[str, Any]) -> None:
        """Space as the scheduler does."""
        sampler.set_timesteps(num_steps, device="cpu", **more)

    def inputs(self, image: InFlight) -> Rows:
        tensors = image.tensors
        return {
            "latents": tensors.latents.expand(image.rows, -1, -1, -1),
            # A batch may mix integer and fractional timesteps; float32 holds both exactly.
            "timesteps": tensors.timesteps[image.step].to(torch.float32).expand(image.rows),
            **tensors.conditioning,
        }

    def denoise(self, rows: Rows) -> Tensor:
        prediction: Tensor = self._transformer(
            hidden_states=rows["latents"],
            timestep=rows["timesteps"],
            encoder_hidden_states=rows["text"],
            pooled_projections=rows["pooled"],
            return_dict=False,
        )[0]
        return prediction
