"""Tiny SD3 and FLUX checkpoints with random weights, real in every part.

Three text encoders and two, tokenizers, transformer, VAE.
"""

from pathlib import Path

import torch
from engine_builders import SIZE, WORDS, tiny_tokenizer
from tiny_checkpoints import TINY_VAE, tiny_clip_config

T5_WIDTH = 96
SD3_SCHEDULER = {"shift": 3.0}  # as SD3 and SD3.5
# as FLUX.1 dev and Fill
DEV_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL_SCHEDULER = {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15}


def tiny_t5_tokenizer():
    """A real T5 tokenizer: every letter, the bare words of the CLIP one."""
    from transformers import T5TokenizerFast

    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [(f"▁{word}", -3.0) for word in WORDS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=512)


def tiny_t5():
    """A T5 encoder for `tiny_t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tiny_t5_tokenizer()),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def tiny_vae(latent_channels):
    """An 8x VAE with a shift, without quantisation layers, as SD3 and FLUX have them."""
    from diffusers import AutoencoderKL

    shifted = {
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(latent_channels=latent_channels, **TINY_VAE | shifted)


def save_tiny_sd3(folder: Path, *, scheduler=SD3_SCHEDULER, with_t5=True, seed=0) -> Path:
    """A StableDiffusion3Pipeline folder; SD3.5's second attention in its first layer."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    pipe = StableDiffusion3Pipeline(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        tokenizer_3=tiny_t5_tokenizer() if with_t5 else None,
        text_encoder=CLIPTextModelWithProjection(tiny_clip_config(32, projection_dim=24)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(48, projection_dim=40)),
        text_encoder_3=tiny_t5() if with_t5 else None,
        transformer=_lively(
            SD3Transformer2DModel(
                sample_size=SIZE // 8,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=64,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            )
        ),
        vae=tiny_vae(16),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    pipe.save_pretrained(folder)
    return folder


def save_tiny_flux(
    folder: Path, *, scheduler=DEV_SCHEDULER, guidance_embeds=True, context_channels=0, seed=0
) -> Path:
    """A FluxPipeline folder: like dev, or like schnell without `guidance_embeds`, or like Fill with
    4 + 64 `context_channels`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    pipe = FluxPipeline(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_t5_tokenizer(),
        text_encoder=CLIPTextModel(tiny_clip_config(32)),
        text_encoder_2=tiny_t5(),
        transformer=_lively(
            FluxTransformer2DModel(
                in_channels=4 * (4 + context_channels),
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=32,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        vae=tiny_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    pipe.save_pretrained(folder)
    return folder


def _lively(transformer):
    """Weights large enough that text, time and guidance can be seen in the prediction."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return transformer
