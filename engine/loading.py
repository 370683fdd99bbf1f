"""Turn a checkpoint folder into a loaded checkpoint: hashed first, then read.

No network, no pickle, no code from the folder.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.acceleration import COMPILED, accelerate
from engine.adapters import AdapterBank
from engine.blockcache import BlockCache
from engine.capabilities import Capabilities
from engine.config import CheckpointSpec
from engine.device import Device, give_back_host_memory
from engine.errors import (
    CheckpointAbsent,
    CheckpointCorrupt,
    TooLittleMemory,
    UnsupportedRequest,
)
from engine.families import family_named
from engine.families.contract import Family
from engine.families.latent import LatentFamily
from engine.folders import digest_of, files_read, hash_files, sha256_of
from engine.headers import memory_bytes, read_header
from engine.quantisation import check_quantisation, digest_of_quantised
from engine.request import AdapterUse, ImageRequest
from engine.sidethread import own_default_dtype

log = logging.getLogger(__name__)

# diffusers, transformers and accelerate replace functions of torch while they build a network.
_ONE_LOAD = threading.Lock()
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint on the device.

    `weights_digest` covers every file that was read, configs and tokenizer included, and how the
    weights are quantised.
    """

    spec: CheckpointSpec
    family: Family
    weights_digest: str
    load_s: float
    adapters: AdapterBank | None = None
    block_cache: BlockCache | None = None

    @property
    def weights_bytes(self) -> int:
        """Return the memory of its networks and of its adapters' slots."""
        slots_bytes = 0 if self.adapters is None else self.adapters.size_bytes
        return slots_bytes + sum(tensor.nbytes for tensor in tensors_of(self.family))

    def free(self) -> None:
        """Let go of its weights, whoever still refers to its networks. It cannot be used again."""
        if self.adapters is not None:
            self.adapters.close()
        if isinstance(self.family, LatentFamily):
            self.family.graphs = None  # they refer to the family, which refers to them
        for tensor in tensors_of(self.family):
            tensor.data = tensor.data.new_empty(0)

    def adapted(self, per_row: Sequence[tuple[AdapterUse, ...]]) -> AbstractContextManager[None]:
        """Apply the adapters `per_row[i]` to row i of every forward made within this context."""
        return nullcontext() if self.adapters is None else self.adapters.rows(per_row)

    @property
    def capabilities(self) -> Capabilities:
        """Tell what may be asked of it, its adapters and sizes included."""
        return replace(
            self.family.capabilities,
            sizes=tuple(f"{width_px}x{height_px}" for width_px, height_px in self.spec.sizes),
            adapters={} if self.adapters is None else self.adapters.describe(),
        )

    def facts(self) -> dict[str, Any]:
        """Give what of its set-up can change a bit."""
        quantised = {} if self.spec.quantize is None else {"quantize": self.spec.quantize}
        compiled = {"compiled": COMPILED} if self.spec.compile_blocks else {}
        return {**self.family.facts(), **quantised, **compiled}

    def adapter_facts(self, request: ImageRequest) -> list[dict[str, Any]]:
        """Give the request's adapters by name, digest and strength: part of its fingerprint."""
        return [] if self.adapters is None else self.adapters.facts(request.adapters)

    @property
    def conditioning_prefix(self) -> str:
        """Return how every `conditioning_key` of these weights begins."""
        return json.dumps([self.weights_digest])[:-1]

    def conditioning_key(self, request: ImageRequest) -> str:
        """Return the key of what encodes this request's prompts, under which safety rules.

        Encodings are shared only between requests with the same key.
        """
        spec = self.spec
        return json.dumps(
            [
                self.weights_digest,
                spec.family,
                spec.precision,
                self.adapter_facts(request),
                request.policy_version,
            ]
        )


def tensors_of(family: Family) -> list[torch.Tensor]:
    """List the weights and buffers of a family's networks, each once."""
    modules = family.modules()
    found = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())


