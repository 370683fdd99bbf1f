"""Images a second of one model: diffusers' own pipeline, the engine, and its faster variants.

Every prompt is encoded before time is taken, for both sides; both end with pixels on the host. It
judges nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.cells import Cells, Found, Setting, tidy
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.models import MODELS, ROWS, Changes, Model
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.families import family_named
from engine.inflight import InFlight
from engine.loading import PRECISIONS
from engine.request import ImageRequest
from engine.scheduler import Batch

PATIENCE_S = 600  # for one image
FORWARDS_PER_DECODE = 5

Pixels = NDArray[np.uint8]
"""[h, w, 3]"""


def speed(name: str, setting: Setting, cells: Cells) -> None:
    """Take the cells of one model: first what is judged, last what has to be compiled."""
    model = _model(name, setting)
    scale = "tiny" if setting.tiny else "full"
    spec = write_checkpoint(setting.folder, model.family, scale)
    request = a_request(spec, num_steps=model.num_steps, guidance=model.guidance)
    of_model = _SpeedCells(model, spec, request, setting)
    measures: dict[str, Callable[[], Found]] = {
        "eager": of_model.beside_plain,
        "overlap": of_model.overlap,
    }
    for variant, changes in model.variants.items():
        if not setting.is_cuda and variant != "channels_last":
            continue  # graphs are a GPU's, and compiling for a CPU takes minutes
        if "compile_blocks" in changes:
            measures.setdefault("plain_compiled", of_model.plain_compiled)
        measures[variant] = partial(of_model.variant, changes)
    for cell, measure in measures.items():
        cells.take(cell, measure, needs_s=model.needs_s.get(cell, 0.0))


def _model(name: str, setting: Setting) -> Model:
    """Return the model with as many images as the setting allows."""
    model = MODELS[name]
    if setting.tiny:
        return replace(
            model,
            num_steps=3,
            plain_images=1,
            alone_images=2,
            busy_images=4,
            max_batch_rows=4,
            needs_s={},
        )
    if setting.quick:
        return replace(
            model,
            plain_images=2,
            alone_images=2,
            busy_images=model.busy_images // 3 + 1,
            needs_s={cell: 0.6 * seconds for cell, seconds in model.needs_s.items()},
        )
    return model


class _SpeedCells:
    """One model, one request whose seed is all that differs from image to image."""

    def __init__(
        self, model: Model, spec: CheckpointSpec, request: ImageRequest, setting: Setting
    ) -> None:
        self._model = model
        self._spec = spec
        self._request = request
        self._setting = setting

    # --- cells ---

    def beside_plain(self) -> Found:
        """Time plain calls, the engine, and plain calls again: clocks drift.

        Over one copy of the networks.
        """
        before, pixels = self._plain(self._model.plain_images)
        ours, our_pixels = self._ours(self._spec, self._model.alone_images)
        after, _ = self._plain(self._model.plain_images)
        plain = before | _latencies(before["latencies_s"] + after["latencies_s"])
        # Other kernels, other last bits.
        levels_apart = int(np.abs(pixels.astype(int) - our_pixels.astype(int)).max())
        return {
            "plain": plain,
            "ours": ours,
            "ours_to_plain": ours["images_per_s"] / plain["images_per_s"],
            "levels_apart": levels_apart,
        }

    def variant(self, changes: Changes) -> Found:
        """Time the engine with these changes to its checkpoint.

        Over networks of its own: they are changed in place.
        """
        changed: dict[str, Any] = dict(changes)
        spec = replace(self._spec, **changed)
        images = max(2, self._model.alone_images // 2)
        with _own_networks():
            return self._ours(spec, images)[0]

    def plain_compiled(self) -> Found:
        """Time plain calls with blocks compiled as diffusers recommends.

        Over networks of their own.
        """
        with _own_networks():
            return self._plain(self._model.plain_images, compiled=True)[0]

    def overlap(self) -> Found:
        """Time forwards, decodes, and both at once.

        How much of the decodes' time disappears? And do small copies wait for the queue?
        """
        stepper = Stepper(self._spec, self._setting.device)
        is_short = self._setting.tiny or self._setting.quick
        overlap = _Overlap(stepper, stepper.started(self._request), decodes=2 if is_short else 4)
        return overlap.measure() | (overlap.small_copy() if self._setting.is_cuda else {})

    # --- stretches ---

    def _plain(self, images: int, *, compiled: bool = False) -> tuple[Found, Pixels]:
        """Call the diffusers pipeline again and again, over the networks drawn last.

        Returns what was found, and the first image's pixels.
        """
        family: Any = family_named(self._spec.family)
        loaded = family.load(
            self._spec,
            dtype=PRECISIONS[self._spec.precision],
            device=torch.device(self._setting.device),
        )
        pipe = loaded.pipeline()
        arguments = loaded.arguments(self._request)
        if compiled:
            networks = loaded.networks()
            denoiser = networks.get("unet", networks.get("transformer"))
            denoiser.compile_repeated_blocks(fullgraph=True)

        def render(seed: int, **changes: Any) -> Pixels:
            generator = torch.Generator("cpu").manual_seed(seed)
            pixels = pipe(**arguments | changes, generator=generator).images[0]
            finished: Pixels = (pixels * 255).round().astype(np.uint8)
            return finished

        with _unpinned_kernels():
            started = time.perf_counter()
            render(0, num_inference_steps=2)
            first_call_s = time.perf_counter() - started
            self._forget_peak()
            pixels, latencies_s = _one_by_one(render, images)
        found = {"first_call_s": first_call_s, "peak_bytes": self._peak_bytes()}
        return _latencies(latencies_s) | found, pixels

    def _ours(self, spec: CheckpointSpec, images: int) -> tuple[Found, Pixels]:
        """Render images one after the other, then many at once.

        Returns what was found, and the first image's pixels.
        """
        model = self._model
        request = self._request
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
                handle = engine.submit(replace(request, id=f"alone {seed}", seed=seed))
                return handle.result(PATIENCE_S).pixels

            render(0)  # its prompt is encoded from now on
            self._forget_peak()
            pixels, latencies_s = _one_by_one(render, images)
            found = _latencies(latencies_s) | {
                "start_s": engine.load_s + engine.warm_up_s,
                "peak_bytes": self._peak_bytes(),
            }
            found["busy"] = self._busy(engine)
            keys = engine.costs.measured_keys()
            key = next(key for key in keys if key.width_px == request.width_px)
            found["knee_rows"] = engine.costs.curve(key).knee(model.max_batch_rows)
            found["step_s_by_rows"] = {n: engine.costs.step_s(key, n) for n in rows}
            found["decode_s"] = engine.costs.decode_s(key)
        return found, pixels

    def _busy(self, engine: Engine) -> Found:
        """Render many images at once: forwards have as many rows as the measured curve says."""
        images = self._model.busy_images
        before = engine.stats()
        started = time.perf_counter()
        handles = [
            engine.submit(replace(self._request, id=f"busy {seed}", seed=seed))
            for seed in range(images)
        ]
        for handle in handles:
            handle.result(PATIENCE_S)
        seconds = time.perf_counter() - started
        after = engine.stats()
        gained = {
            name: after[name] - before[name]
            for name in ("rows", "steps", "encode_s", "forward_s", "decode_s")
        }
        device_s = gained["encode_s"] + gained["forward_s"] + gained["decode_s"]
        return {
            "images": images,
            "images_per_s": images / seconds,
            "rows_per_forward": gained["rows"] / gained["steps"],
            "device_share": device_s / seconds,
            "peak_bytes": self._peak_bytes(),
        }

    def _forget_peak(self) -> None:
        if self._setting.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def _peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._setting.is_cuda else 0


class _Overlap:
    """Forwards and decodes of one image, on a device that does nothing else."""

    def __init__(self, stepper: Stepper, image: InFlight, *, decodes: int) -> None:
        self._stepper = stepper
        self._image = image
        self._batch = Batch.alone(image)
        self._decodes = decodes

    def measure(self) -> Found:
        """Time forwards, decodes and both; the first time, in which kernels are chosen, is not."""
        self._timed(self._both)
        forwards_s = self._timed(self._forwards)
        both_s = self._timed(self._both)
        decodes_s = self._timed(self._decode_all)
        return {
            "forwards": self._decodes * FORWARDS_PER_DECODE,
            "decodes": self._decodes,
            "forwards_s": forwards_s,
            "decodes_s": decodes_s,
            "both_s": both_s,
            "hidden_share": (forwards_s + decodes_s - both_s) / decodes_s,
        }

    def small_copy(self) -> Found:
        """Time a small copy behind some forwards, and what is left of these then."""
        for _ in range(3):
            self._stepper.runner.predict(self._batch)
        device = self._stepper.device.torch_device
        launched = time.perf_counter()
        # Not pinned, as the timesteps of every forward.
        torch.zeros(4).to(device, non_blocking=True)
        copied = time.perf_counter()
        self._stepper.wait()
        return {
            "small_copy_s": copied - launched,
            "queue_behind_small_copy_s": time.perf_counter() - copied,
        }

    def _timed(self, work: Callable[[], None]) -> float:
        self._stepper.wait()
        started = time.perf_counter()
        work()
        self._stepper.wait()
        return time.perf_counter() - started

    def _forwards(self) -> None:
        for _ in range(self._decodes * FORWARDS_PER_DECODE):
            self._stepper.runner.predict(self._batch)

    def _both(self) -> None:
        for _ in range(self._decodes):
            self._stepper.runner.decode(self._image)
            for _ in range(FORWARDS_PER_DECODE):
                self._stepper.runner.predict(self._batch)

    def _decode_all(self) -> None:
        for _ in range(self._decodes):
            self._stepper.runner.decode(self._image)


def _one_by_one(render: Callable[[int], Pixels], images: int) -> tuple[Pixels, list[float]]:
    """Render images; return the first one's pixels, and the seconds of each."""
    pixels: list[Pixels] = []
    latencies_s: list[float] = []
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
    """Draw networks anew within it; nobody sees them after it."""
    forget()
    tidy()
    try:
        yield
    finally:
        forget()


@contextmanager
def _unpinned_kernels() -> Iterator[None]:
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
