"""Tiny checkpoints of the larger families, pictures to start from, and a way to render with a
family alone.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from engine_builders import SIZE, tiny_tokenizer
from torch import Tensor

from engine.conditioning import ConditioningCache
from engine.device import Device
from engine.families.contract import Family, Recall
from engine.inflight import BatchKey, InFlight, RenderState
from engine.loading import load_checkpoint
from engine.request import ImageRequest, Picture

TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": SIZE,
    "mid_block_add_attention": False,
}


def tiny_clip_config(width: int = 32, **changes):
    """Of a CLIP text encoder of three layers that knows `tiny_tokenizer`."""
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    given = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|startoftext|>"),
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPTextConfig(**given | changes)


def save_tiny_sdxl(
    folder: Path,
    scheduler,
    *,
    in_channels: int = 4,
    zeros_for_no_prompt: bool = True,
    vae=None,
    projection: int = 24,
    seed: int = 0,
) -> Path:
    """A StableDiffusionXLPipeline folder; with 9 `in_channels` it only repaints.

    `vae`: changes to its config. `projection`: the width of its second text encoder's vector.
    """
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder=CLIPTextModel(tiny_clip_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(48, projection_dim=projection)),
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=32 + 48,
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + projection,
        ),
        vae=AutoencoderKL(**TINY_VAE | (vae or {})),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros_for_no_prompt,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def save_repainting(folder: Path, source: Path, seed: int = 0) -> Path:
    """The SD checkpoint at `source` with a UNet of nine input channels, which only repaints."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(source, folder)
    torch.manual_seed(seed)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    return folder


def a_picture(width_px: int = SIZE, height_px: int = SIZE, seed: int = 0) -> Picture:
    """Coloured noise."""
    return Picture(
        np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    )


def a_mask(width_px: int = SIZE, height_px: int = SIZE) -> Picture:
    """Repaint the right half."""
    pixels = np.zeros((height_px, width_px), dtype=np.uint8)
    pixels[:, width_px // 2 :] = 255
    return Picture(pixels)


def a_family(spec) -> Family:
    """The loaded checkpoint, without an engine around it."""
    return load_checkpoint(spec, Device("cpu", num_threads=1)).family


def a_recall() -> Recall:
    """A conditioning cache of its own."""
    cache = ConditioningCache(1 << 20)
    return lambda key, encode: cache.recall("weights", key, encode)


def in_flight(family: Family, request: ImageRequest) -> InFlight:
    """The request as the engine would queue it for this family."""
    family.check(request)
    key = BatchKey(
        request.checkpoint, request.height_px, request.width_px, family.text_length(request)
    )
    return InFlight(request=request, batch_key=key, rows=family.rows(request))


def started(family: Family, request: ImageRequest) -> InFlight:
    """The image with its prompts encoded and its noise drawn."""
    image = in_flight(family, request)
    with torch.inference_mode():
        family.start(image, a_recall())
    image.state = RenderState.RUNNING
    return image


def denoise(family: Family, image: InFlight, *, bucket_rows: int | None = None) -> InFlight:
    """Step a started image alone to its end, in forwards of its own rows or padded to
    `bucket_rows`.
    """
    with torch.inference_mode():
        while not image.is_denoised:
            family.advance(image, family.predict([image], bucket_rows or image.rows)[0])
    return image


def stepped(family: Family, request: ImageRequest) -> InFlight:
    """The request, rendered alone up to its decode: `stepped(...).tensors.latents`."""
    return denoise(family, started(family, request))


def decoded(family: Family, image: InFlight) -> Tensor:
    """The pixels of a denoised image: [1, 3, h, w]."""
    with torch.inference_mode():
        return family.decode(image)
