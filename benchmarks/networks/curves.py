"""What a forward takes by its rows, in seconds and bytes, and where a further row stops paying. It judges nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.networks import a_request, lay_out
from benchmarks.networks.cells import Cells, Found, Setting
from benchmarks.networks.models import MODELS, ROWS
from benchmarks.networks.workbench import Workbench
from engine.costs import CostModel
from engine.device import is_out_of_memory
from engine.scheduler import Batch

REPEATS = 3


def curves(setting: Setting, cells: Cells) -> None:
    """A cell for each network and size."""
    rows = tuple(n for n in ROWS if n <= (4 if setting.tiny or setting.quick else 16))
    sides_px = (64, 128) if setting.tiny else (512, 1024)
    for side_px in sides_px:
        for family in MODELS:
            needs_s = 0 if setting.tiny else {("sdxl", 512): 6, ("flux", 512): 15, ("sdxl", 1024): 10, ("flux", 1024): 40}[family, side_px]
            cells.take(
                f"{family} {side_px}px",
                lambda family=family, side_px=side_px: _curve(family, side_px, rows, setting),
                needs_s=needs_s,
            )


def _curve(family: str, side_px: int, rows: Sequence[int], setting: Setting) -> Found:
    """Forwards of so many unguided images, each with noise of its own: a GPU is quicker over the zeros of padding."""
    spec = lay_out(setting.folder, family, "tiny" if setting.tiny else "full", sizes=((side_px, side_px),))
    bench = Workbench(spec, setting.device)
    device, costs = bench.device, CostModel()
    wish = a_request(spec, guidance=1.0)
    key = bench.key(wish)
    images = [bench.started(replace(wish, id=str(n), seed=n)) for n in range(max(rows))]
    held_bytes = device.memory_bytes()
    step_s: dict[int, float] = {}
    step_bytes: dict[int, int] = {}
    for n in rows:
        try:
            device.forget_peak()
            seconds = _forwards_s(bench, Batch(tuple(images[:n]), n))
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            break
        step_s[n], step_bytes[n] = statistics.median(seconds), device.peak_bytes() - held_bytes
        for each_s in seconds:
            costs.observe_step(key, n, each_s)
    device.free_cached_memory()
    device.forget_peak()
    decodes_s = [bench.runner.decode(images[0]).watch.seconds() for _ in range(1 + REPEATS)][1:]
    return {
        "held_bytes": held_bytes,
        "step_s_by_rows": step_s,
        "step_bytes_by_rows": step_bytes,
        "knee_rows": costs.curve(key).knee(max(step_s)),
        "decode_s": statistics.median(decodes_s),
        "decode_bytes": device.peak_bytes() - held_bytes,
    }


def _forwards_s(bench: Workbench, batch: Batch) -> list[float]:
    """Seconds of each of some forwards, on the device's clock; the first, in which kernels are chosen, is not among them."""
    seconds = []
    for _ in range(1 + REPEATS):
        watch = bench.device.stopwatch()
        bench.runner.predict(batch)
        watch.stop()
        seconds.append(watch.seconds())
    return seconds[1:]
