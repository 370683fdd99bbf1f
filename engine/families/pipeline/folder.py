"""Read a diffusers pipeline from its folder: no network, safetensors only, no code from there."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from engine.config import CheckpointSpec
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.latent import load_network, not_loadable
from engine.folders import INDEX, NOT_LOADED, classes_of, read_index

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def folder_names(path: Path) -> tuple[str, ...]:
    """Name the folders of the parts that are read. Raises `CheckpointCorrupt`."""
    return tuple(sorted(_components(read_index(path))))


def index_sha256(path: Path) -> str:
    """Digest the index, hex: it lies in no folder of its own, so no digest of weights covers it."""
    return hashlib.sha256((path / INDEX).read_bytes()).hexdigest()


def load_pipeline(spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Read the pipeline, its networks on the device.

    Raises `CheckpointCorrupt`, and `UnsupportedRequest` for a class that cannot be served.
    """
    path = Path(spec.path)
    index = read_index(path)
    pipeline_class = _pipeline_class(spec.pipeline_class or index.get("_class_name"))
    taken = inspect.signature(pipeline_class.__init__).parameters
    given: dict[str, Any] = {
        name: load_network(kind, path, name, dtype, device, spec.quantize)
        for name, kind in _components(index).items()
        if name in taken and issubclass(kind, nn.Module)
    }
    unwanted = {NOT_LOADED: None, "requires_safety_checker": False}
    given |= {name: value for name, value in unwanted.items() if name in taken}
    pipe = _assembled(pipeline_class, path, given)
    pipe.set_progress_bar_config(disable=True)
    _let_layers_be_skipped(given.values())
    return pipe


def _assembled(pipeline_class: Any, path: Path, given: Mapping[str, Any]) -> Any:
    """Have diffusers make the pipeline of its folder and these parts of it, and check it."""
    name = pipeline_class.__name__
    try:
        pipe = pipeline_class.from_pretrained(
            str(path),
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    except Exception as problem:
        raise not_loadable(INDEX, f"{name} cannot be made of it", problem) from problem
    if not isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
        reason = f"{name} has no scheduler to count steps by"
        raise UnsupportedRequest("pipeline_class", reason)
    return pipe


def _let_layers_be_skipped(networks: Iterable[Any]) -> None:
    """Give CLIP text encoders the name by which the calls of pipelines look for a layer norm.

    transformers 5 has dropped that level, and with `clip_skip` the call fails (diffusers issue
    14124). Written past nn.Module, which would count the encoder as a part of itself.
    """
    for network in networks:
        if isinstance(network, transformers.CLIPTextModel) and not hasattr(network, "text_model"):
            vars(network)["text_model"] = network


def _components(index: dict[str, Any]) -> dict[str, Any]:
    """Find the class of every part that is read, by the name of its folder.

    Raises `CheckpointCorrupt` for a class from elsewhere.
    """
    components = {}
    for name, (library, kind) in classes_of(index).items():
        found = getattr(LIBRARIES.get(library), kind, None)
        if not isinstance(found, type):
            reason = f"{name} is {[library, kind]}, which is no class of {' or '.join(LIBRARIES)}"
            raise CheckpointCorrupt(INDEX, reason)
        components[name] = found
    return components


def _pipeline_class(name: Any) -> Any:
    found: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        reason = f"{name!r} is no pipeline of diffusers {diffusers.__version__}"
        raise UnsupportedRequest("pipeline_class", reason)
    if getattr(found, "_load_connected_pipes", False):
        raise UnsupportedRequest("pipeline_class", f"{name} is a cascade of pipelines")
    return found
