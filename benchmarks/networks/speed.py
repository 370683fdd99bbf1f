"""Images a second of one model: diffusers' own pipeline, the engine, and the engine's faster variants.

Every prompt is encoded before time is taken, for both sides; both end with pixels on the host. It judges nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.networks import a_request, lay_out
from benchmarks.networks.cells import Cells, Found, Setting, tidy
from benchmarks.networks.drawn import forget
from benchmarks.networks.models import MODELS, ROWS, Changes, Model
from benchmarks.networks.workbench import Workbench
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.families import family_named
from engine.loading import PRECISIONS
from engine.request import ImageRequest
from engine.scheduler import Batch

PATIENCE_S = 600  # for one image
FORWARDS_PER_DECODE = 5

Pixels = NDArray[np.uint8]
"""[h, w, 3]"""


def speed(name: str, setting: Setting, cells: Cells) -> None:
    """The cells of one model: first what is judged, last what has to be compiled."""
    model = MODELS[name]
    if setting.tiny:
        model = replace(model, num_steps=3, plain_images=1, alone_images=2, busy_images=4, max_batch_rows=4, needs_s={})
    elif setting.quick:
        needs_s = {cell: 0.6 * seconds for cell, seconds in model.needs_s.items()}
        model = replace(model, plain_images=2, alone_images=2, busy_images=model.busy_images // 3 + 1, needs_s=needs_s)
    spec = lay_out(setting.folder, model.family, "tiny" if setting.tiny else "full")
    bench = _SpeedBench(model, spec, a_request(spec, num_steps=model.num_steps, guidance=model.guidance), setting)
    measures: dict[str, Callable[[], Found]] = {"eager": bench.beside_plain, "overlap": bench.overlap}
    for variant, changes in model.variants.items():
        if not setting.is_cuda and variant != "channels_last":
            continue  # graphs are a GPU's, and compiling for a CPU takes minutes
        if "compile_blocks" in changes:
            measures.setdefault("plain_compiled", bench.plain_compiled)
        measures[variant] = lambda changes=changes: bench.variant(changes)
    for cell, measure in measures.items():
        cells.take(cell, measure, needs_s=model.needs_s.get(cell, 0.0))


class _SpeedBench:
    """One model, one request whose seed is all that differs from image to image."""

    def __init__(self, model: Model, spec: CheckpointSpec, request: ImageRequest, setting: Setting) -> None:
        self._model = model
        self._spec = spec
        self._request = request
        self._setting = setting

    # --- cells ---

    def beside_plain(self) -> Found:
        """Plain calls, the engine, plain calls again, over one copy of the networks: clocks drift."""
        before, pixels = self._plain(self._model.plain_images)
        ours, our_pixels = self._ours(self._spec, self._model.alone_images)
        after, _ = self._plain(self._model.plain_images)
        plain = before | _latencies(before["latencies_s"] + after["latencies_s"])
        return {
            "plain": plain,
            "ours": ours,
            "ours_to_plain": ours["images_per_s"] / plain["images_per_s"],
            "levels_apart": int(np.abs(pixels.astype(int) - our_pixels.astype(int)).max()),  # other kernels, other last bits
        }

    def variant(self, changes: Changes) -> Found:
        """The engine with these changes to its checkpoint, over networks of its own: they are changed in place."""
        with _own_networks():
            return self._ours(replace(self._spec, **changes), max(2, self._model.alone_images // 2))[0]

    def plain_compiled(self) -> Found:
        """Plain calls with blocks compiled as diffusers recommends, over networks of their own."""
        with _own_networks():
            return self._plain(self._model.plain_images, compiled=True)[0]

    def overlap(self) -> Found:
        """Forwards, decodes, and both at once: how much of the decodes' time disappears? And do small copies wait for the queue?"""
        bench = Workbench(self._spec, self._setting.device)
        image = bench.started(self._request)
        batch = Batch.alone(image)
        decodes = 2 if self._setting.tiny or self._setting.quick else 4

        def decode() -> None:
            bench.runner.decode(image)

        def forwards(before_some: Callable[[], None] = lambda: None) -> None:
            for _ in range(decodes):
                before_some()
                for _ in range(FORWARDS_PER_DECODE):
                    bench.runner.predict(batch)

        def timed(work: Callable[[], None]) -> float:
            bench.wait()
            started = time.perf_counter()
            work()
            bench.wait()
            return time.perf_counter() - started

        timed(lambda: forwards(decode))
        forwards_s, both_s = timed(forwards), timed(lambda: forwards(decode))
        decodes_s = timed(lambda: [decode() for _ in range(decodes)] and None)
        found = {
            "forwards": decodes * FORWARDS_PER_DECODE,
            "decodes": decodes,
            "forwards_s": forwards_s,
            "decodes_s": decodes_s,
            "both_s": both_s,
            "hidden_share": (forwards_s + decodes_s - both_s) / decodes_s,
        }
        if self._setting.is_cuda:
            for _ in range(3):
                bench.runner.predict(batch)
            launched = time.perf_counter()
            torch.zeros(4).to(bench.device.torch_device, non_blocking=True)  # not pinned, as the timesteps of every forward
            copied = time.perf_counter()
            bench.wait()
            found |= {"small_copy_s": copied - launched, "queue_behind_small_copy_s": time.perf_counter() - copied}
        return found

    # --- stretches ---

    def _plain(self, images: int, *, compiled: bool = False) -> tuple[Found, Pixels]:
        """Calls of the diffusers pipeline one after the other, over the networks drawn last; and the first one's pixels."""
        family: Any = family_named(self._spec.family)
        loaded = family.load(self._spec, dtype=PRECISIONS[self._spec.precision], device=torch.device(self._setting.device))
        pipe, arguments = loaded.pipeline(), loaded.arguments(self._request)
        if compiled:
            networks = loaded.networks()
            networks.get("unet", networks.get("transformer")).compile_repeated_blocks(fullgraph=True)

        def render(seed: int, **changes: Any) -> Pixels:
            pixels = pipe(**arguments | changes, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
            return (pixels * 255).round().astype(np.uint8)

        with _as_torch_comes():
            started = time.perf_counter()
            render(0, num_inference_steps=2)
            first_call_s = time.perf_counter() - started
            self._forget_peak()
            pixels, latencies_s = _one_by_one(render, images)
        return _latencies(latencies_s) | {"first_call_s": first_call_s, "peak_bytes": self._peak_bytes()}, pixels

    def _ours(self, spec: CheckpointSpec, images: int) -> tuple[Found, Pixels]:
        """Images one after the other, then many at once; and the first one's pixels."""
        model, request = self._model, self._request
        rows = tuple(n for n in ROWS if n <= model.max_batch_rows)
        config = EngineConfig(
            device=self._setting.device,
            max_inflight=32,
            max_batch_rows=model.max_batch_rows,
            row_buckets=rows if spec.cuda_graphs else (),
            warm_up_repeats=2,
        )
        with Engine(config, [spec]) as engine:

            def render(seed: int) -> Pixels:
                return engine.submit(replace(request, id=f"alone {seed}", seed=seed)).result(PATIENCE_S).pixels

            render(0)  # its prompt is encoded from now on
            self._forget_peak()
            pixels, latencies_s = _one_by_one(render, images)
            found = _latencies(latencies_s) | {"start_s": engine.load_s + engine.warm_up_s, "peak_bytes": self._peak_bytes()}
            found["busy"] = self._busy(engine)
            key = next(key for key in engine.costs.measured_keys() if key.width_px == request.width_px)
            found["knee_rows"] = engine.costs.curve(key).knee(model.max_batch_rows)
            found["step_s_by_rows"] = {n: engine.costs.step_s(key, n) for n in rows}
            found["decode_s"] = engine.costs.decode_s(key)
        return found, pixels

    def _busy(self, engine: Engine) -> Found:
        """Many images at once: as many rows go into a forward as the measured curve says."""
        images = self._model.busy_images
        before, started = engine.stats(), time.perf_counter()
        handles = [engine.submit(replace(self._request, id=f"busy {seed}", seed=seed)) for seed in range(images)]
        for handle in handles:
            handle.result(PATIENCE_S)
        seconds, after = time.perf_counter() - started, engine.stats()
        gained = {name: after[name] - before[name] for name in ("rows", "steps", "encode_s", "forward_s", "decode_s")}
        return {
            "images": images,
            "images_per_s": images / seconds,
            "rows_per_forward": gained["rows"] / gained["steps"],
            "device_share": (gained["encode_s"] + gained["forward_s"] + gained["decode_s"]) / seconds,
            "peak_bytes": self._peak_bytes(),
        }

    def _forget_peak(self) -> None:
        if self._setting.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def _peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._setting.is_cuda else 0


def _one_by_one(render: Callable[[int], Pixels], images: int) -> tuple[Pixels, list[float]]:
    """The first image's pixels, and the seconds of each."""
    pixels, latencies_s = [], []
    for seed in range(images):
        started = time.perf_counter()
        pixels.append(render(seed))
        latencies_s.append(time.perf_counter() - started)
    return pixels[0], latencies_s


def _latencies(latencies_s: list[float]) -> Found:
    return {
        "images_per_s": 1 / statistics.mean(latencies_s),
        "latency_s": statistics.median(latencies_s),
        "latencies_s": latencies_s,
    }


@contextmanager
def _own_networks() -> Iterator[None]:
    """Within it networks are drawn anew, and nobody sees them after it."""
    forget()
    tidy()
    try:
        yield
    finally:
        forget()


@contextmanager
def _as_torch_comes() -> Iterator[None]:
    """Within it torch chooses kernels as for anybody who never asked; an engine pins them for the whole process."""
    cudnn: Any = torch.backends.cudnn
    pinned = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = False, True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = pinned
