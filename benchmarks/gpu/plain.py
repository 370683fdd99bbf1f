"""Diffusers' own pipeline over networks drawn at random, under torch's own settings.

The prompt is encoded before time is taken; a call ends with pixels on the host.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.cells import Found
from benchmarks.gpu.memory import forget_peaks, peaks
from engine.config import CheckpointSpec
from engine.families import family_named
from engine.loading import PRECISIONS
from engine.request import ImageRequest

Pixels = NDArray[np.uint8]
"""[h, w, 3]"""


class PlainPipeline:
    """The pipeline of a checkpoint, over the networks drawn last."""

    def __init__(
        self, spec: CheckpointSpec, request: ImageRequest, device: str, *, compiled: bool = False
    ) -> None:
        family: Any = family_named(spec.family)
        loaded = family.load(spec, dtype=PRECISIONS[spec.precision], device=torch.device(device))
        self._device = device
        self._pipe = loaded.pipeline()
        self._arguments = loaded.arguments(request)
        if compiled:
            networks = loaded.networks()
            denoiser = networks.get("unet", networks.get("transformer"))
            denoiser.compile_repeated_blocks(fullgraph=True)  # as diffusers recommends

    def measure(self, calls: int, *, batch: int = 1) -> tuple[Found, Pixels]:
        """Call it again and again.

        batch: images of each call.  Returns what was found, and the first image's pixels.
        """

        def render(seed: int, **changes: Any) -> Pixels:
            generator = torch.Generator("cpu").manual_seed(seed)
            given = self._arguments | {"num_images_per_prompt": batch} | changes
            pixels = self._pipe(**given, generator=generator).images[0]
            finished: Pixels = (pixels * 255).round().astype(np.uint8)
            return finished

        with unpinned_kernels():
            started = time.perf_counter()
            render(0, num_inference_steps=2)
            first_call_s = time.perf_counter() - started
            forget_peaks(self._device)
            pixels, latencies_s = one_by_one(render, calls)
        found = latencies(latencies_s, batch=batch) | peaks(self._device)
        return found | {"first_call_s": first_call_s}, pixels


def one_by_one(render: Callable[[int], Pixels], calls: int) -> tuple[Pixels, list[float]]:
    """Render with one seed after the other; return the first pixels, and the seconds of each."""
    pixels: list[Pixels] = []
    latencies_s: list[float] = []
    for seed in range(calls):
        started = time.perf_counter()
        pixels.append(render(seed))
        latencies_s.append(time.perf_counter() - started)
    return pixels[0], latencies_s


def latencies(latencies_s: list[float], *, batch: int = 1) -> Found:
    """Return images a second and the latency of calls of `batch` images."""
    return {
        "images_per_s": batch / statistics.mean(latencies_s),
        "latency_s": statistics.median(latencies_s),
        "latencies_s": latencies_s,
    }


@contextmanager
def unpinned_kernels() -> Iterator[None]:
    """Let torch choose kernels within it as for anybody who never asked.

    An engine pins them for the whole process.
    """
    cudnn: Any = torch.backends.cudnn
    was_deterministic = cudnn.deterministic
    allowed_tf32 = cudnn.allow_tf32
    cudnn.deterministic = False
    cudnn.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.deterministic = was_deterministic
        cudnn.allow_tf32 = allowed_tf32
