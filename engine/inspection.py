"""Tell what a checkpoint folder, a single file or an adapter is, by its configs and headers alone.

Nothing is loaded and no torch is imported, so any checkpoint is looked at in milliseconds. What
only loading can show (a tensor that lacks, a pipeline that cannot be called) is not told here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointCorrupt
from engine.folders import (
    INDEX,
    PARTS,
    check_weights,
    classes_of,
    part_names,
    read_files,
    read_index,
    unread_files,
    variant_of,
)
from engine.headers import DTYPE_NAMES, Header, TensorHeader, linear_weights, read_header

# Pipeline classes that a native family follows; every other is of family "pipeline".
NATIVE_CLASSES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "FluxInpaintPipeline": "flux",
    "FluxFillPipeline": "flux",
}
TRANSFORMERS = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
# Endings of the names of classes that have no weights.
_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: a folder, or all tensors under one prefix of a single file."""

    name: str
    kind: str  # the class that reads it; "" where nobody says
    num_values: int = 0  # of its weights
    num_linear_values: int = 0  # of these, in layers that can be quantised
    dtypes: tuple[str, ...] = ()  # "fp16", the most frequent in front
    size_bytes: int = 0  # of all its files that are read
    num_shards: int = 0  # files of weights
    variant: str | None = None  # the variant that is read; None: the plain weights
    unread: tuple[str, ...] = ()  # files beside them that are never read
    unread_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is."""

    path: Path
    kind: str  # "folder", "single file" or "adapter"
    family: str  # of fleet.toml; of an adapter, that of its base; "" where nobody can tell
    title: str  # for people: "SDXL", "FLUX.1 Fill"
    pipeline_class: str = ""
    # "epsilon", "v_prediction", "sample" or "flow"; "" where nobody says.
    prediction: str = ""
    is_prediction_assumed: bool = False  # nothing in the file says it
    zero_snr: bool = False  # trained down to a signal of zero
    scheduler: str = ""  # the class that its configuration names
    few_steps: bool = False  # distilled to a few steps
    guidance_distilled: bool | None = None  # family flux: guidance is an input of the network
    only_repaints: bool = False  # needs a picture and a mask
    native_side_px: int | None = None  # it was made for squares of this side
    side_multiple_px: int = 8
    parts: tuple[Part, ...] = ()
    missing: tuple[str, ...] = ()  # one sentence each; with any of them it cannot be loaded
    notes: tuple[str, ...] = ()
    # Of an adapter.
    rank: int | None = None
    num_layers: int = 0
    trigger_words: tuple[str, ...] = ()

    @property
    def num_values(self) -> int:
        """Return how many numbers its weights hold."""
        return sum(part.num_values for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files that are read."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Return the types of its weights, that of the largest part in front."""
        parts = sorted(self.parts, key=lambda part: -part.num_values)
        return tuple(dict.fromkeys(dtype for part in parts for dtype in part.dtypes))

    def weights_bytes(self, precision: str, *, is_quantised: bool = False) -> int:
        """Return the device memory of its weights as fp32, fp16 or bf16; images come on top.

        is_quantised: to 8 bits, where they can be; the scales are not counted.
        """
        small = sum(part.num_linear_values for part in self.parts) if is_quantised else 0
        return (self.num_values - small) * (4 if precision == "fp32" else 2) + small


