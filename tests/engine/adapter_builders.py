"""Tiny networks of every family, and LoRA files for them with random weights, in the words of peft
and of kohya.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from engine.adapters import AdapterBank
from engine.config import AdapterSpec


def a_unet(**changes) -> nn.Module:
    """Like SD 1.5: attention behind convolutions of one pixel."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return _still(UNet2DConditionModel(**config | changes))


def an_sdxl_unet() -> nn.Module:
    """Like SDXL: pooled text and sizes through an embedding of their own."""
    return a_unet(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def an_sd3_transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return _still(
        SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )


def a_flux_transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return _still(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


def a_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return _still(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=100,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=99,
            )
        )
    )


ROWS = 4


def call_unet(network: nn.Module, dtype: torch.dtype, order: Sequence[int] = range(ROWS)) -> Tensor:
    """One forward of four strangers at different timesteps, in any order.

    So do the others below.
    """
    inputs = _drawn(order, dtype, latents=(4, 8, 8), text=(7, 16))
    return network(inputs["latents"], _timesteps(order), inputs["text"], return_dict=False)[0]


def call_sdxl_unet(
    network: nn.Module, dtype: torch.dtype, order: Sequence[int] = range(ROWS)
) -> Tensor:
    inputs = _drawn(order, dtype, latents=(4, 8, 8), text=(7, 16), pooled=(16,), sizes=(6,))
    conditions = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
    return network(
        inputs["latents"],
        _timesteps(order),
        inputs["text"],
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]


def call_sd3_transformer(
    network: nn.Module, dtype: torch.dtype, order: Sequence[int] = range(ROWS)
) -> Tensor:
    inputs = _drawn(order, dtype, latents=(16, 8, 8), text=(7, 16), pooled=(16,))
    return network(
        inputs["latents"], inputs["text"], inputs["pooled"], _timesteps(order), return_dict=False
    )[0]


def call_flux_transformer(
    network: nn.Module, dtype: torch.dtype, order: Sequence[int] = range(ROWS)
) -> Tensor:
    inputs = _drawn(order, dtype, latents=(16, 16), text=(7, 16), pooled=(16,))
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)
    return network(
        hidden_states=inputs["latents"],
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        timestep=_timesteps(order).to(dtype) / 1000,
        img_ids=places,
        txt_ids=torch.zeros(7, 3),
        guidance=torch.full((len(order),), 3.5),
        return_dict=False,
    )[0]


def call_text_encoder(
    network: nn.Module, dtype: torch.dtype, order: Sequence[int] = range(ROWS)
) -> Tensor:
    tokens = torch.randint(1, 98, (ROWS, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 99
    return network(tokens[list(order)])[0]


@dataclass(frozen=True)
class Subject:
    """A kind of network an adapter can lie over."""

    name: str  # as diffusers names its folder
    build: Callable[[], nn.Module]
    call: Callable[..., Tensor]


SUBJECTS = {
    "sd": Subject("unet", a_unet, call_unet),
    "sdxl": Subject("unet", an_sdxl_unet, call_sdxl_unet),
    "sd3": Subject("transformer", an_sd3_transformer, call_sd3_transformer),
    "flux": Subject("transformer", a_flux_transformer, call_flux_transformer),
    "clip": Subject("text_encoder", a_text_encoder, call_text_encoder),
}


def adapted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Every layer a LoRA may change."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def lora_tensors(
    network: nn.Module,
    *,
    prefix: str,
    seed: int,
    rank: int = 4,
    only: Callable[[str], bool] = lambda name: True,
):
    """The tensors of a LoRA over the layers whose name `only` accepts, in the words of peft."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in adapted_layers(network).items():
        if only(name):
            out, inside, *kernel = layer.weight.shape
            size = (inside * (kernel[0] * kernel[1] if kernel else 1)) ** -0.5
            tensors[f"{prefix}.{name}.lora_A.weight"] = (
                torch.randn(rank, inside, *kernel, generator=generator) * size
            )
            tensors[f"{prefix}.{name}.lora_B.weight"] = (
                torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * rank**-0.5
            )
    return tensors


def in_kohya_words(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The same LoRA as kohya's trainer would write it."""
    prefixes = {
        "unet": "lora_unet",
        "transformer": "lora_unet",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    renamed = {}
    for key, tensor in tensors.items():
        network, _, rest = key.partition(".")
        layer, _, matrix = rest.removesuffix(".weight").rpartition(".")
        stem = f"{prefixes[network]}_{layer.replace('.', '_')}"
        renamed[f"{stem}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(alpha)
    return renamed


def a_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> AdapterSpec:
    """Write an adapter; its name is the file's."""
    safetensors.torch.save_file(
        {key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata
    )
    return AdapterSpec(name=path.stem, path=str(path))


def a_bank(
    networks: dict[str, nn.Module],
    specs: list[AdapterSpec],
    dtype: torch.dtype = torch.float32,
    **changes,
) -> AdapterBank:
    return AdapterBank(networks, specs, device=torch.device("cpu"), dtype=dtype, **changes)


def _still(network: nn.Module) -> nn.Module:
    """Weights that matter in every layer.

    Some start as zeros, behind which an adapter would go unseen.
    """
    network.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.normal_(
            std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator
        )
    return network


def _drawn(
    order: Sequence[int], dtype: torch.dtype, **shapes: tuple[int, ...]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(ROWS, *shape, generator=generator)[list(order)].to(dtype)
        for name, shape in shapes.items()
    }


def _timesteps(order: Sequence[int]) -> Tensor:
    return torch.linspace(900, 100, ROWS)[list(order)]
