"""Write one image in flight as bytes, between two denoise steps.

Another process can continue from them, bit by bit.

A snapshot is one safetensors blob, so any tool that reads those can look inside, and nothing in it
can run:

    8 bytes   length of the header
    header    {"__metadata__": {"darkroom-snapshot": FACTS}, ...}
    FACTS     "<format> <bytes in all> <sha256> <all that is no tensor, as JSON>"
    tensors   state/…: the family's, request/…: the request's pictures

The sha256 covers every other byte of the blob. It finds damage, not forgery: who can write to the
store can write a snapshot, and the engine checks a restored request like a new one. Blobs are
parsed from bytes; a file mapped into memory could be overwritten under a running image. Only the
family knows what the tensors mean. Importable, and `peek` usable, without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from engine.errors import SnapshotRefused
from engine.fingerprint import Fingerprint
from engine.request import ImageRequest, Picture

if TYPE_CHECKING:
    from torch import Tensor

# Raise it when blobs of today could not be read any more. A new field of the request needs no new
# format.
FORMAT = 1
MAX_HEADER_BYTES = 16 * 1024 * 1024  # names and facts; a snapshot has some 4 KiB of them
# These say whose it is, when it is served and what is kept; no pixel depends on them.
NOT_IN_THE_DIGEST = {"id", "group", "owner", "rank", "keep_steps"}

_NAME = "darkroom-snapshot"
_SEAL = re.compile(
    rb'\{"__metadata__":\{"'
    + _NAME.encode()
    + rb'":"(?P<format>\d{4}) (?P<size>\d{12}) (?P<sha256>[0-9a-f]{64}) '
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """All that is needed to go on with an image after `step` of `num_steps`.

    It holds only where the fingerprint is the same.
    """

    request: ImageRequest
    family: str
    fingerprint: str  # sha256 of the facts, hex
    fingerprint_facts: dict[str, Any]
    step: int
    num_steps: int
    tensors: dict[str, Tensor]  # the family's: latents, generator, what the sampler remembers
    facts: dict[str, Any]  # the family's, JSON-plain


@dataclass(frozen=True, kw_only=True)
class Label:
    """What can be known of a snapshot without its tensors."""

    request_id: str
    request_digest: str
    family: str
    fingerprint: str
    step: int
    num_steps: int
    size_bytes: int


def to_bytes(snapshot: Snapshot) -> bytes:
    """Write a snapshot; equal ones become equal bytes.

    Tensors are copied, from wherever they lie, and left untouched.

    Raises `SnapshotRefused` when facts or options are not JSON-plain, or too many.
    """
    import numpy as np
    import torch
    from safetensors.torch import save

    pictures: dict[str, Picture] = {}
    state, layouts = _copied(snapshot.tensors)
    about = {
        "family": snapshot.family,
        "fingerprint": snapshot.fingerprint,
        "fingerprint_facts": snapshot.fingerprint_facts,
        "request": _written(snapshot.request, "request", pictures),
        "request_digest": request_digest(snapshot.request),
        "step": snapshot.step,
        "num_steps": snapshot.num_steps,
        "facts": snapshot.facts,
        "layouts": layouts,
    }
    tensors = {
        name: torch.from_numpy(np.array(picture.pixels, order="C"))
        for name, picture in pictures.items()
    }
    tensors |= {f"state/{name}": tensor for name, tensor in state.items()}
    # The size and the sha256 are written by `_sealed`.
    blob = save(tensors, {_NAME: f"{FORMAT:04d} {0:012d} {'0' * 64} {_json(about)}"})
    if int.from_bytes(blob[:8], "little") > MAX_HEADER_BYTES:
        raise SnapshotRefused(
            f"the facts of image {snapshot.request.id} take more than {MAX_HEADER_BYTES} bytes"
        )
    return _sealed(blob)


def _copied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copy tensors to contiguous ones on the CPU; give the layouts of those that were not, too."""
    copies: dict[str, Tensor] = {}
    layouts: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu", copy=True)
        # Channels last: safetensors has no strides, and another layout may choose another kernel.
        if not copy.is_contiguous():
            layouts[name] = list(copy.dim_order())
            copy = copy.permute(layouts[name])
        copies[name] = copy
    return copies, layouts


