"""The rounds: idle and loaded in turns, for both systems; then all tiers full."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.lib.background_load import BackgroundLoad
from benchmarks.lib.load import play, spaced
from benchmarks.lib.progress import log_progress
from benchmarks.lib.statistics import percentile
from benchmarks.tiers.systems import STEPS, Ours, StockCelery, System

LOW_TIERS = ("quality", "batch")
GAPS = (2.0, 4.0)  # times what a fast job takes on an idle worker


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    rounds: int
    fast_jobs: int  # a round
    trials: int  # fast jobs that set the gaps
    windows: int
    window_s: float
    warm_up_s: float  # of the saturated round


FULL = Extent(rounds=4, fast_jobs=75, trials=12, windows=2, window_s=60.0, warm_up_s=15.0)
QUICK = Extent(rounds=1, fast_jobs=8, trials=3, windows=1, window_s=5.0, warm_up_s=1.0)


@dataclass
class Stretches:
    """All stretches of one kind of one system."""

    latencies_s: list[list[float]] = field(default_factory=list)  # a list a round
    # Mean images that ran by tier, of the loaded ones.
    running: list[Mapping[str, float]] = field(default_factory=list)

    def percentile_s(self, share: float) -> float:
        """Return a percentile over all rounds."""
        return percentile([latency_s for some in self.latencies_s for latency_s in some], share)


@dataclass
class Findings:
    """What the run gave."""

    gap_s: tuple[float, float] = (0.0, 0.0)
    # By system, and idle or loaded.
    cells: dict[tuple[str, str], Stretches] = field(default_factory=dict)
    shares: list[dict[str, float]] = field(default_factory=list)  # by tier, a value a window
    # Of a window's device seconds: one job of the tier.
    edges: dict[str, float] = field(default_factory=dict)
    # Mean images that ran while all tiers were full, by tier.
    saturated: Mapping[str, float] = field(default_factory=dict)
    late_s: float = 0.0

    def ratio(self, system: str) -> float:
        """Return loaded p99 ÷ idle p99."""
        loaded = self.cells[system, "loaded"].percentile_s(0.99)
        return loaded / self.cells[system, "idle"].percentile_s(0.99)


def measure(ours: Ours, celery: StockCelery, extent: Extent) -> Findings:
    """Measure all rounds of both systems, then who gets how much of ours when all is full."""
    systems: dict[str, System] = {"ours": ours, "celery": celery}
    cells = {(name, kind): Stretches() for name in systems for kind in ("idle", "loaded")}
    findings = Findings(cells=cells)
    findings.gap_s = _gaps(systems.values(), extent.trials)
    for number in range(extent.rounds):
        instants = spaced(extent.fast_jobs, findings.gap_s, seed=number)
        for name, system in systems.items():
            idle_p99_s = _idle(system, instants, findings, name)
            loaded_p99_s = _loaded(system, instants, findings, name)
            log_progress(
                f"round {number + 1} of {extent.rounds}, {name}: "
                f"p99 {idle_p99_s:.3f} s idle, {loaded_p99_s:.3f} s loaded"
            )
    _saturate(ours, extent, findings)
    return findings


def _idle(system: System, instants: Sequence[float], findings: Findings, name: str) -> float:
    """Play fast jobs on an idle worker; return their p99."""
    cell = findings.cells[name, "idle"]
    findings.late_s = max(findings.late_s, _play_fast(system, instants))
    cell.latencies_s.append(system.take_latencies_s())
    return percentile(cell.latencies_s[-1], 0.99)


def _loaded(system: System, instants: Sequence[float], findings: Findings, name: str) -> float:
    """Play fast jobs while the other tiers are full; return their p99."""
    cell = findings.cells[name, "loaded"]
    with _full(system, LOW_TIERS) as background, _step_measured(system):
        since_s = time.monotonic()
        findings.late_s = max(findings.late_s, _play_fast(system, instants))
        cell.running.append(background.mean_running(since_s))
        cell.latencies_s.append(system.take_latencies_s())
    return percentile(cell.latencies_s[-1], 0.99)


def _play_fast(system: System, instants: Sequence[float]) -> float:
    return play(instants, lambda _: system.ask("fast"))


def _gaps(systems: Iterable[System], trials: int) -> tuple[float, float]:
    """Return the shortest and the longest gap between fast jobs, in seconds.

    By the slower of the systems, when each job is alone.
    """
    slowest_s = 0.0
    for system in systems:
        latencies_s: list[float] = []
        for _ in range(trials + 1):
            system.ask("fast")
            latencies_s += system.take_latencies_s()
        of_connected = latencies_s[1:]  # the first one makes the connections
        slowest_s = max(slowest_s, statistics.median(of_connected))
    return GAPS[0] * slowest_s, GAPS[1] * slowest_s


@contextmanager
def _full(system: System, tiers: Sequence[str]) -> Iterator[BackgroundLoad]:
    """Keep these tiers of the system full; idle again afterwards."""
    with system.background_load(tiers) as background:
        system.wait_full(background)
        yield background
    system.clear()


@contextmanager
def _step_measured(system: System) -> Iterator[None]:
    """Add to `step_s` of ours what a forward took that was not the fast jobs' own.

    They ride alone: nobody else is of their rank.
    """
    if not isinstance(system, Ours):
        yield
        return
    metrics = system.measured.metrics
    before = metrics.read()
    yield
    gained = metrics.read() - before
    fast_steps, fast_s = system.measured.queries.forwards(system.last_fast_ids)
    others_s = gained.stage_s["denoise"] - fast_s
    system.step_s.append(others_s / max(1.0, gained.forwards - fast_steps))


def _saturate(ours: Ours, extent: Extent, findings: Findings) -> None:
    """Fill all tiers, and find who gets how much of the device."""
    queries = ours.measured.queries
    with _full(ours, list(STEPS)) as background:
        time.sleep(extent.warm_up_s)
        since_s = time.monotonic()
        instants = [queries.now()]
        for _ in range(extent.windows):
            time.sleep(extent.window_s)
            instants.append(queries.now())
        findings.saturated = background.mean_running(since_s)
    time.sleep(2)  # the worker notes what it had done for canceled jobs
    for begin, end in itertools.pairwise(instants):
        had = queries.device_time(begin, end)
        total_s = sum(time_of.seconds for time_of in had.values())
        findings.shares.append(
            {tier: had[tier].seconds / total_s if tier in had else 0.0 for tier in STEPS}
        )
        for tier, time_of in had.items():
            edge = time_of.each_s / total_s
            findings.edges[tier] = max(findings.edges.get(tier, 0.0), edge)