def inspect(path: Path) -> Inspection:
    """Look at a folder or a safetensors file.

    Raises `CheckpointCorrupt` for what is neither, or cannot be read at all; what merely lacks
    something is told in `missing`.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CheckpointCorrupt(str(path), "is not there")
    if path.suffix != ".safetensors":
        reason = "is neither a folder nor a .safetensors file; pickles are never read"
        raise CheckpointCorrupt(path.name, reason)
    header = read_header(path)
    return _adapter(path, header) if _is_adapter(header) else _single_file(path, header)


# --- folders --------------------------------------------------------------------------------------


@dataclass
class _Findings:
    """What is found on the way through a folder."""

    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _folder(path: Path) -> Inspection:
    found = _Findings()
    index = read_index(path) if (path / INDEX).is_file() else {}
    named_class = str(index.get("_class_name", ""))
    family = _family(path, named_class, found)
    names = part_names(family, path)
    classes = classes_of(index)
    parts = tuple(_part(path, name, classes.get(name, ("", ""))[1], found) for name in names)
    _check_classes(classes, family, found)
    scheduler = _config(path, "scheduler")
    denoiser = _config(path, "unet") or _config(path, "transformer")
    return Inspection(
        path=path,
        kind="folder",
        family=family,
        title=_title(family, named_class, path, denoiser),
        pipeline_class=named_class,
        prediction=_prediction(scheduler),
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        scheduler=str(scheduler.get("_class_name", "")),
        few_steps=_takes_few_steps(scheduler, denoiser, family),
        guidance_distilled=bool(denoiser.get("guidance_embeds")) if family == "flux" else None,
        only_repaints=_only_repaints(path, family, denoiser),
        native_side_px=_native_side_px(path, family, denoiser),
        side_multiple_px=8 if "unet" in names else 16,
        parts=parts,
        missing=tuple(found.missing),
        notes=tuple(found.notes),
    )


def _family(path: Path, named_class: str, found: _Findings) -> str:
    """Tell the family that serves a folder: a native one where it can, else "pipeline"."""
    family = NATIVE_CLASSES.get(named_class, "pipeline" if named_class else _guess(path))
    if family not in PARTS:
        return family
    reason = _unfit_for(family, path)
    if reason:
        found.notes.append(f"family {family} does not serve it: {reason}")
        return "pipeline"
    return family


def _guess(path: Path) -> str:
    """Tell the family by the folders that are there. Raises `CheckpointCorrupt`."""
    transformer = str(_config(path, "transformer").get("_class_name", ""))
    if transformer in TRANSFORMERS:
        return TRANSFORMERS[transformer]
    if (path / "unet").is_dir():
        return "sdxl" if (path / "text_encoder_2").is_dir() else "sd"
    reason = f"holds neither {INDEX} nor a unet or transformer folder: no checkpoint of diffusers"
    raise CheckpointCorrupt(str(path), reason)


def _unfit_for(family: str, path: Path) -> str:
    """Say why a native family does not serve this network; "" where it does."""
    unet = _config(path, "unet")
    if family in ("sd", "sdxl"):
        out_channels = unet.get("out_channels", 4)
        if unet.get("time_cond_proj_dim") is not None:
            return "its UNet takes an embedded guidance scale"
        if unet.get("in_channels", 4) not in (out_channels, 9):
            return f"its UNet takes {unet['in_channels']} channels"
        additions = "text_time" if family == "sdxl" else None
        if unet.get("addition_embed_type") != additions:
            return f"its UNet takes {unet.get('addition_embed_type')} beside the text"
        if family == "sdxl" and not (path / "text_encoder").is_dir():
            return "it has one text encoder, as SDXL's refiner has"
        return ""
    channels = int(_config(path, "transformer").get("in_channels", 16))
    vae = _config(path, "vae")
    latents = int(vae.get("latent_channels", 16))
    if family == "sd3":
        return "" if channels == latents else f"its transformer takes {channels} channels"
    side = _pixels_per_latent(vae)
    fits = channels // 4 in (latents, 2 * latents + side**2)
    return "" if fits else f"its transformer takes {channels // 4} latent channels"


def _part(path: Path, name: str, kind: str, found: _Findings) -> Part:
    """Look at one part; add to `found.missing` what it lacks."""
    folder = path / name
    if not folder.is_dir() or not any(folder.iterdir()):
        found.missing.append(f"{name}: is missing or empty")
        return Part(name, kind)
    kind = kind or str(_config(path, name).get("_class_name", ""))
    try:
        if not _has_weights(name, kind):
            _check_weightless(path, name, found)
            return _weightless_part(folder, name, kind)
        check_weights(path, name)
        if not (folder / "config.json").is_file():
            found.missing.append(f"{name}/config.json: is missing")
        return _network_part(folder, name, kind)
    except CheckpointCorrupt as problem:
        found.missing.append(str(problem))
        return Part(name, kind)


def _has_weights(name: str, kind: str) -> bool:
    if kind:
        return not kind.endswith(_WEIGHTLESS)
    return not name.startswith(("scheduler", "tokenizer", "feature_extractor", "processor"))


def _check_weightless(path: Path, name: str, found: _Findings) -> None:
    files = {file.name for file in (path / name).iterdir()}
    if name == "scheduler" and "scheduler_config.json" not in files:
        found.missing.append("scheduler/scheduler_config.json: is missing")
    knows_words = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
    if name.startswith("tokenizer") and not (knows_words or "spiece.model" in files):
        found.missing.append(
            f"{name}: holds no vocabulary (tokenizer.json, vocab.json with merges.txt, or "
            "spiece.model)"
        )


def _weightless_part(folder: Path, name: str, kind: str) -> Part:
    size_bytes = sum(file.stat().st_size for file in read_files(folder))
    return Part(name, kind, size_bytes=size_bytes)


def _network_part(folder: Path, name: str, kind: str) -> Part:
    """Add up the headers of a network's weights. Raises `CheckpointCorrupt`, naming the file."""
    files = read_files(folder)
    weights = [file for file in files if file.suffix == ".safetensors"]
    named: dict[str, TensorHeader] = {}
    for file in weights:
        try:
            named |= read_header(file).tensors
        except CheckpointCorrupt as problem:
            raise CheckpointCorrupt(f"{name}/{file.name}", problem.problem) from problem
    unread = unread_files(folder)
    tensors = list(named.values())
    return Part(
        name,
        kind,
        num_values=sum(tensor.num_values for tensor in tensors),
        num_linear_values=sum(tensor.num_values for tensor in linear_weights(name, named)),
        dtypes=_dtypes(tensors),
        size_bytes=sum(file.stat().st_size for file in files),
        num_shards=len(weights),
        variant=variant_of(folder),
        unread=tuple(file.name for file in unread),
        unread_bytes=sum(file.stat().st_size for file in unread),
    )


