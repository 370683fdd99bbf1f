"""Jobs of three models on one engine, and steps of an image beside swaps."""

import hashlib
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from prometheus_client import REGISTRY

from benchmarks.lib.statistics import percentile
from benchmarks.reload.measurement import Steps
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.loading import expected_weights_bytes
from engine.request import Determinism, ImageRequest
from policy.fleet import parse_fleet
from policy.residency import ALL, ResidencyRule
from settings import REPO
from tasks.engines import checkpoint_specs
from tasks.residency import Residency

IN_HAND = 16  # jobs, as slots of a worker
PATIENCE_S = 5.0
NUM_STEPS = 8
BUCKET_ROWS = 8
ZIPF = (1.0, 1 / 2, 1 / 3)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    jobs: int
    swaps: int  # beside the image whose steps are timed


FULL = Extent(jobs=400, swaps=20)
QUICK = Extent(jobs=60, swaps=4)


@dataclass(frozen=True, kw_only=True)
class Served:
    """How the jobs were served. digests: of their pixels, in the jobs' order."""

    seconds: float
    swaps: int
    longest_wait_s: float
    digests: Sequence[str]

    @property
    def images_per_s(self) -> float:
        """Return the images of a second."""
        return len(self.digests) / self.seconds


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of the steps of one image, without and beside swaps. swap_s: the median swap."""

    quiet: Sequence[float]
    beside: Sequence[float]
    swap_s: float

    def ratio(self, share: float) -> float:
        """Return a percentile of the steps beside swaps ÷ that of the quiet ones."""
        return percentile(self.beside, share) / percentile(self.quiet, share)


def three_models() -> list[CheckpointSpec]:
    """Return the first model of fleet.toml under three names."""
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    own = checkpoint_specs(fleet, list(fleet.models)[:1], REPO)[0]
    return [replace(own, name=f"model-{number}") for number in range(len(ZIPF))]


@contextmanager
def _resident(
    specs: Sequence[CheckpointSpec], most_loaded: int
) -> Iterator[tuple[Engine, Residency]]:
    """An engine with the first models loaded, and what brings the others."""
    rule = ALL
    if most_loaded < len(specs):
        # Buffers are not in the files.
        room_bytes = int(expected_weights_bytes(specs[0]) * (most_loaded + 0.5))
        rule = ResidencyRule(room_bytes, PATIENCE_S)
    with Engine(EngineConfig(max_inflight=IN_HAND), specs[:most_loaded]) as engine:
        residency = Residency(
            engine,
            {spec.name: spec for spec in specs},
            rule,
            explain=lambda failure: failure.problem,
            on_change=lambda residency: None,
            give_up=lambda reason: None,
        )
        residency.start()
        yield engine, residency
        residency.close()


def serve(specs: Sequence[CheckpointSpec], extent: Extent, *, most_loaded: int) -> Served:
    """Serve jobs, always as many at a time as a worker has in hand."""
    rng = random.Random(1)
    names = rng.choices([spec.name for spec in specs], weights=ZIPF, k=extent.jobs)
    waits: list[float] = []
    with _resident(specs, most_loaded) as (engine, residency):
        before = _swaps()

        def do(number: int) -> str:
            granted = threading.Event()
            began_at = time.monotonic()
            with residency.using(names[number], granted.set) as use:
                if not use.is_ready:
                    granted.wait()
                waits.append(time.monotonic() - began_at)
                request = _request(specs[0], names[number], seed=number)
                image = engine.submit(request).result()
            return hashlib.sha256(image.pixels.tobytes()).hexdigest()

        started_at = time.monotonic()
        with ThreadPoolExecutor(IN_HAND) as hands:
            digests = list(hands.map(do, range(extent.jobs)))
        seconds = time.monotonic() - started_at
        swaps = _swaps() - before
    return Served(seconds=seconds, swaps=swaps, longest_wait_s=max(waits), digests=digests)


def step_times(specs: Sequence[CheckpointSpec], extent: Extent) -> StepTimes:
    """Time the steps of an image of the first model; let the other two take turns beside it."""
    took_s: list[float] = []
    with _resident(specs, 2) as (engine, residency), residency.using(specs[0].name, lambda: None):
        steps = Steps(engine, specs[0])
        steps.wait_for(50)
        steps.take()
        steps.wait_for(100 * extent.swaps)
        quiet = steps.take()
        for number in range(extent.swaps):
            granted = threading.Event()
            began_at = time.monotonic()
            with residency.using(specs[2 - number % 2].name, granted.set) as use:
                if not use.is_ready:
                    granted.wait()
            took_s.append(time.monotonic() - began_at)
        beside = steps.take()
        steps.close()
    return StepTimes(quiet=quiet, beside=beside, swap_s=statistics.median(took_s))


def _swaps() -> int:
    told = {"phase": "swap"}
    return int(REGISTRY.get_sample_value("darkroom_model_load_seconds_count", told) or 0)


def _request(spec: CheckpointSpec, checkpoint: str, *, seed: int) -> ImageRequest:
    width_px, height_px = spec.sizes[0]
    return ImageRequest(
        id=f"job {seed}",
        group=f"job {seed}",
        checkpoint=checkpoint,
        prompt="a red circle",
        width_px=width_px,
        height_px=height_px,
        num_steps=NUM_STEPS,
        guidance=4.0,
        sampler=spec.samplers[0],
        seed=seed,
        determinism=Determinism.REPRODUCIBLE,
        bucket_rows=BUCKET_ROWS,
    )
