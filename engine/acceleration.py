"""Make a loaded checkpoint faster on its device without changing what it computes.

The means are memory layout, compilation and CUDA graphs.

Each is the checkpoint's own choice (`CheckpointSpec`), is off unless asked for, and is named in the
fingerprint, for each can change the last bits. None of it has a kernel of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import CheckpointSpec
from engine.device import Device
from engine.errors import UnsupportedRequest
from engine.families.contract import Family
from engine.families.latent import LatentFamily
from engine.tensors import Rows

cuda: Any = torch.cuda
# What diffusers does not name as repeated, though a UNet has tens of them. With attention's blocks
# they are nearly all that a UNet computes, and a VAE's decoder is little else.
CONVOLUTIONS = ("ResnetBlock2D",)
COMPILED = ["repeated blocks", "convolutions", "decoder"]  # for fingerprints
# Graphs of one kind of block in a process. Each checkpoint has some: a graph for each width of its
# blocks, and for one row or more. Torch's own limit of 8 is passed by a single UNet, which has 12
# widths of convolutions, and images fail from then on.
RECOMPILE_LIMIT = 256
# What torch.compile builds its kernels, or their launchers, with.
COMPILERS = {"cpu": ("g++", "clang++"), "cuda": ("gcc", "clang")}


def accelerate(family: Family, spec: CheckpointSpec, device: Device) -> None:
    """Apply what `spec` asks for.

    Raises `UnsupportedRequest`, naming the field, for what this checkpoint or device has not.
    """
    networks = family.networks()
    denoiser: Any = networks.get("unet", networks.get("transformer"))
    if spec.channels_last:
        if "unet" not in networks:
            raise UnsupportedRequest(
                "channels_last", f"family {spec.family!r} has no convolutional denoiser"
            )
        denoiser.to(memory_format=torch.channels_last)
    if spec.compile_blocks:
        _compile_blocks(family, denoiser, spec, device)
    if spec.cuda_graphs:
        if not device.is_cuda or not isinstance(family, LatentFamily):
            raise UnsupportedRequest("cuda_graphs", "are for native families on a GPU")
        family.graphs = CudaGraphs(family.denoise, device)


def _compile_blocks(family: Family, denoiser: Any, spec: CheckpointSpec, device: Device) -> None:
    """Compile the blocks of the denoiser and of the VAE's decoder."""
    repeated = getattr(denoiser, "_repeated_blocks", None)
    if not repeated:
        raise UnsupportedRequest(
            "compile_blocks", f"the denoiser of family {spec.family!r} names no repeated blocks"
        )
    if spec.adapters or spec.block_cache_threshold:
        raise UnsupportedRequest(
            "compile_blocks",
            "with adapters or the block cache, a block would be compiled again for every row count",
        )
    compilers = COMPILERS["cuda" if device.is_cuda else "cpu"]
    if not any(map(shutil.which, compilers)):
        raise UnsupportedRequest(
            "compile_blocks", f"needs a compiler, and none of {', '.join(compilers)} is in PATH"
        )
    compile_named(denoiser, {*repeated, *CONVOLUTIONS})
    if isinstance(family, LatentFamily):
        # Convolutions are most of it, and like this layout.
        family.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compile_named(family.decoder, CONVOLUTIONS)


def compile_named(network: nn.Module, names: Collection[str], backend: str = "inductor") -> None:
    """Compile the blocks of these classes when they first run.

    One graph serves all row counts: static shapes are a tenth faster still, but cost a compilation
    per bucket.
    """
    for block in network.modules():
        if type(block).__name__ in names:
            block.compile(
                backend=backend,
                fullgraph=True,
                dynamic=True,
                recompile_limit=RECOMPILE_LIMIT,
                options=steady_options(),
            )


def steady_options() -> dict[str, bool]:
    """Return options of torch.compile that make sums independent of timings and of earlier shapes.

    Without them another process may compile kernels that give other bits, depending on which ran
    fastest and on the row count that came first. Options that this torch does not know are left
    out.
    """
    from torch._inductor import list_options

    return dict.fromkeys(
        sorted({"deterministic", "batch_invariant"}.intersection(list_options())), True
    )


@dataclass(frozen=True)
class Captured:
    """One recorded forward: write the inputs, replay, read the output."""

    graph: Any
    inputs: Rows
    output: Tensor


class CudaGraphs:
    """A forward recorded once per shape of its rows and replayed: thousands of launches become one.

    All graphs share a memory pool: only one runs at a time, and its output is copied out before the
    next. Where rows wear adapters or use the block cache, what runs depends on values, and the
    caller goes the plain way.
    """

    def __init__(self, denoise: Callable[[Rows], Tensor], device: Device) -> None:
        self._denoise = denoise
        self._device = device
        self._captured: dict[tuple[Any, ...], Captured] = {}
        # The stream of all recordings: the libraries' workspaces and a pool's memory belong to one
        # stream.
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, rows: Rows) -> Tensor:
        """Do as `denoise` does, for rows on the device."""
        key = tuple((name, tensor.dtype, *tensor.shape) for name, tensor in sorted(rows.items()))
        if key not in self._captured:
            self._captured[key] = self._capture(rows)
        captured = self._captured[key]
        for name, tensor in rows.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, rows: Rows) -> Captured:
        inputs = {name: tensor.clone() for name, tensor in rows.items()}
        self._stream = self._stream or cuda.Stream()
        self._stream.wait_stream(cuda.current_stream())
        graph = cuda.CUDAGraph()
        # The stream is also left where the recording fails: torch would not switch back by itself.
        with cuda.stream(self._stream):
            # Lazy work (handles, workspaces, compilation) must be over before anything is
            # recorded.
            for _ in range(2):
                self._denoise(inputs)
            # Other threads may use the device meanwhile. Only this thread's work is recorded, and
            # only this thread can spoil the recording.
            with cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = self._denoise(inputs)
        cuda.current_stream().wait_stream(self._stream)
        self._pool = self._pool or graph.pool()
        self._device.recordings += 1
        return Captured(graph, inputs, output)