def _dtypes(tensors: Iterable[TensorHeader]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[DTYPE_NAMES.get(tensor.dtype, tensor.dtype.lower())] += tensor.num_values
    return tuple(name for name, _ in counts.most_common())


def _check_classes(classes: Mapping[str, tuple[str, str]], family: str, found: _Findings) -> None:
    if family in PARTS:
        return
    for name, (library, kind) in classes.items():
        if library not in ("diffusers", "transformers"):
            found.missing.append(
                f"{INDEX}: {name} is {kind} of {library}, which is code from elsewhere and "
                "never run"
            )


def _config(path: Path, part: str) -> dict[str, Any]:
    """Read the configuration of a part; {} where there is none that can be read."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    try:
        config = json.loads((path / part / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _prediction(scheduler: Mapping[str, Any]) -> str:
    kind = str(scheduler.get("_class_name", ""))
    told = str(scheduler.get("prediction_type", ""))
    if "FlowMatch" in kind or told == "flow_prediction":
        return "flow"
    return told or ("epsilon" if kind else "")


def _takes_few_steps(
    scheduler: Mapping[str, Any], denoiser: Mapping[str, Any], family: str
) -> bool:
    """Tell whether a checkpoint is distilled to a few steps, as its configuration shows it."""
    kind = str(scheduler.get("_class_name", ""))
    if "LCM" in kind or "TCD" in kind:
        return True
    if family == "flux":
        return not denoiser.get("guidance_embeds")
    is_turbo = scheduler.get("timestep_spacing") == "trailing" and "Euler" in kind
    return family in ("sd", "sdxl") and is_turbo and not scheduler.get("rescale_betas_zero_snr")


def _only_repaints(path: Path, family: str, denoiser: Mapping[str, Any]) -> bool:
    if family in ("sd", "sdxl"):
        return denoiser.get("in_channels") == 9
    latents = int(_config(path, "vae").get("latent_channels", 16))
    return family == "flux" and int(denoiser.get("in_channels", 64)) // 4 != latents


def _native_side_px(path: Path, family: str, denoiser: Mapping[str, Any]) -> int | None:
    side = denoiser.get("sample_size")
    per_latent = _pixels_per_latent(_config(path, "vae"))
    if family == "flux" and side is None:
        return 128 * per_latent  # as its pipeline has it
    if isinstance(side, list) and side:
        side = side[0]
    return side * per_latent if isinstance(side, int) else None


def _pixels_per_latent(vae: Mapping[str, Any]) -> int:
    channels = vae.get("block_out_channels")
    return 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else 8


def _title(family: str, named_class: str, path: Path, denoiser: Mapping[str, Any]) -> str:
    if family == "pipeline":
        return named_class
    repaints = _only_repaints(path, family, denoiser)
    if family == "flux":
        kind = "dev" if denoiser.get("guidance_embeds") else "schnell"
        return f"FLUX.1 {'Fill' if repaints else kind}"
    name = {"sdxl": "SDXL", "sd3": "Stable Diffusion 3"}.get(family, "")
    if family == "sd3" and denoiser.get("qk_norm"):
        name = "Stable Diffusion 3.5"
    if family == "sd":
        width = denoiser.get("cross_attention_dim")
        name = f"Stable Diffusion {2 if width == 1024 else 1 if width == 768 else '1 or 2'}.x"
    return f"{name}, inpainting" if repaints else name


# --- single files ---------------------------------------------------------------------------------

# Prefixes of the parts of a file in the layout of the original repositories.
_UNET = "model.diffusion_model."
FILE_PARTS = {
    "unet": (_UNET,),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
_FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"
_SDXL_MARK = "conditioner.embedders.1."
_SD2_MARK = "cond_stage_model.model."


def _single_file(path: Path, header: Header) -> Inspection:
    tensors = header.tensors
    family, title = _family_of_file(tensors)
    parts = tuple(_part_of_file(name, header) for name in FILE_PARTS)
    present = tuple(part for part in parts if part.num_values)
    missing, notes = _faults_of_file(family, {part.name for part in present})
    first = tensors.get(_FIRST_CONVOLUTION)
    prediction, is_told = prediction_of_file(header, title)
    if family and not is_told:
        notes = (*notes, f"nothing in the file says what it predicts; {prediction} is assumed")
    return Inspection(
        path=path,
        kind="single file",
        family=family,
        title=title,
        prediction=prediction,
        is_prediction_assumed=bool(family) and not is_told,
        zero_snr="ztsnr" in tensors,
        only_repaints=first is not None and first.shape[1:2] == (9,),
        native_side_px=_native_side_of_file(title, prediction),
        parts=present,
        missing=missing,
        notes=notes,
    )


def _family_of_file(tensors: Mapping[str, TensorHeader]) -> tuple[str, str]:
    """Return family and title of a single file; "" for one that nobody knows."""
    names = tensors.keys()
    has_unet = any(name.startswith(f"{_UNET}input_blocks.") for name in names)
    if has_unet and any(name.startswith(_SDXL_MARK) for name in names):
        return "sdxl", "SDXL"
    if has_unet and any(name.startswith(_SD2_MARK) for name in names):
        return "sd", "Stable Diffusion 2.x"
    if has_unet and any(name.startswith("cond_stage_model.transformer.") for name in names):
        return "sd", "Stable Diffusion 1.x"
    if any("double_blocks." in name for name in names):
        return "flux", "FLUX.1"
    if any("joint_blocks." in name for name in names):
        return "sd3", "Stable Diffusion 3"
    if has_unet:
        return "", "a UNet without text encoders"
    return "", "an unknown kind of file"


def _faults_of_file(family: str, present: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a single file lacks, and what else is to be said of it."""
    if family in ("sd", "sdxl"):
        needed = [part for part in PARTS[family] if part in FILE_PARTS]
        lacking = [f"{part}: is not in the file" for part in needed if part not in present]
        return tuple(lacking), ("`./darkroom models import` makes a folder of it",)
    if family:
        reason = f"single files of family {family} are not imported; take the folder of diffusers"
        return (reason,), ()
    return ("it is no checkpoint that Darkroom knows",), ()


def prediction_of_file(header: Header, title: str) -> tuple[str, bool]:
    """Return what the network of a single file predicts, and whether the file says so.

    Where it does not, SD 2.x is taken to predict v (as diffusers takes it), all others noise.
    """
    told = header.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in header.tensors or told.startswith("v"):
        return "v_prediction", True
    if told.startswith("eps"):
        return "epsilon", True
    return ("v_prediction", False) if title == "Stable Diffusion 2.x" else ("epsilon", True)


def _native_side_of_file(title: str, prediction: str) -> int | None:
    if title == "Stable Diffusion 2.x":
        return 768 if prediction == "v_prediction" else 512
    return {"SDXL": 1024, "Stable Diffusion 1.x": 512}.get(title)


def _part_of_file(name: str, header: Header) -> Part:
    tensors = [tensor for key, tensor in header.tensors.items() if key.startswith(FILE_PARTS[name])]
    return Part(
        name,
        "",
        num_values=sum(tensor.num_values for tensor in tensors),
        dtypes=_dtypes(tensors),
        size_bytes=sum(tensor.num_bytes for tensor in tensors),
        num_shards=1 if tensors else 0,
    )


# --- adapters -------------------------------------------------------------------------------------

_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora_linear_layer.down.weight")
_DOWN_OLD = (".lora.down.weight", "_lora.down.weight")
# Parts of names that tell of adapters which are not read, and what those are called.
_STRANGE = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "oft_blocks": "OFT",
    "emb_params": "textual inversion",
}
_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_FAMILIES = {"Stable Diffusion 1.x": "sd", "Stable Diffusion 2.x": "sd", "SDXL": "sdxl"}
_FAMILIES |= {"Stable Diffusion 3": "sd3", "FLUX.1": "flux"}
MOST_TRIGGER_WORDS = 8
MOST_TRIGGER_CHARS = 128


