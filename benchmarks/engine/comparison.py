"""Serve one traffic four ways, in rounds, and take the time of each request.

From its scheduled arrival until its pixels are there. Machines drift, so each round measures anew
what one pipeline call after the other can serve, and every system gets the round's one trace at
multiples of that rate, in an order that shifts from round to round. A round starts and ends with
empty queues: that flatters whoever cannot keep up with 1.5x, for his queue would go on growing.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.engine.cells import OURS, Cell, Comparison
from benchmarks.engine.systems import (
    LitServe,
    Ours,
    Outcome,
    Pixels,
    System,
    WholeRequests,
    litserve,
)
from benchmarks.engine.traffic import (
    MAX_BATCH,
    MIX,
    WINDOW_S,
    Arrival,
    arrivals,
    one_of_each,
)
from benchmarks.lib.pipeline import PlainPipeline
from benchmarks.lib.progress import log_progress
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.request import ImageRequest

SAME_PICTURE_LEVELS = 2  # of 255: another number of rows gives other last bits
PATIENCE_S = 1200  # for one stretch

Start = Callable[[], AbstractContextManager[System]]


def compare(
    spec: CheckpointSpec,
    config: EngineConfig,
    template: ImageRequest,
    *,
    loads: Sequence[float],
    rounds: int,
    requests: int,
) -> Comparison:
    """Serve `requests` requests a round, system and load.

    Raises SystemExit if a system fails or paints another picture.

    loads: times what sequential calls of the pipeline can serve.  requests: a multiple of 10.
    """
    pipe = PlainPipeline(Path(spec.path), spec.precision, config.device)
    systems: dict[str, Start] = {
        "sequential": lambda: WholeRequests(pipe, max_batch=1, window_s=0),
        "window": lambda: WholeRequests(pipe, max_batch=MAX_BATCH, window_s=WINDOW_S),
        "litserve": lambda: litserve(Path(spec.path), spec.precision, config.device),
        OURS: lambda: _ours(spec, config),
    }
    comparison = Comparison({(load, name): Cell() for load in loads for name in systems})
    names = list(systems)
    for number in range(rounds):
        capacity, pictures = _alone(pipe, one_of_each(template))
        comparison.capacities.append(capacity)
        traces = {
            load: arrivals(requests, template, seed=len(loads) * number + index)
            for index, load in enumerate(loads)
        }
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            with systems[name]() as system:
                _check_pictures(name, system, pictures)
                for load, trace in traces.items():
                    stretch = _serve(system, trace, load * capacity)
                    comparison.cells[load, name].add(stretch)
                    log_progress(
                        f"round {number + 1} of {rounds}, {name} at {load}x: "
                        f"{stretch.images_per_s:.2f} images/s"
                    )
                if isinstance(system, LitServe):
                    comparison.http_round_trips_s.append(system.round_trip_s(template))
    return comparison


@contextmanager
def _ours(spec: CheckpointSpec, config: EngineConfig) -> Iterator[Ours]:
    with Engine(config, [spec]) as engine:
        yield Ours(engine)


def _alone(
    pipe: PlainPipeline, requests: Sequence[ImageRequest]
) -> tuple[float, list[tuple[ImageRequest, Pixels]]]:
    """Return the images/s of one call after the other, for the mix; and what they gave.

    By the median of three calls of each kind.
    """
    seconds = 0.0
    pictures = []
    for kind, request in zip(MIX, requests, strict=True):
        taken_s = []
        for _ in range(3):
            started_at = time.perf_counter()
            [pixels] = pipe.render([request])
            taken_s.append(time.perf_counter() - started_at)
        seconds += kind.tenths / 10 * statistics.median(taken_s)
        pictures.append((request, pixels))
    return 1 / seconds, pictures


def _check_pictures(
    name: str, system: System, pictures: Sequence[tuple[ImageRequest, Pixels]]
) -> None:
    """Check that a system paints what the pipeline paints, and so warm it up."""
    _, painted = _timed(system, [Arrival(0, request) for request, _ in pictures], 1)
    for (request, expected), pixels in zip(pictures, painted, strict=True):
        levels = np.abs(expected.astype(int) - pixels.astype(int)).max()
        if levels > SAME_PICTURE_LEVELS:
            raise SystemExit(
                f"{name} paints another picture in {request.num_steps} steps: "
                f"off by {levels} levels of 255"
            )


def _serve(system: System, trace: Sequence[Arrival], rate: float) -> Cell:
    """Let the requests of a trace arrive and wait for all pixels.

    rate: of the requests, a second, on average.
    """
    latencies_s, _ = _timed(system, trace, rate)
    cell = Cell(
        seconds=max(
            arrival.at / rate + latency_s
            for arrival, latency_s in zip(trace, latencies_s, strict=True)
        )
    )
    for arrival, latency_s in zip(trace, latencies_s, strict=True):
        cell.latencies_s.setdefault(arrival.request.num_steps, []).append(latency_s)
    return cell


def _timed(
    system: System, trace: Sequence[Arrival], rate: float
) -> tuple[list[float], list[Pixels]]:
    """Return latencies and pixels, in the order of the trace."""
    finished: dict[str, tuple[float, Outcome]] = {}
    changed = threading.Condition()

    def tell(id: str, outcome: Outcome) -> None:
        with changed:
            finished[id] = (time.perf_counter(), outcome)
            changed.notify()

    started_at = time.perf_counter()
    due_at = {arrival.request.id: started_at + arrival.at / rate for arrival in trace}
    for arrival in trace:
        time.sleep(max(0, due_at[arrival.request.id] - time.perf_counter()))
        system.submit(arrival.request, partial(tell, arrival.request.id))
    with changed:
        if not changed.wait_for(lambda: len(finished) == len(trace), timeout=PATIENCE_S):
            raise SystemExit(
                f"{len(trace) - len(finished)} of {len(trace)} requests were not served"
            )
    latencies_s: list[float] = []
    pixels: list[Pixels] = []
    for arrival in trace:
        at, outcome = finished[arrival.request.id]
        if isinstance(outcome, Exception):
            raise SystemExit(f"a request failed: {outcome!r}") from outcome
        latencies_s.append(at - due_at[arrival.request.id])
        pixels.append(outcome)
    return latencies_s, pixels
