"""The engine over networks drawn at random: images one after the other, then many at once.

The prompt is encoded before time is taken; an image ends with pixels on the host.
"""

import time
from dataclasses import replace

from benchmarks.gpu.cells import Found
from benchmarks.gpu.memory import forget_peaks, peaks
from benchmarks.gpu.models import ROWS
from benchmarks.gpu.plain import Pixels, latencies, one_by_one
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.request import ImageRequest

PATIENCE_S = 600  # for one image


def measure_engine(
    spec: CheckpointSpec,
    request: ImageRequest,
    device: str,
    *,
    max_batch_rows: int,
    alone: int,
    busy: int,
) -> tuple[Found, Pixels]:
    """Render `alone` images one after the other, then `busy` at once.

    Only the seed differs from image to image. Returns what was found, and the first image's pixels.
    """
    config = EngineConfig(
        device=device, max_inflight=32, max_batch_rows=max_batch_rows, warm_up_repeats=2
    )
    with Engine(config, [spec]) as engine:

        def render(seed: int) -> Pixels:
            handle = engine.submit(replace(request, id=f"alone {seed}", seed=seed))
            return handle.result(PATIENCE_S).pixels

        render(0)  # its prompt is encoded from now on
        forget_peaks(device)
        pixels, latencies_s = one_by_one(render, alone)
        found = latencies(latencies_s) | peaks(device)
        found["start_s"] = engine.load_s + engine.warm_up_s
        found["busy"] = _busy(engine, request, busy) | peaks(device)
        keys = engine.costs.measured_keys()
        key = next(key for key in keys if key.width_px == request.width_px)
        found["knee_rows"] = engine.costs.curve(key).knee(max_batch_rows)
        found["step_s_by_rows"] = {
            n: engine.costs.step_s(key, n) for n in ROWS if n <= max_batch_rows
        }
        found["decode_s"] = engine.costs.decode_s(key)
    return found, pixels


def _busy(engine: Engine, request: ImageRequest, images: int) -> Found:
    """Render many images at once: forwards have as many rows as the measured curve says."""
    before = engine.stats()
    started = time.perf_counter()
    handles = [
        engine.submit(replace(request, id=f"busy {seed}", seed=seed)) for seed in range(images)
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
    }
