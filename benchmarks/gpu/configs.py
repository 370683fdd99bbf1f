"""The networks of each family in three sizes, as their diffusers classes take them.

`full` are the configs published with stable-diffusion-xl-base-1.0 and FLUX.1-dev.
"""

from typing import Any

SIDES = {"full": 1024, "small": 256, "tiny": 64}  # pixels along a side

SAMPLERS = {
    "sd": ("euler", "ddim", "dpmpp_2m"),
    "sdxl": ("euler", "ddim", "dpmpp_2m"),
    "sd3": ("flow_euler", "flow_dpmpp_2m"),
    "flux": ("flow_euler", "flow_dpmpp_2m"),
}

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_SD3_FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
_FLUX_FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _clip(width: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "bos_token_id": 510,
        "eos_token_id": 511,
        "pad_token_id": 511,
        **more,
    }


def _t5(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "d_model": width,
        "d_kv": 64,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def _vae(widths: tuple[int, ...], *, layers: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        **more,
    }


_FULL_VAE: dict[str, Any] = {"widths": (128, 256, 512, 512), "layers": 2, "groups": 32}
_SMALL_VAE: dict[str, Any] = {"widths": (32, 32, 64, 64), "layers": 1, "groups": 16}
_TINY_VAE = {"widths": (8, 8, 8, 8), "layers": 1, "groups": 4}
_SHIFTED: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}


def _unet(
    widths: tuple[int, int], heads: tuple[int, int], groups: int, **more: Any
) -> dict[str, Any]:
    return {
        "sample_size": 32,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "attention_head_dim": heads,  # by the class's old name; it counts heads
        "norm_num_groups": groups,
        **more,
    }


def _sd(
    widths: tuple[int, int],
    heads: tuple[int, int],
    groups: int,
    text_width: int,
    vae: dict[str, Any],
) -> dict[str, Any]:
    return {
        "unet": _unet(
            widths,
            heads,
            groups,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
        ),
        "text_encoder": _clip(text_width, 2),
        "vae": _vae(**vae, latent_channels=4),
        "scheduler": _BETAS,
    }


def _sdxl(
    widths: tuple[int, int],
    heads: tuple[int, int],
    groups: int,
    text_width: int,
    vae: dict[str, Any],
) -> dict[str, Any]:
    return {
        "unet": _unet(
            widths,
            heads,
            groups,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * text_width,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + text_width,
        ),
        "text_encoder": _clip(text_width, 2),
        "text_encoder_2": _clip(text_width, 2, projection_dim=text_width),
        "vae": _vae(**vae, latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        "scheduler": _BETAS,
    }


def _sd3(
    heads: int, head_width: int, layers: int, text_width: int, side: int, vae: dict[str, Any]
) -> dict[str, Any]:
    return {
        "transformer": {
            "sample_size": side,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": head_width,
            "caption_projection_dim": heads * head_width,
            "joint_attention_dim": 2 * text_width,
            "pooled_projection_dim": 2 * text_width,
            "pos_embed_max_size": side,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        "text_encoder": _clip(text_width, 2, projection_dim=text_width),
        "text_encoder_2": _clip(text_width, 2, projection_dim=text_width),
        "text_encoder_3": _t5(2 * text_width),
        "vae": _vae(
            **vae, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **_SHIFTED
        ),
        "scheduler": _SD3_FLOW,
    }


def _flux(
    heads: int,
    axes: tuple[int, int, int],
    layers: int,
    single_layers: int,
    text_width: int,
    pooled_width: int,
    vae: dict[str, Any],
) -> dict[str, Any]:
    return {
        "transformer": {
            "in_channels": 64,
            "num_layers": layers,
            "num_single_layers": single_layers,
            "attention_head_dim": sum(axes),
            "num_attention_heads": heads,
            "joint_attention_dim": text_width,
            "pooled_projection_dim": pooled_width,
            "guidance_embeds": True,
            "axes_dims_rope": axes,
        },
        "text_encoder": _clip(pooled_width, 2),
        "text_encoder_2": _t5(text_width),
        "vae": _vae(
            **vae, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **_SHIFTED
        ),
        "scheduler": _FLUX_FLOW,
    }


FULL_SDXL = {
    "unet": {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "norm_num_groups": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": _clip(768, 12),
    "text_encoder_2": _clip(1280, 20, projection_dim=1280),
    "vae": _vae(
        **_FULL_VAE, latent_channels=4, scaling_factor=0.13025, force_upcast=True, sample_size=1024
    ),
    "scheduler": _BETAS,
}

CONFIGS: dict[tuple[str, str], dict[str, Any]] = {
    ("sdxl", "full"): FULL_SDXL,
    ("flux", "full"): _flux(24, (16, 56, 56), 19, 38, 4096, 768, _FULL_VAE),
    ("sd", "small"): _sd((128, 256), (2, 4), 32, 128, _SMALL_VAE),
    ("sdxl", "small"): _sdxl((128, 256), (2, 4), 32, 128, _SMALL_VAE),
    ("sd3", "small"): _sd3(4, 64, 3, 128, 32, _SMALL_VAE),
    ("flux", "small"): _flux(4, (16, 24, 24), 2, 4, 256, 128, _SMALL_VAE),
    ("sd", "tiny"): _sd((16, 32), (2, 4), 8, 32, _TINY_VAE),
    ("sdxl", "tiny"): _sdxl((16, 32), (2, 4), 8, 32, _TINY_VAE),
    ("sd3", "tiny"): _sd3(4, 8, 2, 32, 8, _TINY_VAE),
    ("flux", "tiny"): _flux(2, (4, 6, 6), 1, 1, 64, 32, _TINY_VAE),
}
"""By family and size."""
