"""Read what a safetensors file says of its tensors: names, types, shapes, notes. Never a tensor.

A header is JSON behind eight bytes of length; everything here is told from it and from the size of
the file, so a checkpoint of any size is looked at in milliseconds. Knows neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointCorrupt

MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads at most
LFS_POINTER = b"version https://git-lfs"
# Bits of one number, by the name that the format gives its type.
DTYPE_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
# What an operator calls the types that weights have.
DTYPE_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DTYPE_NAMES |= {"F8_E4M3": "fp8", "F8_E5M2": "fp8"}
# How the folders of networks begin whose linear layers can be quantised (engine/quantisation.py).
QUANTISED_FOLDERS = ("unet", "transformer", "text_encoder", "prior", "controlnet")
# Tables that are looked up: matrices in the file, and no linear layers.
_TABLES = (
    "token_embedding",
    "position_embedding",
    "class_embedding",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class TensorHeader:
    """What is written of one tensor."""

    dtype: str  # "F16", as the format says
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Return how many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What is written of one file."""

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]  # free text of who wrote the file


def read_header(file: Path) -> Header:
    """Read the header of one safetensors file.

    Raises `CheckpointCorrupt`, naming the file, for one that is missing, cut off, a git-lfs pointer
    or no safetensors file at all.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            told = stream.read(length) if len(start) == 8 and length <= MAX_HEADER_BYTES else b""
            size_bytes = file.stat().st_size
            if is_lfs_pointer(file):
                raise CheckpointCorrupt(file.name, LFS_TELLS)
    except OSError as problem:
        raise CheckpointCorrupt(file.name, problem.strerror or str(problem)) from problem
    try:
        header = json.loads(told)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise CheckpointCorrupt(file.name, "is no safetensors file; fetch it again") from problem
    whole_bytes = 8 + length + sum(tensor.num_bytes for tensor in tensors.values())
    if size_bytes != whole_bytes:
        reason = f"has {size_bytes} bytes of {whole_bytes}: it is cut off; fetch it again"
        if size_bytes > whole_bytes:
            reason = f"has {size_bytes} bytes, and its header tells of {whole_bytes}"
        raise CheckpointCorrupt(file.name, reason)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


LFS_TELLS = "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"


def is_lfs_pointer(file: Path) -> bool:
    """Tell whether the file only says where its content is. Raises OSError."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _tensor(entry: Any) -> TensorHeader:
    begin, end = entry["data_offsets"]
    return TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])), int(end) - int(begin))


def memory_bytes(
    folder: str, tensors: Mapping[str, TensorHeader], *, value_bytes: int, how: str | None
) -> int:
    """Return the memory of the weights of one file in this folder.

    value_bytes: of a number that is not quantised.
    """
    values = sum(tensor.num_values for tensor in tensors.values())
    if how is None:
        return values * value_bytes
    linear = linear_weights(folder, tensors)
    small = sum(tensor.num_values for tensor in linear)
    scales = sum(tensor.shape[0] for tensor in linear)
    return (values - small) * value_bytes + small + scales * _SCALE_BYTES


def linear_weights(folder: str, tensors: Mapping[str, TensorHeader]) -> list[TensorHeader]:
    """List the weights of a file in this folder that belong to layers which can be quantised."""
    if not folder.startswith(QUANTISED_FOLDERS):
        return []
    found = []
    for name, tensor in tensors.items():
        *_, layer, kind = ("", *name.split("."))
        if kind == "weight" and len(tensor.shape) == 2 and layer not in _TABLES:
            found.append(tensor)
    return found
