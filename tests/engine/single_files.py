"""Tiny checkpoints written as the original repositories write theirs: all parts in one file.

The inverse of what diffusers converts, after its own script for that.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

UNET = "model.diffusion_model"
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_LAYERS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_single_file(folder: Path, file: Path, *, open_clip=False, metadata=None, extra=None):
    """Write the SD or SDXL checkpoint of a folder as one file.

    open_clip: the first text encoder in OpenCLIP's words, as in SD 2.x.
    """
    tensors = unet_in_original_words(folder) | vae_in_original_words(folder)
    if (folder / "text_encoder_2").is_dir():
        first = clip(folder / "text_encoder", "conditioner.embedders.0.transformer.")
        second = in_open_clip_words(folder / "text_encoder_2", "conditioner.embedders.1.model.")
        tensors |= first | second
    elif open_clip:
        tensors |= in_open_clip_words(folder / "text_encoder", "cond_stage_model.model.")
    else:
        tensors |= clip(folder / "text_encoder", "cond_stage_model.transformer.")
    tensors |= extra or {}
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata=metadata)
    return file


def unet_in_original_words(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "unet/config.json").read_text())
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    return {
        f"{UNET}.{unet_name(name, config['layers_per_block'], tensors)}": tensor
        for name, tensor in tensors.items()
    }


def unet_name(name: str, layers: int, names) -> str:
    for ours, theirs in UNET_LAYERS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    rest = re.sub(r"^(down_blocks|up_blocks|mid_block)(\.\d+)?", "", name)
    if ".resnets." in name:
        for ours, theirs in RESNET.items():
            rest = rest.replace(f".{ours}.", f".{theirs}.")
    if name.startswith("mid_block"):
        kind, number, *more = rest.lstrip(".").split(".")
        place = 1 if kind == "attentions" else 2 * int(number)
        return ".".join(["middle_block", str(place), *more])
    side, block, kind, number, *_ = name.split(".")
    more = rest.lstrip(".").split(".")[2:]
    first = (layers + 1) * int(block)
    if kind == "downsamplers":
        return ".".join([f"input_blocks.{first + layers + 1}.0.op", more[-1]])
    if kind == "upsamplers":
        attends = any(each.startswith(f"up_blocks.{block}.attentions") for each in names)
        return ".".join([f"output_blocks.{first + layers}.{2 if attends else 1}", *more])
    place = first + int(number) + (1 if side == "down_blocks" else 0)
    which = "input_blocks" if side == "down_blocks" else "output_blocks"
    return ".".join([which, str(place), "1" if kind == "attentions" else "0", *more])


def vae_in_original_words(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    blocks = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])

    def word(name: str) -> str:
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        upward = lambda m: f"up.{blocks - 1 - int(m[1])}."  # noqa: E731
        name = re.sub(r"up_blocks\.(\d)\.", upward, name)
        name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        if "attn_1" in name:
            pairs = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
            for ours, theirs in {**pairs, "to_out.0": "proj_out"}.items():
                name = name.replace(ours, theirs)
        return f"first_stage_model.{name}"

    return {
        word(name): tensor[..., None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def clip(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in tensors.items()
    }


def in_open_clip_words(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    renamed = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": tensors.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": tensors.pop("final_layer_norm.weight"),
        "ln_final.bias": tensors.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in tensors:
        renamed["text_projection"] = tensors.pop("text_projection.weight").T
    for name in [*tensors]:
        if ".self_attn.q_proj." in name:
            stem, kind = name.split(".self_attn.q_proj.")
            parts = [tensors[f"{stem}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            layer = stem.replace("encoder.layers.", "transformer.resblocks.")
            renamed[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in tensors.items():
        if not re.search(r"self_attn\.[qkv]_proj", name) and name.startswith("encoder."):
            word = name.replace("encoder.layers.", "transformer.resblocks.")
            for ours, theirs in OPEN_CLIP.items():
                word = word.replace(f".{ours}.", f".{theirs}.")
            renamed[word] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}
