"""Part `leak`: does memory grow with the number of requests served?"""

import contextlib
import ctypes
import gc
import random
import time
from dataclasses import replace
from typing import Any

import psutil

from benchmarks.engine.part import PATIENCE_S, Part, first_model
from benchmarks.engine.traffic import arrivals
from benchmarks.lib.statistics import growth, growth_per_request
from benchmarks.lib.tables import make_table
from engine.errors import ImageCanceled
from engine.request import ImageRequest

MIB = 2**20
Memory = dict[str, int]
"""Bytes that are held, by where."""


def leak(quick: bool, device: str) -> Part:
    """Read memory after each of many waves of requests."""
    waves, wave = (4, 20) if quick else (40, 50)
    memory, canceled = _serve_waves(waves, wave, device)
    judged = memory[waves // 4 :]
    held = {name: [reading[name] for reading in judged] for name in judged[0]}
    slopes_kib = {name: growth_per_request(held[name], wave) / 1024 for name in held}
    growths = {name: growth(held[name]) for name in held}
    table = make_table(
        f"{waves * wave} requests, {canceled} of them canceled in time; "
        f"the last {len(judged) * wave} judged",
        ("memory", "at first, MiB", "in the end, MiB", "KiB a request", "growth"),
        left=("memory",),
    )
    for name, readings in held.items():
        table.add_row(
            name,
            f"{readings[0] / MIB:.1f}",
            f"{readings[-1] / MIB:.1f}",
            f"{slopes_kib[name]:+.2f}",
            f"{growths[name]:+.2%}",
        )
    figures = {
        "leak_kib_per_request": max(slopes_kib.values()),
        "leak_growth": max(growths.values()),
        "leak_requests": waves * wave,
        "leak_canceled": canceled,
        "memory_mib": {
            name: [round(reading[name] / MIB, 1) for reading in memory] for name in held
        },
    }
    if not quick:
        return Part(figures, [table])
    warm_up = f"{waves * wave} requests are still warm-up"
    return Part(figures, [table], dict.fromkeys(("leak_kib_per_request", "leak_growth"), warm_up))


def _serve_waves(waves: int, wave: int, device: str) -> tuple[list[Memory], int]:
    """Serve so many waves; return what was held after each, and how many were canceled."""
    from engine.engine import Engine

    # Every prompt is another, so a cache of the usual size would go on filling for longer than this
    # takes; a small one is full soon.
    spec, config, template = first_model(device, conditioning_cache_bytes=1024 * 1024)
    rng = random.Random(0)
    memory: list[Memory] = []
    with Engine(config, [spec]) as engine:
        for number in range(waves):
            requests = [
                replace(arrival.request, num_steps=rng.choice((1, 2)))
                for arrival in arrivals(wave, template, seed=number)
            ]
            _serve(engine, requests, rng)
            memory.append(_memory(device))
        return memory, engine.stats()["canceled"]


def _serve(engine: Any, requests: list[ImageRequest], rng: random.Random) -> None:
    """Serve one wave, a fifth of it canceled at odd moments; hold nothing of it afterwards."""
    handles = [engine.submit(request) for request in requests]
    for handle in rng.sample(handles, len(requests) // 5):
        handle.cancel()
        time.sleep(rng.uniform(0, 0.4))
    for handle in handles:
        with contextlib.suppress(ImageCanceled):
            handle.result(PATIENCE_S)


def _memory(device: str) -> Memory:
    """Read what is held, once garbage is collected and malloc has given back what it kept."""
    import torch

    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    process = {"process": psutil.Process().memory_info().rss}
    if not device.startswith("cuda"):
        return process
    return process | {"allocator of the GPU": torch.cuda.memory_allocated(device)}
