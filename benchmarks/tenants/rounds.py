"""The rounds: light tenants alone, the dump alone, and light tenants with the dump."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.lib.load import JobParameters, equal_jobs, play, poisson
from benchmarks.lib.measured_stack import MeasuredStack
from benchmarks.lib.progress import log_progress
from benchmarks.lib.statistics import percentile
from benchmarks.tenants.dump import Dump

BULK = "bulk"
STEPS = 20
LOAD = 0.35  # of the light tenants together, in parts of what the worker can do


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    rounds: int
    light_tenants: int
    jobs_each: int  # of a light tenant, a stretch
    dump: int
    capacity_jobs: int  # enough to keep the worker full while its capacity is measured
    fill_s: float  # from a landed dump until its stretch counts
    alone_s: float  # how long the worker is watched with the dump alone
    patience_s: float  # for light jobs, after the last has come


FULL = Extent(
    rounds=2,
    light_tenants=20,
    jobs_each=8,
    dump=5000,
    capacity_jobs=200,
    fill_s=5.0,
    alone_s=45.0,
    patience_s=120.0,
)
QUICK = Extent(
    rounds=1,
    light_tenants=6,
    jobs_each=1,
    dump=80,
    capacity_jobs=30,
    fill_s=2.0,
    alone_s=3.0,
    patience_s=5.0,
)


@dataclass(frozen=True)
class WorkerShare:
    """What the worker did for some seconds."""

    images_per_s: float
    busy_share: float
    mean_rows: float


@dataclass(frozen=True)
class Stretch:
    """Light tenants for some time, with or without a dump."""

    latencies_s: Mapping[str, list[float]]  # by tenant
    unserved: int  # of the jobs: they count with their age when patience ended
    worker: WorkerShare

    def all_latencies_s(self) -> list[float]:
        """Return those of all tenants."""
        return [latency_s for some in self.latencies_s.values() for latency_s in some]

    def percentile_s(self, share: float) -> float:
        """Return a percentile over all light jobs."""
        return percentile(self.all_latencies_s(), share)


@dataclass
class Findings:
    """What the run gave; lists have a value a round."""

    capacity: float = 0.0  # images/s
    alone: list[Stretch] = field(default_factory=list)
    dumped: list[Stretch] = field(default_factory=list)
    dump_alone: list[WorkerShare] = field(default_factory=list)
    accept_s: list[float] = field(default_factory=list)  # until the dump had landed
    accepted: list[int] = field(default_factory=list)  # of it, by then
    late_s: float = 0.0


class Rounds:
    """Measures everything on one stack."""

    def __init__(
        self, measured: MeasuredStack, light: list[str], tier: str, extent: Extent
    ) -> None:
        self._measured = measured
        self._light = light
        self._tier = tier
        self._extent = extent
        self._next_bulk = equal_jobs(tier, STEPS, seed=0)
        self._findings = Findings()

    def measure(self) -> Findings:
        """Measure the worker's capacity, then all rounds."""
        with self._landed(self._extent.capacity_jobs):
            self._findings.capacity = self._watch_dump().images_per_s
        for number in range(self._extent.rounds):
            self._round(number)
        return self._findings

    def _round(self, number: int) -> None:
        findings = self._findings
        of_all = f"round {number + 1} of {self._extent.rounds}"
        rate = LOAD * findings.capacity
        trace = poisson(self._light, self._extent.jobs_each, rate, seed=number)
        alone = self._play_light(trace, number)
        findings.alone.append(alone)
        log_progress(f"{of_all}, light alone: p99 {alone.percentile_s(0.99):.2f} s")
        started_at = time.monotonic()
        with self._landed(self._extent.dump) as dump:
            accept_s = time.monotonic() - started_at
            findings.accept_s.append(accept_s)
            findings.accepted.append(dump.accepted)
            log_progress(f"{dump.accepted} jobs of the dump accepted in {accept_s:.1f} s")
            findings.dump_alone.append(self._watch_dump())
            dumped = self._play_light(trace, number, dump_is_there=True)
            findings.dumped.append(dumped)
        log_progress(f"{of_all}, with the dump: p99 {dumped.percentile_s(0.99):.2f} s")

    @contextmanager
    def _landed(self, count: int) -> Iterator[Dump]:
        """Yield a dump that has been accepted and keeps the worker full; all gone afterwards."""
        with Dump(self._measured.clients[BULK], self._next_bulk, count) as dump:
            dump.wait_landed()
            yield dump
        self._measured.clear(BULK)

    def _watch_dump(self) -> WorkerShare:
        """Watch the worker with nothing but a dump."""
        time.sleep(self._extent.fill_s)
        return self._watch(lambda: time.sleep(self._extent.alone_s))

    def _play_light(
        self, trace: list[tuple[float, str]], number: int, *, dump_is_there: bool = False
    ) -> Stretch:
        """Let the light tenants ask; wait until they are served, or until patience ends.

        What they wait for then is canceled.
        """
        next_job = equal_jobs(self._tier, STEPS, seed=1000 + number)
        jobs = [(tenant, next_job()) for _, tenant in trace]
        job_ids: list[str] = []
        worker = self._watch(lambda: self._arrive(trace, jobs, job_ids))
        queries = self._measured.queries
        if dump_is_there and len(queries.unfinished_ids(BULK)) < self._measured.pool.slots:
            raise SystemExit("the dump is used up while light tenants still come: enlarge it")
        unserved = queries.wait_served(job_ids, self._extent.patience_s)
        stretch = Stretch(queries.latencies_s(job_ids), unserved, worker)
        if unserved:
            for tenant in {tenant for _, tenant in trace}:
                self._measured.clients[tenant].cancel(queries.unfinished_ids(tenant))
        return stretch

    def _arrive(
        self,
        trace: list[tuple[float, str]],
        jobs: list[tuple[str, JobParameters]],
        job_ids: list[str],
    ) -> None:
        """Submit a job at each instant of the trace; add the ids of those that are accepted."""

        def ask(number: int) -> None:
            tenant, job = jobs[number]
            job_id = self._measured.clients[tenant].submit(job)
            if job_id is not None:
                job_ids.append(job_id)

        late_s = play([at for at, _ in trace], ask)
        self._findings.late_s = max(self._findings.late_s, late_s)

    def _watch(self, go_on: Callable[[], None]) -> WorkerShare:
        """Watch what the worker does while `go_on` runs."""
        queries = self._measured.queries
        metrics = self._measured.metrics
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(metrics.read)  # both clocks at the same time
            begin = queries.now()
            before = reading.result()
            go_on()
            reading = threads.submit(metrics.read)
            end = queries.now()
            after = reading.result()
        gained = after - before
        images = sum(queries.images(begin, end).values())
        seconds = (end - begin).total_seconds()
        return WorkerShare(images / seconds, gained.busy_share, gained.mean_rows)