def load_checkpoint(
    spec: CheckpointSpec,
    device: Device,
    *,
    pace: Callable[[], AbstractContextManager[None]] = nullcontext,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    working_bytes: int = 0,
    hash_threads: int = 1,
) -> LoadedCheckpoint:
    """Verify and read one checkpoint.

    pace: what surrounds all that needs the interpreter for long.  turn: what surrounds all that
    needs the host's memory for a while.  working_bytes: what an image needs besides the weights.
    hash_threads: files verified at once.

    Raises `TooLittleMemory`, and `CheckpointCorrupt`, naming the file, when a file is missing,
    unreadable or not what `spec.sha256` says, and when weights would be read that `spec.sha256`
    does not list although it lists others. Raises `CheckpointAbsent` where `spec.absent` says why
    it is not here.
    """
    if spec.absent:
        raise CheckpointAbsent(spec.absent)
    started = time.perf_counter()
    if spec.precision not in PRECISIONS:
        raise UnsupportedRequest(
            "precision", f"{spec.precision!r} is none of {', '.join(PRECISIONS)}"
        )
    check_quantisation(spec.quantize, device.torch_device)
    path = Path(spec.path)
    family_class = family_named(spec.family)
    parts = family_class.folders(path)
    _check_room(spec, device, working_bytes)
    found = hash_files(path, parts, threads=hash_threads)
    _verify(path, dict(spec.sha256), found)
    _quiet_progress_bars()
    dtype = PRECISIONS[spec.precision]
    hash_s = time.perf_counter() - started
    with turn(), _ONE_LOAD, pace(), own_default_dtype():
        started = time.perf_counter()
        family = family_class.load(spec, dtype=dtype, device=device.torch_device)
        _check_guidance(spec, family)
        accelerate(family, spec, device)
        bank = adapter_bank(spec, family, device)
        give_back_host_memory()
    load_s = hash_s + time.perf_counter() - started
    digest = digest_of_quantised(digest_of(found), spec.quantize)
    log.info(
        "checkpoint_loaded",
        extra={"checkpoint": spec.name, "weights_digest": digest, "load_s": load_s},
    )
    return LoadedCheckpoint(
        spec=spec,
        family=family,
        weights_digest=digest,
        load_s=load_s,
        adapters=bank,
        block_cache=_block_cache(spec, family),
    )


def expected_weights_bytes(spec: CheckpointSpec) -> int:
    """Tell the device memory of a checkpoint's weights by its files' headers; nothing is loaded.

    Adapters' slots are not counted. Raises `CheckpointCorrupt`, and `UnsupportedRequest` for a
    family that there is not.
    """
    path = Path(spec.path)
    files = files_read(path, family_named(spec.family).folders(path))
    value_bytes = PRECISIONS[spec.precision].itemsize
    return sum(
        memory_bytes(
            name.partition("/")[0],
            read_header(path / name).tensors,
            value_bytes=value_bytes,
            how=spec.quantize,
        )
        for name in files
        if name.endswith(".safetensors")
    )


def _check_room(spec: CheckpointSpec, device: Device, working_bytes: int) -> None:
    """Raise `TooLittleMemory` where the weights do not fit beside those that are loaded."""
    try:
        needed_bytes = expected_weights_bytes(spec) + working_bytes
    except CheckpointCorrupt:
        return  # said by whoever hashes the files, with the part that the file belongs to
    free_bytes = device.free_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise TooLittleMemory(needed_bytes, free_bytes)


def _check_guidance(spec: CheckpointSpec, family: Family) -> None:
    """Raise UnsupportedRequest where the network takes guidance otherwise than the spec says.

    The predictions for its jobs rely on the spec.
    """
    is_distilled = getattr(family, "is_distilled", None)
    if spec.guidance_distilled not in (None, is_distilled):
        how = "as an input" if is_distilled else "by a second row, not as an input"
        raise UnsupportedRequest(
            "guidance_distilled",
            f"{spec.guidance_distilled} is declared, and the network takes guidance {how}",
        )


def adapter_bank(spec: CheckpointSpec, family: Family, device: Device) -> AdapterBank | None:
    """Give a family's networks slots for the spec's adapters; None if it has none."""
    if not spec.adapters:
        return None
    return AdapterBank(
        family.networks(),
        spec.adapters,
        slots=spec.adapter_slots,
        max_rank=spec.max_adapter_rank,
        device=device.torch_device,
        dtype=PRECISIONS[spec.precision],
    )


def _block_cache(spec: CheckpointSpec, family: Family) -> BlockCache | None:
    if not spec.block_cache_threshold:
        return None
    transformer = family.networks().get("transformer")
    if transformer is None or not isinstance(family, LatentFamily):
        reason = f"family {spec.family!r} has no transformer whose blocks the engine knows"
        raise UnsupportedRequest("block_cache_threshold", reason)
    return BlockCache(
        transformer,
        threshold=spec.block_cache_threshold,
        max_bytes=spec.block_cache_bytes,
    )


def _verify(path: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    """Compare what lies in the folder with what the catalog says.

    Nothing is read into a network before that.
    """
    for name, sha256 in sorted(expected.items()):
        actual = found.get(name)
        if actual is None:
            file = path / name
            if not file.is_file():
                raise CheckpointCorrupt(name, "is missing")
            actual = sha256_of(file)  # listed, although this family does not read it
        if actual != sha256.lower():
            raise CheckpointCorrupt(name, f"has sha256 {actual}, not {sha256.lower()}")
    if expected:
        for name in found:
            if name.endswith(".safetensors") and name not in expected:
                raise CheckpointCorrupt(name, "would be read, but its sha256 is not listed")


def _quiet_progress_bars() -> None:
    """Turn progress bars off: a worker's log is no terminal."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
