"""What a forward takes by its rows, in seconds and bytes, and where a further row stops paying.

It judges nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.gpu.cells import Cells, Found, Setting
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.configs import SIDES
from benchmarks.gpu.models import MODELS, ROWS
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.costs import CostModel
from engine.device import is_out_of_memory
from engine.scheduler import Batch

REPEATS = 3


def curves(setting: Setting, cells: Cells) -> None:
    """Take a cell for each network and size: a network is drawn once for all sizes."""
    rows = tuple(n for n in ROWS if n <= (4 if setting.tiny or setting.quick else 16))
    full_px = SIDES[setting.scale]
    for family in MODELS:
        for name, side_px in (("half side", full_px // 2), ("full side", full_px)):
            cells.take(f"{family} {name}", partial(_curve, family, side_px, rows, setting))
        forget()


def _curve(family: str, side_px: int, rows: Sequence[int], setting: Setting) -> Found:
    """Measure forwards of so many unguided images.

    Each with noise of its own: a GPU is quicker over the zeros of padding.
    """
    spec = write_checkpoint(setting.folder, family, setting.scale, sizes=((side_px, side_px),))
    stepper = Stepper(spec, setting.device)
    device = stepper.device
    costs = CostModel()
    request = a_request(spec, guidance=1.0)
    key = stepper.key(request)
    images = [stepper.started(replace(request, id=str(n), seed=n)) for n in range(max(rows))]
    held_bytes = device.memory_bytes()
    step_s: dict[int, float] = {}
    step_bytes: dict[int, int] = {}
    for n in rows:
        try:
            device.forget_peak()
            seconds = _forwards_s(stepper, Batch(tuple(images[:n]), n))
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            break
        step_s[n] = statistics.median(seconds)
        step_bytes[n] = device.peak_bytes() - held_bytes
        for each_s in seconds:
            costs.observe_step(key, n, each_s)
    device.free_cached_memory()
    device.forget_peak()
    decodes = (stepper.runner.decode(images[0]) for _ in range(1 + REPEATS))
    decodes_s = [decode.watch.span().seconds for decode in decodes][1:]
    return {
        "side_px": side_px,
        "held_bytes": held_bytes,
        "step_s_by_rows": step_s,
        "step_bytes_by_rows": step_bytes,
        "knee_rows": costs.curve(key).knee(max(step_s)),
        "decode_s": statistics.median(decodes_s),
        "decode_bytes": device.peak_bytes() - held_bytes,
    }


def _forwards_s(stepper: Stepper, batch: Batch) -> list[float]:
    """Return the seconds of each of some forwards, on the device's clock.

    The first, in which kernels are chosen, is not among them.
    """
    seconds = []
    for _ in range(1 + REPEATS):
        watch = stepper.device.stopwatch()
        stepper.runner.predict(batch)
        watch.stop()
        seconds.append(watch.span().seconds)
    return seconds[1:]
