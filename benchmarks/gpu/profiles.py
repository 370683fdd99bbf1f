"""Where the time of a denoise step goes: torch's profiler over some steps, by kind of kernel.

Each cell leaves a trace that chrome://tracing and Perfetto open.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cells import Cells, Found, Setting
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.launches import full_batch
from benchmarks.gpu.models import model_named
from benchmarks.gpu.plan import PARTS, model_of
from benchmarks.gpu.stepper import Stepper
from engine.scheduler import Batch

STEPS = 3
DEVICE: Any = torch._C._autograd.DeviceType.CUDA
LONGEST = 20  # kernels that are named with their seconds
NAME_LENGTH = 120
OTHER = "other"
# Words in the names of kernels, and on a CPU of operations; the first kind that has one is it.
KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "convolution": ("conv", "fprop", "implicit_gemm", "nchwtonhwc", "nhwctonchw", "winograd"),
    "matmul": ("gemm", "cutlass", "nvjet", "cublas", "splitk", "gemv", "mm", "linear"),
    "norms": ("norm", "rowwisemoments", "computefusedparams"),
    "copies": ("memcpy", "memset", "copy", "catarray", "aten::cat", "clone"),
}


def profiles(setting: Setting, cells: Cells) -> None:
    """Take a cell for each model with one image and with a full forward."""
    for name in PARTS["profile"].cells:
        cells.take(name, partial(_profile, name, setting))


def kind_of(name: str) -> str:
    """Return the kind of a kernel or an operation."""
    lower = name.lower()
    for kind, words in KINDS.items():
        if any(word in lower for word in words):
            return kind
    return OTHER


def busy_and_span(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return how long any of the spans (start, end) lasts, and from the first to the last."""
    busy = 0.0
    first, until = None, 0.0
    for start, end in sorted(spans):
        first = start if first is None else first
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy, until - (first or 0.0)


def _profile(name: str, setting: Setting) -> Found:
    model = model_named(model_of(name.replace(" ", "_")), setting)
    spec = write_checkpoint(setting.folder, model.family, setting.scale)
    request = a_request(spec, num_steps=2 * STEPS, guidance=model.guidance)
    stepper = Stepper(spec, setting.device)
    is_full = name.endswith("full batch")
    batch = full_batch(stepper, request, model.max_batch_rows if is_full else model.rows)
    _step(stepper, batch)  # kernels are chosen
    stepper.wait()
    activities = [ProfilerActivity.CPU]
    if setting.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            _step(stepper, batch)
        stepper.wait()
    wall_s = time.perf_counter() - started
    file = setting.traces / f"trace-{name.replace(' ', '-')}.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    found = {"rows": batch.bucket_rows, "steps": STEPS, "wall_s": wall_s, "trace": file.name}
    return found | summed(profiler.events(), on_device=setting.is_cuda)


def _step(stepper: Stepper, batch: Batch) -> None:
    predictions = stepper.runner.predict(batch)
    for image, prediction in zip(batch.images, predictions, strict=True):
        stepper.runner.advance(image, prediction)


def summed(events: Iterable[Any], *, on_device: bool) -> Found:
    """Sum the profiler's events by kind.

    on_device: count kernels and copies, and the gaps between them. Else operations by what each
    takes beside those that it calls: a CPU has no gaps that would show.
    """
    seconds: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    launches: dict[str, int] = defaultdict(int)
    by_name: dict[str, float] = defaultdict(float)
    spans = []
    for event in events:
        if (event.device_type == DEVICE) is not on_device:
            continue
        took_us = event.self_cpu_time_total
        if on_device:
            spans.append((event.time_range.start, event.time_range.end))
            took_us = event.time_range.end - event.time_range.start
        kind = kind_of(event.name)
        launches[kind] += 1
        seconds[kind] += took_us / 1e6
        by_name[event.name] += took_us / 1e6
    busy_us, span_us = busy_and_span(spans)
    longest = sorted(by_name.items(), key=lambda each: each[1], reverse=True)[:LONGEST]
    return {
        "seconds_by_kind": seconds,
        "launches_by_kind": dict(launches),
        "longest": [[name[:NAME_LENGTH], took_s] for name, took_s in longest],
        "device_s": busy_us / 1e6 if on_device else None,
        "gaps_s": (span_us - busy_us) / 1e6 if on_device else None,
    }