def _sealed(blob: bytes) -> bytes:
    """Write the blob's own size and sha256 into their places in its header."""
    seal = _SEAL.match(blob, 8)
    assert seal is not None, "safetensors no longer writes the metadata first"
    front = blob[: seal.start("size")] + f"{len(blob):012d} ".encode()
    rest = memoryview(blob)[seal.end("sha256") :]
    return b"".join([front, _checksum(front, rest).encode(), rest])


def from_bytes(blob: bytes) -> Snapshot:
    """Read a snapshot.

    Its tensors are on the CPU, in memory of their own, laid out as they were.

    Raises `SnapshotRefused` for anything but the unaltered work of `to_bytes` in this format,
    saying what is wrong.
    """
    from safetensors.torch import load

    about = _opened(blob)
    with _as_laid_out():
        stored = load(blob)
        pictures = {
            name: Picture(tensor.numpy())
            for name, tensor in stored.items()
            if name.startswith("request/")
        }
        return Snapshot(
            request=_read(ImageRequest, about["request"], pictures),
            family=about["family"],
            fingerprint=about["fingerprint"],
            fingerprint_facts=about["fingerprint_facts"],
            step=about["step"],
            num_steps=about["num_steps"],
            tensors=_state_of(stored, about["layouts"]),
            facts=about["facts"],
        )


