"""The two systems that are compared: one worker with its queues each."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from benchmarks.lib.background_load import BackgroundLoad
from benchmarks.lib.load import equal_jobs
from benchmarks.lib.measured_stack import MeasuredStack
from benchmarks.tiers.stock_celery import CeleryQueues
from policy.fleet import Fleet, parse_size
from policy.tiers import guaranteed_slots

STEPS = {"fast": 4, "quality": 20, "batch": 20}
FILL_WITHIN_S = 20
CELERY_WAITING = 8  # tasks of a lower tier; only one is rendered at a time


class System(Protocol):
    """One worker with its queues."""

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """Add one job; return when it is accepted, or when `stop` is set meanwhile."""

    def take_latencies_s(self) -> list[float]:
        """Return those of all fast jobs asked for since the last time, when all are done."""

    def background_load(self, tiers: Sequence[str]) -> BackgroundLoad:
        """Make a load that keeps these tiers full."""

    def wait_full(self, background: BackgroundLoad) -> None:
        """Return when the worker has taken what it takes."""

    def clear(self) -> None:
        """Cancel all; return when the worker is idle."""


class Ours:
    """Darkroom. Each tier has a tenant of its own."""

    def __init__(self, measured: MeasuredStack) -> None:
        self.measured = measured
        self.step_s: list[float] = []  # of the loaded batch, one value a loaded round
        slots = measured.pool.slots
        self.slots_for_lower_tiers = slots - guaranteed_slots(measured.fleet, "fast", slots)
        self.last_fast_ids: list[str] = []
        self._fast_ids: list[str] = []
        self._next_job = _next_jobs()
        self._lock = threading.Lock()

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """See `System`."""
        with self._lock:
            job = self._next_job[tier]()
        job_id = self.measured.clients[tier].submit(job, stop)
        if tier == "fast" and job_id is not None:
            self._fast_ids.append(job_id)

    def take_latencies_s(self) -> list[float]:
        """See `System`."""
        self.last_fast_ids = self._fast_ids
        self._fast_ids = []
        if late := self.measured.queries.wait_served(self.last_fast_ids):
            raise SystemExit(f"{late} of {len(self.last_fast_ids)} fast jobs do not end")
        return self.measured.queries.latencies_s(self.last_fast_ids)["fast"]

    def background_load(self, tiers: Sequence[str]) -> BackgroundLoad:
        """See `System`."""
        wanted = dict.fromkeys(tiers, 2 * self.measured.pool.slots)
        return BackgroundLoad(lambda: self.measured.queries.levels(tiers), self.ask, wanted)

    def wait_full(self, background: BackgroundLoad) -> None:
        """See `System`."""
        background.wait_running(self.slots_for_lower_tiers, FILL_WITHIN_S)

    def clear(self) -> None:
        """See `System`."""
        with ThreadPoolExecutor(len(STEPS)) as threads:
            list(threads.map(self.measured.clear, STEPS))
        self._fast_ids = []


class StockCelery:
    """A stock Celery worker, asked for what Darkroom's defaults make of each job."""

    def __init__(self, queues: CeleryQueues, fleet: Fleet) -> None:
        self._queues = queues
        self._template = _template(fleet)
        self._next_job = _next_jobs()
        self._lock = threading.Lock()
        self._asked = 0

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """See `System`."""
        with self._lock:
            job = self._next_job[tier]()
            self._asked += tier == "fast"
        of_job = {"prompt": job["prompt"], "num_steps": job["steps"], "seed": job["seed"]}
        self._queues.ask(tier, {**self._template, **of_job})

    def take_latencies_s(self) -> list[float]:
        """See `System`."""
        count = self._asked
        self._asked = 0
        return self._queues.take_latencies_s("fast", count)

    def background_load(self, tiers: Sequence[str]) -> BackgroundLoad:
        """See `System`."""
        return BackgroundLoad(self._queues.levels, self.ask, dict.fromkeys(tiers, CELERY_WAITING))

    def wait_full(self, background: BackgroundLoad) -> None:
        """See `System`."""
        background.wait_running(1, FILL_WITHIN_S)

    def clear(self) -> None:
        """See `System`."""
        self._queues.clear()


def _next_jobs() -> dict[str, Any]:
    """Return the supply of each tier, the same for both systems."""
    return {
        tier: equal_jobs(tier, steps, seed=number)
        for number, (tier, steps) in enumerate(STEPS.items())
    }


def _template(fleet: Fleet) -> Mapping[str, Any]:
    """Return the fields of an `ImageRequest` that are the same for all jobs."""
    name = fleet.default_model()
    model = fleet.models[name]
    width_px, height_px = parse_size(model.sizes[0])
    return {
        "id": "plain",
        "group": "plain",
        "checkpoint": name,
        "width_px": width_px,
        "height_px": height_px,
        "guidance": model.default_guidance,
        "sampler": model.default_sampler,
    }
