"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention to one CLIP text encoder, and an 8x VAE.

Follows `StableDiffusionPipeline` bit for bit (epsilon, sample and v prediction, zero terminal SNR, all by the checkpoint's
scheduler config), but reads the component folders itself: nothing named in a model_index.json is ever imported.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.contract import Recall, Rows, Sampler
from engine.inflight import InFlight
from engine.request import ImageRequest
from engine.samplers import check_sampler, fresh_sampler, step_arguments


class StableDiffusion:
    """One loaded SD 1.x or 2.x checkpoint."""

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
        self._device = device
        self._dtype: torch.dtype = unet.dtype
        self.pixels_per_latent: int = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def folders(cls) -> tuple[str, ...]:
        """See the contract."""
        return ("scheduler", "text_encoder", "tokenizer", "unet", "vae")

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
        """See the contract. The weights become ours alone: a file rewritten later cannot change them."""
        unet = _load_network(UNet2DConditionModel, path, "unet", dtype, device)
        if unet.config.time_cond_proj_dim is not None:
            raise CheckpointCorrupt("unet/config.json", "takes an embedded guidance scale, which family sd does not serve")
        if unet.config.in_channels != unet.config.out_channels:
            raise CheckpointCorrupt("unet/config.json", "takes more latent channels than it predicts: an inpainting network?")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(path / "tokenizer"), local_files_only=True)
        except Exception as problem:
            raise CheckpointCorrupt("tokenizer", str(problem)) from problem
        return cls(
            tokenizer=tokenizer,
            text_encoder=_load_network(CLIPTextModel, path, "text_encoder", dtype, device),
            unet=unet,
            vae=_load_network(AutoencoderKL, path, "vae", dtype, device),
            sampler_config=_sampler_config(path),
            device=device,
        )

    def check(self, request: ImageRequest) -> None:
        """See the contract."""
        for side, size_px in (("width_px", request.width_px), ("height_px", request.height_px)):
            if size_px < 8 or size_px % 8 or size_px % self.pixels_per_latent:
                raise UnsupportedRequest(side, f"{size_px} is not a multiple of {max(8, self.pixels_per_latent)}")
        check_sampler(request.sampler, request.num_steps, self._sampler_config)

    def rows(self, request: ImageRequest) -> int:
        """See the contract."""
        return 2 if request.is_guided else 1

    def text_length(self, request: ImageRequest) -> int:
        """Always the tokenizer's full length: CLIP pads and truncates every prompt to it."""
        return int(self._tokenizer.model_max_length)

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """See the contract: {"text": [rows, tokens, width]}, uncond before cond."""
        texts = [request.negative_prompt, request.prompt] if self.rows(request) == 2 else [request.prompt]
        return {"text": torch.cat([recall(text, partial(self._encode_text, text))["text"] for text in texts])}

    def _encode_text(self, text: str) -> Rows:
        """Encode one text alone, so that its bits do not depend on another: {"text": [1, tokens, width]}."""
        tokens = self._tokenizer(
            text, padding="max_length", max_length=self._tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        uses_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self._device) if uses_mask else None
        hidden = self._text_encoder(tokens.input_ids.to(self._device), attention_mask=mask)[0]
        return {"text": hidden.to(self._dtype)}

    def sampler(self, request: ImageRequest) -> Sampler:
        """See the contract."""
        sampler = fresh_sampler(request.sampler, self._sampler_config)
        sampler.set_timesteps(request.num_steps, device="cpu")
        return sampler

    def initial_latents(self, request: ImageRequest, sampler: Sampler, generator: torch.Generator) -> Tensor:
        """See the contract. Drawn in the checkpoint's dtype, as `pipe(...)` does: another dtype is another noise."""
        shape = (
            1,
            self._unet.config.in_channels,
            request.height_px // self.pixels_per_latent,
            request.width_px // self.pixels_per_latent,
        )
        noise = torch.randn(shape, generator=generator, dtype=self._dtype).to(self._device)
        latents: Tensor = noise * sampler.init_noise_sigma
        return latents

    def inputs(self, image: InFlight) -> Rows:
        """See the contract: latents scaled for the image's own noise level, its timestep, its text."""
        tensors = image.tensors
        timestep = tensors.timesteps[image.step]
        latents = tensors.sampler.scale_model_input(tensors.latents, timestep)
        return {
            "latents": latents.expand(image.rows, -1, -1, -1),
            # Integer and fractional timesteps meet in one batch as float32, which holds both exactly.
            "timesteps": timestep.to(torch.float32).expand(image.rows),
            "text": tensors.conditioning["text"],
        }

    def denoise(self, rows: Rows) -> Tensor:
        """See the contract."""
        prediction: Tensor = self._unet(rows["latents"], rows["timesteps"], encoder_hidden_states=rows["text"], return_dict=False)[0]
        return prediction

    def advance(self, image: InFlight, prediction: Tensor) -> None:
        """See the contract."""
        tensors = image.tensors
        if image.rows == 2:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + image.request.guidance * (cond - uncond)
        timestep = tensors.timesteps[image.step]
        more = step_arguments(tensors.sampler, tensors.generator)
        tensors.latents = tensors.sampler.step(prediction, timestep, tensors.latents, **more)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """See the contract."""
        pixels: Tensor = self._vae.decode(latents / self._vae.config.scaling_factor, return_dict=False)[0]
        return pixels

    def facts(self) -> dict[str, Any]:
        """See the contract."""
        processors = sorted({type(processor).__name__ for processor in self._unet.attn_processors.values()})
        return {
            "attention": processors,
            "text_attention": str(getattr(self._text_encoder.config, "_attn_implementation", None)),
            "vae_tiling": bool(getattr(self._vae, "use_tiling", False)),
            "vae_slicing": bool(getattr(self._vae, "use_slicing", False)),
        }


def _load_network(network_class: Any, path: Path, folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Read one network, frozen and in eval mode; raises `CheckpointCorrupt` rather than fill a missing tensor by chance."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "torch_dtype": dtype}
    if network_class is CLIPTextModel:
        options["dtype"] = options.pop("torch_dtype")
    else:
        options["low_cpu_mem_usage"] = is_accelerate_available()
    try:
        network, info = network_class.from_pretrained(str(path / folder), **options)
    except Exception as problem:
        raise CheckpointCorrupt(folder, f"cannot be read: {problem}") from problem
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing or info.get("error_msgs"):
        raise CheckpointCorrupt(folder, f"lacks {len(missing)} tensors, such as {missing[:3]}")
    network.requires_grad_(False)
    network.eval()
    network.to(device)
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.clone()  # safetensors maps the file; a file rewritten in place would change running weights
    return network


def _sampler_config(path: Path) -> dict[str, Any]:
    """The checkpoint's scheduler config with the two repairs StableDiffusionPipeline makes to outdated ones."""
    file = path / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt("scheduler/scheduler_config.json", str(problem)) from problem
    if config.get("steps_offset", 1) != 1:
        config["steps_offset"] = 1
    if config.get("clip_sample") is True:
        config["clip_sample"] = False
    return dict(config)