def _state_of(stored: Mapping[str, Tensor], layouts: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Copy the family's tensors, laid out as they were."""
    tensors = {
        name.removeprefix("state/"): tensor
        for name, tensor in stored.items()
        if name.startswith("state/")
    }
    for name, order in layouts.items():
        tensors[name] = tensors[name].permute([order.index(axis) for axis in range(len(order))])
    # Cloned into memory that torch aligns: over the blob's own alignment a matrix product may add
    # in another order.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def peek(blob: bytes) -> Label:
    """Read what is written on the outside, without torch.

    Raises `SnapshotRefused` like `from_bytes`: a damaged blob has no label.
    """
    about = _opened(blob)
    with _as_laid_out():
        return Label(
            request_id=about["request"]["id"],
            request_digest=about["request_digest"],
            family=about["family"],
            fingerprint=about["fingerprint"],
            step=about["step"],
            num_steps=about["num_steps"],
            size_bytes=len(blob),
        )


def check_fingerprint(snapshot: Snapshot, expected: Fingerprint) -> None:
    """Raise `SnapshotRefused` where going on with the snapshot could give other bits.

    The error names every fact that differs.
    """
    if snapshot.fingerprint != expected.sha256:
        different = differences(snapshot.fingerprint_facts, expected.facts)
        raise SnapshotRefused(f"the snapshot was made where other bits come out: {different}")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name the facts that differ: "libraries.torch 2.12 there, 2.13 here; threads 1 there, 2 here".

    Empty for equal facts.
    """
    flat_there = _flat(there)
    flat_here = _flat(here)
    return "; ".join(
        f"{name} {flat_there.get(name, 'unknown')} there, {flat_here.get(name, 'unknown')} here"
        for name in sorted(flat_there.keys() | flat_here.keys())
        if flat_there.get(name) != flat_here.get(name)
    )


def request_digest(request: ImageRequest) -> str:
    """Return the sha256, hex, of all that decides the pixels and of the safety rules' version.

    It leaves out what `NOT_IN_THE_DIGEST` names.

    Equal requests have equal digests; a field added to the request is in it from then on.
    """
    pictures: dict[str, Picture] = {}
    written = _written(request, "request", pictures)
    parameters = {name: value for name, value in written.items() if name not in NOT_IN_THE_DIGEST}
    seen = {name: picture.sha256 for name, picture in pictures.items()}
    return hashlib.sha256(_json([parameters, seen]).encode()).hexdigest()


def _opened(blob: bytes) -> dict[str, Any]:
    """Read everything in the blob that is no tensor, once it is known to be whole."""
    _check_seal(blob)
    header_bytes = int.from_bytes(blob[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise SnapshotRefused(
            f"the snapshot's header has {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
        )
    with _as_laid_out():
        metadata: str = json.loads(blob[8 : 8 + header_bytes])["__metadata__"][_NAME]
        about: dict[str, Any] = json.loads(metadata.split(" ", 3)[3])
    return about


def _check_seal(blob: bytes) -> None:
    """Raise `SnapshotRefused` for a blob of another format, or one that is not as it was sealed."""
    seal = _SEAL.match(blob, 8)
    if seal is None:
        raise SnapshotRefused("these bytes are no snapshot")
    if int(seal["format"]) != FORMAT:
        raise SnapshotRefused(
            f"the snapshot is of format {int(seal['format'])}, this engine reads format {FORMAT}"
        )
    if len(blob) < int(seal["size"]):
        raise SnapshotRefused(
            f"the snapshot is truncated: {len(blob)} of {int(seal['size'])} bytes"
        )
    view = memoryview(blob)
    checksum = _checksum(view[: seal.start("sha256")], view[seal.end("sha256") :])
    if checksum != seal["sha256"].decode():
        raise SnapshotRefused("the snapshot is damaged: its checksum does not match its bytes")


def _checksum(front: bytes | memoryview, rest: memoryview) -> str:
    """Return the sha256, hex, of all bytes but its own."""
    digest = hashlib.sha256(front)
    digest.update(rest)
    return digest.hexdigest()


@contextmanager
def _as_laid_out() -> Iterator[None]:
    """Raise `SnapshotRefused` for the errors of reading a wrong layout.

    Only a blob that another program wrote and sealed can fail here.
    """
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as problem:
        raise SnapshotRefused(
            f"the snapshot is not laid out as format {FORMAT}: {problem!r}"
        ) from problem


def _written(value: Any, name: str, pictures: dict[str, Picture]) -> Any:
    """Write one value of a request as JSON.

    Its pictures are put aside, each under its place in the request.
    """
    if isinstance(value, Picture):
        pictures[name] = value
        return name
    if is_dataclass(value) and not isinstance(value, type):
        types = _types(type(value))
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        # Equal requests are written alike, also where one says 4 and the other 4.0.
        numbers = {
            part: float(given)
            for part, given in parts.items()
            if given is not None and types[part] in (float, float | None)
        }
        return {
            part: _written(given, f"{name}/{part}", pictures)
            for part, given in (parts | numbers).items()
        }
    if isinstance(value, tuple):
        return [_written(item, f"{name}/{index}", pictures) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _read(kind: Any, value: Any, pictures: Mapping[str, Picture]) -> Any:
    """Tell what `_written` was given; `kind` is the type its field declares.

    A field that is absent has its default.
    """
    given = get_origin(kind)
    arguments = get_args(kind)
    if NoneType in arguments:
        return None if value is None else _read(arguments[0], value, pictures)
    if kind is Picture:
        return pictures[value]
    if isinstance(kind, type) and is_dataclass(kind):
        types = _types(kind)
        if unknown := value.keys() - types.keys():
            raise SnapshotRefused(
                "the snapshot's request has what this engine does not know: "
                f"{', '.join(sorted(unknown))}"
            )
        return kind(**{name: _read(types[name], part, pictures) for name, part in value.items()})
    if given is tuple:
        return tuple(_read(arguments[0], item, pictures) for item in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return value


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Flatten nested facts to dotted paths and their values."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = json.dumps(value, ensure_ascii=False, sort_keys=True).strip(
                '"'
            )
    return flat


def _json(value: Any) -> str:
    """Write canonical JSON: equal values give equal text, in ASCII.

    Raises `SnapshotRefused` for what JSON cannot express.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise SnapshotRefused(f"not plain enough for a snapshot: {problem}") from problem
