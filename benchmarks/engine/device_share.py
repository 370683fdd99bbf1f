"""Part `overhead`: how much of the device thread's time is the device's work."""

import itertools
import threading
import time
from typing import Any

from benchmarks.engine.part import PATIENCE_S, Part, first_model
from benchmarks.engine.traffic import arrivals
from benchmarks.lib.tables import make_table
from engine.config import CheckpointSpec, EngineConfig
from engine.events import EngineEvent, Failed, Finished
from engine.request import ImageRequest

LONG_STEP_S = 0.02  # `device_share` is promised for models whose step takes this long
Reading = tuple[float, dict[str, Any]]
"""An instant, and the engine's counters then."""


def overhead(quick: bool, device: str) -> Part:
    """Measure the device's share of the device thread's time."""
    spec, config, template = first_model(device)
    warm_up, measured = (10, 20) if quick else (50, 400)
    readings = _saturate(spec, config, template, after=(warm_up, warm_up + measured))
    (started_at, before), (ended_at, after) = readings
    wall_s = ended_at - started_at
    shares = {
        stage: (after[f"{stage}_s"] - before[f"{stage}_s"]) / wall_s
        for stage in ("encode", "forward", "decode")
    }
    steps = after["steps"] - before["steps"]
    step_s = shares["forward"] * wall_s / steps
    rows = (after["rows"] - before["rows"]) / steps
    share = sum(shares.values())
    table = make_table(
        "The device thread at saturation",
        ("encode", "denoise", "decode", "together", "images/s"),
        caption=f"{measured} images in {wall_s:.1f} s, "
        f"{rows:.1f} rows and {step_s * 1000:.0f} ms a step",
    )
    percents = (f"{value:.2%}" for value in (*shares.values(), share))
    table.add_row(*percents, f"{measured / wall_s:.2f}")
    figures = {
        "device_share": share,
        "encode_share": round(shares["encode"], 4),
        "denoise_share": round(shares["forward"], 4),
        "decode_share": round(shares["decode"], 4),
        "saturated_images_per_s": round(measured / wall_s, 3),
        "saturated_rows_per_step": round(rows, 2),
        "saturated_step_ms": round(step_s * 1000, 2),
    }
    if step_s >= LONG_STEP_S:
        return Part(figures, [table])
    least_ms = LONG_STEP_S * 1000
    too_short = f"a step takes {step_s * 1000:.1f} ms; promised from {least_ms:.0f} ms up"
    return Part(figures, [table], {"device_share": too_short})


def _saturate(
    spec: CheckpointSpec,
    config: EngineConfig,
    template: ImageRequest,
    *,
    after: tuple[int, int],
) -> list[Reading]:
    """Keep every slot taken, and as many requests waiting.

    Returns the counters after each of so many images.
    """
    from engine.engine import Engine

    readings: list[Reading] = []
    failures: list[Exception] = []
    free = threading.Semaphore(2 * config.max_inflight)
    finished = itertools.count(1)
    with Engine(config, [spec]) as engine:

        def on_event(
            event: EngineEvent,
        ) -> None:  # on the device thread: between two pieces of its work
            if isinstance(event, Failed):
                failures.append(event.error)
            elif isinstance(event, Finished):
                if next(finished) in after:
                    readings.append((time.perf_counter(), engine.stats()))
                free.release()

        endless = (
            arrival.request
            for seed in itertools.count()
            for arrival in arrivals(100, template, seed=seed)
        )
        while len(readings) < len(after):
            engine.submit(next(endless), on_event)
            if not free.acquire(timeout=PATIENCE_S) or failures:
                raise SystemExit(f"the engine finishes nothing any more: {failures}")
    return readings
