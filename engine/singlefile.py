"""Make a checkpoint folder of a single file in the layout of the original repositories.

SD 1.x, SD 2.x and SDXL, their inpainting networks too, offline. The weights are diffusers' own
conversion of the file's; configurations and CLIP's vocabulary lie in `originals/`, or come from a
folder of the same architecture. The folder is written whole or not at all. No pickle is read.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.errors import CheckpointCorrupt
from engine.folders import INDEX, PARTS
from engine.inspection import FILE_PARTS, Inspection, inspect

ORIGINALS = Path(__file__).parent / "originals"
KINDS = {"Stable Diffusion 1.x": "sd1", "Stable Diffusion 2.x": "sd2", "SDXL": "sdxl"}
PREDICTIONS = ("epsilon", "v_prediction")
SD2_EPSILON_SIDE = 64  # latents: SD 2 base, which predicts noise, was made for 512 pixels
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}

State = dict[str, Tensor]
Configs = dict[str, dict[str, Any]]


def import_file(
    file: Path, folder: Path, *, like: Path | None = None, prediction: str | None = None
) -> Inspection:
    """Write the checkpoint of a single file to `folder`, which must not be there; look at it.

    like: a folder of the same architecture, whose configurations and vocabularies are taken, and
    the parts that the file lacks.  prediction: what the network predicts, where the file does not
    say so.  Raises `CheckpointCorrupt`, which names what does not fit.
    """
    found = inspect(file)
    if found.kind != "single file" or found.title not in KINDS:
        reason = "; ".join(found.missing) or f"is a {found.title}, not a checkpoint"
        raise CheckpointCorrupt(file.name, reason)
    if found.missing and like is None:
        raise CheckpointCorrupt(file.name, "; ".join(found.missing))
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(file, unfinished, found, like, prediction)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return inspect(folder)


def _write(
    file: Path, folder: Path, found: Inspection, like: Path | None, prediction: str | None
) -> None:
    told = prediction or found.prediction
    if like is None:
        configs = _known_configs(found, told)
    else:
        configs = {part: _config_of(like, part) for part in (*PARTS[found.family],)}
    configs["unet"]["in_channels"] = _input_channels(file)
    folder.mkdir(parents=True)
    for part in PARTS[found.family]:
        if part == "scheduler":
            if like is not None and prediction is not None:
                configs[part]["prediction_type"] = prediction
            _write_json(folder / part / "scheduler_config.json", configs[part])
        elif part.startswith("tokenizer") and like is None:
            _write_tokenizer(folder / part, configs[part])
        elif part.startswith("tokenizer") or part not in {each.name for each in found.parts}:
            assert like is not None, part
            shutil.copytree(like / part, folder / part)
        else:
            _write_network(file, folder, part, configs[part])
    _write_json(folder / INDEX, _index(found, configs, like))


# --- configurations -------------------------------------------------------------------------------


def _known_configs(found: Inspection, prediction: str) -> Configs:
    """Return the configurations that every file of this kind has."""
    kind = KINDS[found.title]
    configs: Configs = json.loads((ORIGINALS / f"{kind}.json").read_text())
    configs["scheduler"]["prediction_type"] = prediction
    if found.zero_snr:
        configs["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if kind == "sd2" and prediction == "epsilon":
        configs["unet"] |= {"sample_size": SD2_EPSILON_SIDE, "upcast_attention": False}
    return configs


def _config_of(like: Path, part: str) -> dict[str, Any]:
    """Read the configuration of another folder's part. Raises `CheckpointCorrupt`."""
    if part.startswith("tokenizer"):
        return {}
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    try:
        config: dict[str, Any] = json.loads((like / part / name).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt(str(like / part / name), str(problem)) from problem
    return config


def _input_channels(file: Path) -> int:
    """Return how many channels the UNet takes: 4, or 9 with a mask and a picture."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    with safe_open(file, "pt") as tensors:
        if name not in tensors.keys():  # noqa: SIM118  it is no mapping
            raise CheckpointCorrupt(file.name, f"lacks {name}")
        channels = int(tensors.get_slice(name).get_shape()[1])
    if channels not in (4, 9):
        reason = f"its UNet takes {channels} channels, neither 4 nor 9: a network of another task"
        raise CheckpointCorrupt(file.name, reason)
    return channels


def _index(found: Inspection, configs: Configs, like: Path | None) -> dict[str, Any]:
    """Return the index of the folder's parts."""
    name = "StableDiffusionXLPipeline" if found.family == "sdxl" else "StableDiffusionPipeline"
    if configs["unet"]["in_channels"] == 9:
        name = name.replace("Pipeline", "InpaintPipeline")
    scheduler = ["diffusers", configs["scheduler"]["_class_name"]]
    parts = {"scheduler": scheduler, **{part: list(CLASSES[part]) for part in _parts_of(found)}}
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    index |= dict(sorted(parts.items()))
    if found.family == "sd":
        unused = {"safety_checker": [None, None], "feature_extractor": [None, None]}
        return index | unused | {"requires_safety_checker": False}
    zeros = True
    if like is not None and (like / INDEX).is_file():
        told = json.loads((like / INDEX).read_text())
        zeros = bool(told.get("force_zeros_for_empty_prompt", True))
    return index | {"force_zeros_for_empty_prompt": zeros}


def _parts_of(found: Inspection) -> list[str]:
    return [part for part in PARTS[found.family] if part != "scheduler"]


def _write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Write CLIP's vocabulary: bytes, bytes that end a word, what merges make of them, marks."""
    merges = gzip.decompress((ORIGINALS / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    letters = _letters_of_bytes()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def _letters_of_bytes() -> list[str]:
    """Return the letter that stands for each byte, in the order of CLIP's vocabulary.

    Bytes that are printable stand for themselves; the others come behind, as letters above 255.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


# --- weights --------------------------------------------------------------------------------------


def _write_network(file: Path, folder: Path, part: str, config: Mapping[str, Any]) -> None:
    """Convert one part of the file, and save it with its configuration."""
    state = _tensors_under(file, FILE_PARTS[part])
    with init_empty_weights(include_buffers=False):
        network = _NETWORKS[part](dict(config))
    converted = _converted(part, network, state, config)
    wanted = network.state_dict()
    kept = {name: tensor for name, tensor in converted.items() if name in wanted}
    for name, meant in wanted.items():
        if name not in kept:
            raise CheckpointCorrupt(file.name, f"{part} lacks {name}")
        if kept[name].shape != meant.shape:
            reason = (
                f"{name} of {part} is {list(kept[name].shape)} where {list(meant.shape)} is "
                "expected: a network of another shape; name a folder of its kind with --like"
            )
            raise CheckpointCorrupt(file.name, reason)
    network.load_state_dict(kept, assign=True)
    network.save_pretrained(folder / part, max_shard_size="100GB")


def _tensors_under(file: Path, prefixes: tuple[str, ...]) -> State:
    """Read the tensors of one part; the rest of the file stays where it is."""
    try:
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in names}
    except Exception as problem:
        raise CheckpointCorrupt(file.name, f"cannot be read: {problem}") from problem


def _converted(part: str, network: nn.Module, state: State, config: Mapping[str, Any]) -> State:
    """Translate names and layouts to those of the network's class.

    Raises `CheckpointCorrupt` for what diffusers cannot translate.
    """
    try:
        converted = _translated(part, network, state, config)
    except (KeyError, AttributeError, IndexError, RuntimeError) as problem:
        reason = f"{part} cannot be converted: {problem!r}"
        raise CheckpointCorrupt(part, reason) from problem
    wanted = network.state_dict()
    fitting = (name.removeprefix("text_model.") for name in converted)
    renamed = dict(zip(converted, fitting, strict=True))
    return {
        name if name in wanted else renamed[name]: tensor.contiguous()
        for name, tensor in converted.items()
        if tensor is not None
    }


def _translated(part: str, network: Any, state: State, config: Mapping[str, Any]) -> State:
    if part == "unet":
        return dict(convert_ldm_unet_checkpoint(state, dict(network.config)))
    if part == "vae":
        return dict(convert_ldm_vae_checkpoint(state, dict(network.config)))
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model."):
        if any(name.startswith(prefix) for name in state):
            model = getattr(network, "text_model", network)
            return dict(convert_open_clip_checkpoint(model, state, prefix=prefix))
    return dict(convert_ldm_clip_checkpoint(state))


def _of_diffusers(kind: Any, config: dict[str, Any]) -> Any:
    return kind.from_config(config)


def _of_transformers(kind: Any, config: dict[str, Any]) -> Any:
    return kind(CLIPTextConfig(**config))


_NETWORKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unet": partial(_of_diffusers, UNet2DConditionModel),
    "vae": partial(_of_diffusers, AutoencoderKL),
    "text_encoder": partial(_of_transformers, CLIPTextModel),
    "text_encoder_2": partial(_of_transformers, CLIPTextModelWithProjection),
}
