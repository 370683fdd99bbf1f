"""Tiny pipelines of diffusers with random weights, real in every part, tokenizers included.

The list the coroutine family is held to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from engine_builders import tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from engine.config import CheckpointSpec
from engine.request import ImageRequest, Option, Picture

SIZE = 32  # pixels
# as many tokens for everybody
PROMPT, OTHER_PROMPT = "a red circle on the blue background", "a red square on the blue background"


@dataclass(frozen=True)
class Tiny:
    """One pipeline: how it is built, and what a call of it needs besides a prompt."""

    build: Callable[[], diffusers.DiffusionPipeline]
    options: Mapping[str, Option] = field(default_factory=dict)  # of every call
    pictures: tuple[str, ...] = ()  # of init_image, mask, control_image
    rows: tuple[int, int] = (1, 2)  # of a forward, without and with guidance
    guidance: str = "guidance_scale"  # the argument that guidance becomes
    unguided: float = 1.0  # its value for no guidance


def save_tiny_pipeline(name: str, folder: Path, seed: int = 0) -> Path:
    """A pipeline folder as `save_pretrained` writes it, some hundred kilobytes."""
    torch.manual_seed(seed)
    pipe = (PIPELINES | OTHERS)[name].build()
    pipe.save_pretrained(folder)
    return folder


def a_pipeline_spec(name: str, path: Path, **changes) -> CheckpointSpec:
    given = {
        "name": "tiny",
        "path": str(path),
        "family": "pipeline",
        "sizes": ((SIZE, SIZE),),
        "samplers": ("default",),
        "options": (PIPELINES | OTHERS)[name].options,
    }
    return CheckpointSpec(**given | changes)


def a_pipeline_request(name: str, id: str = "image", **changes) -> ImageRequest:
    """A request with every picture this pipeline takes."""
    pictures = {"init_image": a_picture(1), "mask": a_mask(), "control_image": a_picture(2)}
    given = {
        "id": id,
        "group": f"job of {id}",
        "checkpoint": "tiny",
        "prompt": PROMPT,
        "width_px": SIZE,
        "height_px": SIZE,
        "num_steps": 3,
        "guidance": 3.0,
        "sampler": "default",
        "seed": 7,
        "strength": 1.0,
    }
    return ImageRequest(
        **given
        | {field: pictures[field] for field in (PIPELINES | OTHERS)[name].pictures}
        | changes
    )


def a_picture(seed: int, size: int = SIZE) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def a_mask(size: int = SIZE) -> Picture:
    mask = np.zeros((size, size), np.uint8)
    mask[: size // 2] = 255
    return Picture(mask)


# --- the parts they are made of ---


def a_clip(kind=transformers.CLIPTextModel, **changes):
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    given = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "projection_dim": 32,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|startoftext|>"),
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return kind(transformers.CLIPTextConfig(**given | changes))


def a_t5_tokenizer():
    """Knows letters, not words."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def a_t5():
    config = transformers.T5Config(
        vocab_size=len(a_t5_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def a_qwen_tokenizer():
    """Knows bytes, not words. The chat template is the shape of Qwen's."""
    alphabet = sorted(ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def a_gemma_tokenizer():
    """Knows letters, not words."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: index for index, token in enumerate([*special, *"▁abcdefghijklmnopqrstuvwxyz"])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[])


def a_vae(latent_channels: int = 4, **changes) -> AutoencoderKL:
    """Two pixels per latent."""
    given = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
        "sample_size": SIZE,
    }
    return AutoencoderKL(**given | changes)


def a_vae_of_four_pixels() -> AutoencoderKL:
    """Four pixels per latent: a UNet is slow."""
    return a_vae(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


UNET_BLOCKS = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def a_unet(**changes) -> diffusers.UNet2DConditionModel:
    given = {
        "sample_size": SIZE // 4,
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 32,
    }
    return diffusers.UNet2DConditionModel(**UNET_BLOCKS | given | changes)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# --- the pipelines ---


def a_stable_diffusion(kind=diffusers.StableDiffusionPipeline, **more):
    return kind(
        tokenizer=tiny_tokenizer(),
        text_encoder=a_clip(),
        unet=a_unet(),
        vae=a_vae_of_four_pixels(),
        scheduler=diffusers.PNDMScheduler(
            **NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def a_stable_diffusion_controlnet():
    controlnet = diffusers.ControlNetModel(
        **UNET_BLOCKS, cross_attention_dim=32, conditioning_embedding_out_channels=(8, 8, 16)
    )
    # its last layers are born as zeros, and would control nothing
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return a_stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet)


def an_instruct_pix2pix():
    """Gives the size of its picture: its call takes none."""
    pipe = a_stable_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline)
    pipe.register_modules(unet=a_unet(in_channels=8))
    return pipe


def a_stable_diffusion_xl():
    unet = a_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        transformer_layers_per_block=(2,),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder=a_clip(),
        text_encoder_2=a_clip(transformers.CLIPTextModelWithProjection),
        unet=unet,
        vae=a_vae_of_four_pixels(),
        scheduler=diffusers.EulerDiscreteScheduler(
            **NOISE, timestep_spacing="leading", steps_offset=1
        ),
    )


def a_stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
    )
    clip = partial(a_clip, transformers.CLIPTextModelWithProjection, hidden_size=16)
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        tokenizer_3=a_t5_tokenizer(),
        text_encoder=clip(),
        text_encoder_2=clip(),
        text_encoder_3=a_t5(),
        transformer=transformer,
        vae=a_vae(shift_factor=0.06),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def a_flux(kind=diffusers.FluxPipeline):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return kind(
        tokenizer=tiny_tokenizer(),
        tokenizer_2=a_t5_tokenizer(),
        text_encoder=a_clip(),
        text_encoder_2=a_t5(),
        transformer=transformer,
        vae=a_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def a_chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return diffusers.ChromaPipeline(
        tokenizer=a_t5_tokenizer(),
        text_encoder=a_t5(),
        transformer=transformer,
        vae=a_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def a_pixart_sigma():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=SIZE // 2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=a_t5_tokenizer(),
        text_encoder=a_t5(),
        transformer=transformer,
        vae=a_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def a_sana():
    tokenizer = a_gemma_tokenizer()
    blocks = ("ResBlock", "EfficientViTBlock")
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def a_qwen_image():
    tokenizer = a_qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "mrope_section": [1, 1, 2],
            "rope_type": "default",
            "rope_theta": 1000000.0,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    special = {
        "image_token_id": 1,
        "video_token_id": 1,
        "vision_start_token_id": 1,
        "vision_end_token_id": 1,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return diffusers.QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def a_z_image():
    tokenizer = a_qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    # born as whatever lay in memory
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    return diffusers.ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        transformer=transformer,
        vae=a_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def a_ddim():
    """No prompt, no VAE, nothing to have two of; its network gives an output object, and it gives
    an array.
    """
    unet = diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


OTHERS = {
    "ddim": Tiny(a_ddim, rows=(1, 1)),
    "instruct-pix2pix": Tiny(an_instruct_pix2pix, pictures=("init_image",), rows=(1, 3)),
}

PIPELINES: dict[str, Tiny] = {
    "sd": Tiny(a_stable_diffusion),
    "sd-img2img": Tiny(
        partial(a_stable_diffusion, diffusers.StableDiffusionImg2ImgPipeline),
        pictures=("init_image",),
    ),
    "sd-inpaint": Tiny(
        partial(a_stable_diffusion, diffusers.StableDiffusionInpaintPipeline),
        pictures=("init_image", "mask"),
    ),
    "sd-controlnet": Tiny(a_stable_diffusion_controlnet, pictures=("control_image",)),
    "sdxl": Tiny(a_stable_diffusion_xl),
    "sd3": Tiny(a_stable_diffusion_3, {"max_sequence_length": 40}),
    "flux": Tiny(a_flux, {"max_sequence_length": 40}, rows=(1, 1)),
    "flux-kontext": Tiny(
        partial(a_flux, diffusers.FluxKontextPipeline),
        {"max_sequence_length": 40, "max_area": SIZE * SIZE, "_auto_resize": False},
        pictures=("init_image",),
        rows=(1, 1),
    ),
    "chroma": Tiny(a_chroma, {"max_sequence_length": 40}, rows=(1, 1)),
    "pixart-sigma": Tiny(
        a_pixart_sigma,
        {"max_sequence_length": 40, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Tiny(
        a_sana,
        {
            "max_sequence_length": 40,
            "use_resolution_binning": False,
            "complex_human_instruction": "",
        },
    ),
    "qwen-image": Tiny(a_qwen_image, rows=(1, 1), guidance="true_cfg_scale"),
    "z-image": Tiny(a_z_image, {"max_sequence_length": 100}, unguided=0.0),
}
