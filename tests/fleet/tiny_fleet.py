"""A fleet of tiny checkpoints: one of every family and kind, with adapters in every layout of keys.

Random weights, real in every part. Run as a program it writes them into the folder that it is
given, for which it loads torch and diffusers; to name them for a fleet file takes neither.
"""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from policy.sources import is_fetched
from settings import REPO
from tests.builders import GONE, fleet_text

ENGINE_TESTS = REPO / "tests" / "engine"
BUILDERS = (
    Path(__file__),
    *(
        ENGINE_TESTS / f"{name}.py"
        for name in (
            "adapter_builders",
            "engine_builders",
            "tiny_checkpoints",
            "tiny_flow_checkpoints",
            "tiny_pipelines",
        )
    ),
)
ADAPTERS = "adapters"
NOISE = ("euler", "dpmpp_2m")
FLOW = ("flow_euler", "flow_euler_karras")
OPEN = ("default",)
SMALL = ("32x32",)
KONTEXT = {"max_sequence_length": 40, "max_area": 1024, "_auto_resize": False}


class TinyModel(NamedTuple):
    """How a model stands in the fleet file, and what every request for it must have."""

    family: str
    samplers: tuple[str, ...]
    sizes: tuple[str, ...] = ("64x64",)
    pictures: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()  # of its adapters: each says the same
    weights: str = ""  # those of another model
    more: Mapping[str, Any] = {}


MODELS = {
    "sd": TinyModel(
        "sd",
        NOISE,
        ("64x64", "96x64", "64x96"),
        layouts=("peft", "bare-peft", "comfyui", "processors", "kohya"),
    ),
    "sd-inpaint": TinyModel("sd", NOISE, pictures=("init_image", "mask")),
    "sdxl": TinyModel("sdxl", NOISE, layouts=("peft", "kohya", "sgm")),
    "sd3": TinyModel("sd3", FLOW, layouts=("peft", "bare-peft", "comfyui", "kohya")),
    "flux-dev": TinyModel("flux", FLOW, layouts=("peft", "comfyui", "kohya", "bfl")),
    "flux-guided": TinyModel(
        "flux", FLOW, weights="flux-dev", more={"options": {"true_cfg_scale": 3.0}}
    ),
    "flux-schnell": TinyModel("flux", FLOW, more={"guidance_distilled": False}),
    "flux-fill": TinyModel("flux", FLOW, pictures=("init_image", "mask")),
    "kontext": TinyModel(
        "pipeline", OPEN, SMALL, pictures=("init_image",), more={"options": KONTEXT}
    ),
    "pix2pix": TinyModel("pipeline", OPEN, SMALL, pictures=("init_image",)),
    "controlnet": TinyModel("pipeline", OPEN, SMALL, pictures=("control_image",)),
    "plain": TinyModel("plain", OPEN, SMALL),
}


def tiny_weights() -> Path:
    """A folder with the weights of every model, made once for this state of their builders.

    They lie in the machine's folder for temporary files, where a later run finds them.
    """
    digest = hashlib.sha256()
    for path in BUILDERS:
        digest.update(path.read_bytes())
    for package in ("diffusers", "torch", "transformers"):
        digest.update(f"{package} {version(package)}".encode())
    folder = Path(tempfile.gettempdir()) / f"darkroom-tiny-{digest.hexdigest()[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="darkroom-tiny-") as made:
            subprocess.run([sys.executable, "-m", "tests.fleet.tiny_fleet", made], check=True)
            _publish(Path(made) / "weights", folder)
    return folder


def _publish(made: Path, folder: Path) -> None:
    """Give finished weights their name; whoever was quicker made the same."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def fleet_of(
    weights: Path,
    names: Iterable[str] = tuple(MODELS),
    far: Mapping[str, str] | None = None,
    **keys: Any,
) -> str:
    """The text of a fleet file with these of them in one pool, which has further keys.

    far: names of further models, each with the weights of another, which are kept in an object
    store that serves `weights`.
    """
    models = {f"models.{name}": _table(name, MODELS[name], weights) for name in names}
    for name, like in (far or {}).items():
        models[f"models.{name}"] = models[f"models.{like}"] | {
            "title": name,
            "versions": [_far_version(weights / like)],
            "adapters": {
                layout: told | {"source": f"s3://{ADAPTERS}/{like}/{layout}.safetensors"}
                for layout, told in models[f"models.{like}"]["adapters"].items()
            },
        }
    served = [key.partition(".")[2] for key in models]
    pool = {"models": served, "slots": 8, "max_batch_rows": 8, "warm_floor": 1, **keys}
    gone = {"models.pocket": GONE, "models.large": GONE, "pools.big": GONE}
    return fleet_text({**gone, **models, "pools.local": pool})


def _far_version(folder: Path) -> dict[str, Any]:
    """A version in the bucket of the folder's name."""
    files = [file for file in folder.rglob("*") if is_fetched(str(file.relative_to(folder)))]
    digests = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }
    return {"id": "1", "source": f"s3://{folder.name}", "sha256": digests}