def _is_adapter(header: Header) -> bool:
    return any(
        key.endswith(_DOWN) or key.endswith(_DOWN_OLD) or any(mark in key for mark in _STRANGE)
        for key in header.tensors
    )


def _adapter(path: Path, header: Header) -> Inspection:
    tensors = header.tensors
    downs = [
        (key, tensor)
        for key, tensor in tensors.items()
        if key.endswith((*_DOWN, *_DOWN_OLD)) and tensor.shape
    ]
    strange = sorted({name for mark, name in _STRANGE.items() if any(mark in k for k in tensors)})
    base = _base_of(header)
    networks = {
        name: [tensor for key, tensor in tensors.items() if _network_of(key) == name]
        for name in ("denoiser", "text_encoder", "text_encoder_2")
    }
    return Inspection(
        path=path,
        kind="adapter",
        family=_FAMILIES.get(base, ""),
        title=f"{', '.join(strange) or 'LoRA'} for {base or 'an unknown base'}",
        parts=tuple(
            Part(
                name,
                "",
                num_values=sum(tensor.num_values for tensor in found),
                dtypes=_dtypes(found),
                size_bytes=sum(tensor.num_bytes for tensor in found),
                num_shards=1,
            )
            for name, found in networks.items()
            if found
        ),
        missing=tuple(f"it is a {name}, and those are not read" for name in strange),
        rank=max((tensor.shape[0] for _, tensor in downs), default=None),
        num_layers=len(downs),
        trigger_words=trigger_words(header.metadata),
    )


