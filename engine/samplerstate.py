"""Turn a sampler's state into tensors and plain facts, and back.

A multi-step sampler remembers earlier predictions, step indices and orders.

All of a diffusers scheduler object but its config is taken, by its own `__dict__`, so that nothing
has to be known about its class. What is not plain data (SASolver holds a function, DPM-SDE a noise
tree) is refused: such a sampler can only be replayed. It does not know what a snapshot looks like
as bytes.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import SnapshotRefused
from engine.snapshots import differences
from engine.transfers import to_device

# Fields as facts. JSON's own numbers, strings, booleans, null and lists stand for themselves; the
# rest is a tagged object:
#   {"tensor": name, "on": "cpu"}   kept among the tensors; "device" for one beside the latents
#   {"array": name}, {"scalar": name}   numpy's, kept as tensors
#   {"tuple": [...]}, {"dict": [[key, value], ...]}, {"size": [...]}, {"float": "-inf"}


def save_sampler(sampler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy everything a diffusers scheduler object holds: tensors and JSON-plain facts.

    The tensors are on the CPU, in memory of their own. The sampler is left untouched. Raises
    `SnapshotRefused`, naming the field, when it holds more than plain data.
    """
    config = sampler.config
    tensors = dict[str, Tensor]()
    fields = {
        name: _written(value, name, tensors)
        for name, value in vars(sampler).items()
        if value is not config
    }
    return tensors, {"class": type(sampler).__name__, "config": _config(sampler), "fields": fields}


def load_sampler(
    sampler: Any,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    device: str | torch.device,
) -> None:
    """Turn a fresh sampler of the same class and config into the saved one, bit by bit.

    Whatever it held before is gone. Fields that were on the CPU stay there, those that were beside
    the latents go to `device`; `tensors` are copied, not kept. Raises `SnapshotRefused` for another
    class or config and leaves the sampler as it was.
    """
    if facts["class"] != type(sampler).__name__:
        raise SnapshotRefused(
            f"the sampler is {facts['class']} there, {type(sampler).__name__} here"
        )
    if different := differences(facts["config"], _config(sampler)):
        raise SnapshotRefused(f"the sampler's config is another: {different}")
    config = {name: value for name, value in vars(sampler).items() if value is sampler.config}
    fields = {name: _read(value, tensors, device) for name, value in facts["fields"].items()}
    vars(sampler).clear()
    vars(sampler).update(config | fields)


def save_generator(generator: torch.Generator) -> Tensor:
    """Copy the state of a CPU generator: [5056] bytes, from which it draws the same noise again."""
    return generator.get_state()


def load_generator(state: Tensor) -> torch.Generator:
    """Make a CPU generator that goes on drawing where the saved one was."""
    generator = torch.Generator("cpu")
    generator.set_state(state)
    return generator


def _config(sampler: Any) -> dict[str, Any]:
    """Return what the sampler was made from, without diffusers' own notes.

    diffusers writes those in no fixed order.
    """
    arrays: dict[str, Tensor] = {}
    config = {
        name: _written(value, name, arrays)
        for name, value in sampler.config.items()
        if not name.startswith("_")
    }
    if arrays:
        raise SnapshotRefused(f"the sampler's config holds arrays: {', '.join(arrays)}")
    return config


def _written(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Write one field as facts.

    What it holds of tensors is copied into `tensors`, under names that begin with `name`.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True)
        return {"tensor": name, "on": "cpu" if value.device.type == "cpu" else "device"}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        tensors[name] = torch.from_numpy(np.array(value, order="C"))
        return {"array" if isinstance(value, np.ndarray) else "scalar": name}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if type(value) in (list, tuple):
        items = _written_each(value, name, tensors)
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict:
        pairs = enumerate(value.items())
        return {"dict": [_written_each(pair, f"{name}.{index}", tensors) for index, pair in pairs]}
    raise SnapshotRefused(
        f"the sampler's {name} is no plain data but a {type(value).__name__}: it cannot be saved"
    )


def _written_each(items: Iterable[Any], name: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [_written(item, f"{name}.{index}", tensors) for index, item in enumerate(items)]


def _read(value: Any, tensors: Mapping[str, Tensor], device: str | torch.device) -> Any:
    """Tell what `_written` was given."""
    match value:
        case {"tensor": name, "on": place}:
            own = tensors[name].to("cpu", copy=True)
            return own if place == "cpu" else to_device(own, torch.device(device))
        case {"array": name}:
            return tensors[name].numpy().copy()
        case {"scalar": name}:
            return tensors[name].numpy()[()]
        case {"tuple": items}:
            return tuple(_read(item, tensors, device) for item in items)
        case {"size": lengths}:
            return torch.Size(lengths)
        case {"dict": pairs}:
            return {
                _read(key, tensors, device): _read(item, tensors, device) for key, item in pairs
            }
        case {"float": text}:
            return float(text)
        case list():
            return [_read(item, tensors, device) for item in value]
        case _:
            return value