def _table(name: str, model: TinyModel, weights: Path) -> dict[str, Any]:
    files = {
        layout: weights / ADAPTERS / name / f"{layout}.safetensors" for layout in model.layouts
    }
    return {
        "title": name,
        "family": model.family,
        "precision": "fp32",
        "sizes": list(model.sizes),
        "samplers": list(model.samplers),
        "default_sampler": model.samplers[0],
        "default_guidance": 2.0,
        "max_guidance": 10.0,
        "tiers": {"quality": {"bucket_rows": dict.fromkeys(model.sizes, 4)}},
        "versions": [{"id": "1", "source": str(weights / (model.weights or name))}],
        "adapters": {
            layout: {"source": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for layout, path in files.items()
        },
        **model.more,
    }


def write_weights(folder: Path) -> None:
    """Write every checkpoint and every adapter."""
    import diffusers
    from engine_builders import save_tiny_checkpoint
    from tiny_checkpoints import save_repainting, save_tiny_sdxl
    from tiny_flow_checkpoints import SCHNELL_SCHEDULER, save_tiny_flux, save_tiny_sd3
    from tiny_pipelines import save_tiny_pipeline

    noise = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    sd = save_tiny_checkpoint(folder / "sd", noise)
    save_repainting(folder / "sd-inpaint", sd)
    save_tiny_sdxl(folder / "sdxl", noise)
    save_tiny_sd3(folder / "sd3")
    save_tiny_flux(folder / "flux-dev")
    save_tiny_flux(folder / "flux-schnell", scheduler=SCHNELL_SCHEDULER, guidance_embeds=False)
    save_tiny_flux(folder / "flux-fill", context_channels=4 + 64)
    save_tiny_pipeline("flux-kontext", folder / "kontext")
    save_tiny_pipeline("instruct-pix2pix", folder / "pix2pix")
    save_tiny_pipeline("sd-controlnet", folder / "controlnet")
    save_tiny_pipeline("sd", folder / "plain")
    for name, model in MODELS.items():
        if model.layouts:
            _write_adapters(folder, name, model.layouts)


def _write_adapters(folder: Path, name: str, layouts: Iterable[str]) -> None:
    """Write one adapter over the model's denoiser in several layouts."""
    import adapter_builders
    import diffusers

    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "transformer": diffusers.FluxTransformer2DModel
        if name.startswith("flux")
        else diffusers.SD3Transformer2DModel,
    }
    part = "unet" if (folder / name / "unet").exists() else "transformer"
    network = kinds[part].from_pretrained(folder / name / part)
    tensors = adapter_builders.lora_tensors(
        network, prefix=part, seed=1, only=lambda layer: _is_changed(name, layer)
    )
    if name.startswith("flux"):
        _share_downs(tensors)
    target = folder / ADAPTERS / name
    target.mkdir(parents=True)
    for layout in layouts:
        adapter_builders.a_file(target / f"{layout}.safetensors", LAYOUTS[layout](tensors))


def _is_changed(name: str, layer: str) -> bool:
    """Of SDXL and FLUX only what the original repositories name without a rest."""
    if name == "sdxl":
        is_here = layer.startswith("down_blocks.1.attentions.0.")
    elif name.startswith("flux"):
        is_here = layer.startswith("transformer_blocks.0.")
    else:
        is_here = True
    return is_here and ".attn" in layer and layer.endswith((".to_q", ".to_k", ".to_v"))


def _share_downs(tensors: dict[str, Any]) -> None:
    """Give query, key and value one matrix A, as a trainer of the fused layer does."""
    for key in tensors:
        if ".lora_A." in key:
            tensors[key] = tensors[key.replace(".to_k.", ".to_q.").replace(".to_v.", ".to_q.")]


# --- the layouts, each made of diffusers' own ---

Tensors = dict[str, Any]
RANK = 4.0  # alpha, where a layout has one: the matrices count as they are


def _behind(prefix: str) -> Callable[[Tensors], Tensors]:
    """The denoiser's own names behind another prefix."""
    return lambda tensors: {
        f"{prefix}.{key.partition('.')[2]}": tensor for key, tensor in tensors.items()
    }


def _processors(tensors: Tensors) -> Tensors:
    """As diffusers wrote them when attention processors held them."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, matrix = key.removesuffix(".weight").rpartition(".")
        attention, _, projection = layer.rpartition(".")
        way = "down" if matrix == "lora_A" else "up"
        renamed[f"{attention}.processor.{projection}_lora.{way}.weight"] = tensor
    return renamed


def _kohya(tensors: Tensors) -> Tensors:
    from adapter_builders import in_kohya_words

    return in_kohya_words(tensors, alpha=RANK)


def _sgm(tensors: Tensors) -> Tensors:
    """As kohya's trainer names SDXL's layers: by the original repository."""
    return {
        key.replace("lora_unet_down_blocks_1_attentions_0_", "lora_unet_input_blocks_3_1_"): tensor
        for key, tensor in _kohya(tensors).items()
    }


def _bfl(tensors: Tensors) -> Tensors:
    """As kohya's trainer names FLUX's: query, key and value are one layer."""
    import torch

    stem = "transformer.transformer_blocks.0.attn.to"
    down = tensors[f"{stem}_q.lora_A.weight"]
    up = torch.cat([tensors[f"{stem}_{part}.lora_B.weight"] for part in "qkv"])
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    return {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up,
        f"{layer}.alpha": torch.tensor(RANK),
    }


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "peft": dict,
    "bare-peft": _behind("base_model.model"),
    "comfyui": _behind("diffusion_model"),
    "processors": _processors,
    "kohya": _kohya,
    "sgm": _sgm,
    "bfl": _bfl,
}

if __name__ == "__main__":
    sys.path.append(str(ENGINE_TESTS))
    made = Path(sys.argv[1]) / "weights"
    made.mkdir()
    write_weights(made)