def _network_of(key: str) -> str:
    if key.startswith(("lora_te2_", "text_encoder_2.")):
        return "text_encoder_2"
    if key.startswith(("lora_te_", "lora_te1_", "text_encoder.")):
        return "text_encoder"
    return "denoiser"


def _base_of(header: Header) -> str:
    """Name the base of an adapter: by what its trainer wrote, else by its layers; "" if unknown."""
    notes = header.metadata
    told = " ".join(
        notes.get(key, "")
        for key in ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
    ).lower()
    marks = {
        "flux": "FLUX.1",
        "sdxl": "SDXL",
        "stable-diffusion-xl": "SDXL",
        "stable-diffusion-v3": "Stable Diffusion 3",
        "sd3": "Stable Diffusion 3",
        "stable-diffusion-v2": "Stable Diffusion 2.x",
        "sd_v2": "Stable Diffusion 2.x",
        "stable-diffusion-v1": "Stable Diffusion 1.x",
        "sd_v1": "Stable Diffusion 1.x",
    }
    return next((base for mark, base in marks.items() if mark in told), "") or _base_by_layers(
        header.tensors
    )


def _base_by_layers(tensors: Mapping[str, TensorHeader]) -> str:
    names = [key.replace(".", "_") for key in tensors]
    if any("single_transformer_blocks" in n or "double_blocks" in n for n in names):
        return "FLUX.1"
    if any("transformer_blocks" in n and "add_q_proj" in n for n in names):
        return "Stable Diffusion 3"
    if any("joint_blocks" in n for n in names):
        return "Stable Diffusion 3"
    # The keys of cross-attention are made of the text, whose width the base decides.
    widths = Counter(
        tensor.shape[1]
        for key, tensor in tensors.items()
        if "attn2" in key and "to_k" in key and key.endswith((*_DOWN, *_DOWN_OLD))
        if len(tensor.shape) > 1
    )
    return _TEXT_WIDTHS.get(widths.most_common(1)[0][0], "") if widths else ""


def trigger_words(notes: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words that call an adapter up, the most frequent in front.

    They are what its trainer wrote down: a phrase, else the tags of its pictures.
    """
    phrase = notes.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return (phrase[:MOST_TRIGGER_CHARS],)
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(notes.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError):
        return ()
    return tuple(
        tag[:MOST_TRIGGER_CHARS] for tag, _ in counts.most_common(MOST_TRIGGER_WORDS) if tag
    )
