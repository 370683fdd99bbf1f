"""What the fast tier waits for when the other tiers are full, and what they still get when it is.

    python -m benchmarks.tiers [--quick]

One CPU worker of a house of its own. Fast jobs of 4 steps come one at a time at seeded instants, whatever became of the earlier ones, with
gaps of two to four times what such a job takes on the idle worker. Rounds go idle, loaded, idle, loaded …, on the same stack with the same
instants; in a loaded one a feeder keeps twice as many quality and twice as many batch images unfinished as the worker has slots, and SQL
samples show how many of them ran. Between rounds the feeder's jobs are canceled.

Latency    Accepted to final, by the database's own timestamps: client threads on the same two cores would blur what they took themselves.
           p99 loaded may be 1.5 times p99 idle, plus one denoise step of the loaded batch, which is in progress when a fast job comes and
           cannot be taken back. That step is the mean forward of the loaded rounds, from the worker's metrics, less the fast jobs' own.
Shares     In one more round the feeder keeps the fast tier just as full. Device seconds by tier, in windows of 60 s: an attempt's are laid
           evenly over the time that it ran, so at the edges of a window a tier's share may be off by what one of its jobs takes: so much
           is allowed to be missing.
Celery     The same rounds, in turns with ours, with a stock Celery worker: strict priority of queues, late acks, a prefetch of one, one
           render at a time by plain diffusers with as many torch threads (benchmarks/sharing/plain_worker.py says why so). It writes no
           row and stores no image. The house's broker is its broker; only one of the two workers has work at any time.
"""

import argparse
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks.serving.cells import percentile
from benchmarks.sharing.arrivals import play, spaced, wishes
from benchmarks.sharing.feeding import Feeder
from benchmarks.sharing.house import House, running_house
from benchmarks.sharing.plain_celery import PlainCelery, plain_worker
from benchmarks.sharing.verdict import Target, report
from engine.request import ImageRequest
from policy.fleet import parse_fleet, parse_size
from policy.tiers import guaranteed_slots
from settings import REPO

STEPS = {"fast": 4, "quality": 20, "batch": 20}
LOW_TIERS = ("quality", "batch")
GAPS = (2.0, 4.0)  # times what a fast job takes on an idle worker
SLOWDOWN = 1.5
SHARES = {"quality": 0.15, "batch": 0.05}  # of the device's seconds, however much the fast tier wants
SLOTS_BUSY = 0.9  # of those that lower tiers may take: else nothing was shown
FILL_WITHIN_S = 20
PLAIN_WAITING = 8  # tasks of a lower tier; only one is rendered at a time
PLAIN_FIELDS = ("id", "group", "checkpoint", "prompt", "width_px", "height_px", "num_steps", "guidance", "sampler", "seed")


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int
    fast_jobs: int  # a round
    trials: int  # fast jobs that set the gaps
    windows: int
    window_s: float
    warm_up_s: float  # of the saturated round


FULL, QUICK = Extent(4, 75, 12, 2, 60.0, 15.0), Extent(1, 8, 3, 1, 5.0, 1.0)


@dataclass
class Stretches:
    """All stretches of one kind of one system."""

    latencies_s: list[list[float]] = field(default_factory=list)  # a list a round
    running: list[Mapping[str, float]] = field(default_factory=list)  # mean images by tier, of the loaded ones

    def percentile_s(self, share: float) -> float:
        """Over all rounds."""
        return percentile([latency_s for some in self.latencies_s for latency_s in some], share)


class System(Protocol):
    """One worker with its queues."""

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """Add one job; returns when it is accepted, or when `stop` is set meanwhile."""

    def take_latencies_s(self) -> list[float]:
        """Of all fast jobs asked for since the last time, when all are done."""

    def feeder(self, tiers: Sequence[str]) -> Feeder:
        """One that keeps these tiers full."""

    def wait_full(self, feeder: Feeder) -> None:
        """Return when the worker has taken what it takes."""

    def clear(self) -> None:
        """Cancel all; return when the worker is idle."""


class Ours:
    """The house. Each tier has a tenant of its own."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.step_s: list[float] = []  # of the loaded batch, one value a loaded round
        slots = house.pool.slots
        self.slots_for_lower_tiers = slots - guaranteed_slots(house.fleet, "fast", slots)
        self._wishes = {tier: wishes(tier, steps, seed=number) for number, (tier, steps) in enumerate(STEPS.items())}
        self._lock = threading.Lock()
        self._fast_ids: list[str] = []
        self.last_fast_ids: list[str] = []

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """See `System`."""
        with self._lock:
            wish = self._wishes[tier]()
        job_id = self.house.doors[tier].ask(wish, stop)
        if tier == "fast" and job_id is not None:
            self._fast_ids.append(job_id)

    def take_latencies_s(self) -> list[float]:
        """See `System`."""
        self.last_fast_ids, self._fast_ids = self._fast_ids, []
        if late := self.house.ledger.wait_served(self.last_fast_ids):
            raise SystemExit(f"{late} of {len(self.last_fast_ids)} fast jobs do not end")
        return self.house.ledger.latencies_s(self.last_fast_ids)["fast"]

    def feeder(self, tiers: Sequence[str]) -> Feeder:
        """See `System`."""
        return Feeder(lambda: self.house.ledger.levels(tiers), self.ask, dict.fromkeys(tiers, 2 * self.house.pool.slots))

    def wait_full(self, feeder: Feeder) -> None:
        """See `System`."""
        feeder.wait_running(self.slots_for_lower_tiers, FILL_WITHIN_S)

    def clear(self) -> None:
        """See `System`."""
        with ThreadPoolExecutor(len(STEPS)) as threads:
            list(threads.map(self.house.clear, STEPS))
        self._fast_ids = []


class Plain:
    """Stock Celery."""

    def __init__(self, celery: PlainCelery, template: ImageRequest) -> None:
        self._celery, self._template = celery, template
        self._wishes = {tier: wishes(tier, steps, seed=number) for number, (tier, steps) in enumerate(STEPS.items())}
        self._lock = threading.Lock()
        self._asked = 0

    def ask(self, tier: str, stop: threading.Event | None = None) -> None:
        """See `System`."""
        with self._lock:
            wish = self._wishes[tier]()
            self._asked += tier == "fast"
        request = asdict(self._template) | {"prompt": wish["prompt"], "num_steps": wish["steps"], "seed": wish["seed"]}
        self._celery.ask(tier, {name: request[name] for name in PLAIN_FIELDS})

    def take_latencies_s(self) -> list[float]:
        """See `System`."""
        count, self._asked = self._asked, 0
        return self._celery.take_latencies_s("fast", count)

    def feeder(self, tiers: Sequence[str]) -> Feeder:
        """See `System`."""
        return Feeder(self._celery.levels, self.ask, dict.fromkeys(tiers, PLAIN_WAITING))

    def wait_full(self, feeder: Feeder) -> None:
        """See `System`."""
        feeder.wait_running(1, FILL_WITHIN_S)

    def clear(self) -> None:
        """See `System`."""
        self._celery.clear()


@dataclass
class Findings:
    """What the run gave."""

    gap_s: tuple[float, float] = (0.0, 0.0)
    cells: dict[tuple[str, str], Stretches] = field(default_factory=dict)  # by system, and idle or loaded
    shares: list[dict[str, float]] = field(default_factory=list)  # by tier, a value a window
    edges: dict[str, float] = field(default_factory=dict)  # of a window's device seconds: one job of the tier
    saturated: Mapping[str, float] = field(default_factory=dict)  # mean images that ran, by tier
    late_s: float = 0.0

    def ratio(self, system: str) -> float:
        """Loaded p99 ÷ idle p99."""
        return self.cells[system, "loaded"].percentile_s(0.99) / self.cells[system, "idle"].percentile_s(0.99)


def main() -> int:
    """Measure, print tables and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ends within a minute; not_judged says what so little cannot show")
    options = parser.parse_args()
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    model = fleet.models[fleet.default_model()]
    with plain_worker(str(REPO / model.versions[0].source), model.precision) as connect, running_house(list(STEPS)) as house:
        ours, plain = Ours(house), Plain(connect(house.stack.env["BROKER_URL"]), _template(house))
        findings = _measure(ours, plain, QUICK if options.quick else FULL)
        accept_s = [seconds for door in house.doors.values() for seconds in door.accept_s]
        door = {"accept_p99_s": percentile(accept_s, 0.99), "refusals": {tier: door.refusals for tier, door in house.doors.items()}}
    return _report(ours, findings, door, quick=options.quick)


def _measure(ours: Ours, plain: Plain, extent: Extent) -> Findings:
    systems: dict[str, System] = {"ours": ours, "celery": plain}
    findings = Findings(cells={(name, kind): Stretches() for name in systems for kind in ("idle", "loaded")})
    findings.gap_s = _gaps(systems.values(), extent.trials)
    for number in range(extent.rounds):
        instants = spaced(extent.fast_jobs, findings.gap_s, seed=number)
        for name, system in systems.items():
            idle, loaded = findings.cells[name, "idle"], findings.cells[name, "loaded"]
            findings.late_s = max(findings.late_s, _play_fast(system, instants))
            idle.latencies_s.append(system.take_latencies_s())
            with _fed(system, LOW_TIERS) as feeder, _step_measured(system):
                since_s = time.monotonic()
                findings.late_s = max(findings.late_s, _play_fast(system, instants))
                loaded.running.append(feeder.mean_running(since_s))
                loaded.latencies_s.append(system.take_latencies_s())
            _say(
                f"round {number + 1} of {extent.rounds}, {name}: p99 {percentile(idle.latencies_s[-1], 0.99):.3f} s idle, "
                f"{percentile(loaded.latencies_s[-1], 0.99):.3f} s loaded"
            )
    _saturate(ours, extent, findings)
    return findings


def _play_fast(system: System, instants: Sequence[float]) -> float:
    return play(instants, lambda _: system.ask("fast"))


def _gaps(systems: Iterable[System], trials: int) -> tuple[float, float]:
    """The shortest and the longest gap between fast jobs, in seconds: by the slower of the systems, when each job is alone."""
    slowest_s = 0.0
    for system in systems:
        latencies_s = []
        for _ in range(trials + 1):
            system.ask("fast")
            latencies_s += system.take_latencies_s()
        slowest_s = max(slowest_s, statistics.median(latencies_s[1:]))  # the first one makes the connections
    return GAPS[0] * slowest_s, GAPS[1] * slowest_s


@contextmanager
def _fed(system: System, tiers: Sequence[str]) -> Iterator[Feeder]:
    """The system with these tiers full; idle again afterwards."""
    with system.feeder(tiers) as feeder:
        system.wait_full(feeder)
        yield feeder
    system.clear()


@contextmanager
def _step_measured(system: System) -> Iterator[None]:
    """Add to `step_s` of ours what a forward took that was not the fast jobs' own. They ride alone: nobody else is of their rank."""
    if not isinstance(system, Ours):
        yield
        return
    meter, ledger = system.house.meter, system.house.ledger
    before = meter.read()
    yield
    gained = meter.read() - before
    fast_steps, fast_s = ledger.forwards(system.last_fast_ids)
    system.step_s.append((gained.stage_s["denoise"] - fast_s) / max(1.0, gained.forwards - fast_steps))


def _saturate(ours: Ours, extent: Extent, findings: Findings) -> None:
    """All tiers full: who gets how much of the device."""
    ledger = ours.house.ledger
    with _fed(ours, list(STEPS)) as feeder:
        time.sleep(extent.warm_up_s)
        since_s = time.monotonic()
        instants = [ledger.now()]
        for _ in range(extent.windows):
            time.sleep(extent.window_s)
            instants.append(ledger.now())
        findings.saturated = feeder.mean_running(since_s)
    time.sleep(2)  # the worker notes what it had done for canceled jobs
    for begin, end in itertools.pairwise(instants):
        had = ledger.device_time(begin, end)
        total_s = sum(time_of.seconds for time_of in had.values())
        findings.shares.append({tier: had[tier].seconds / total_s if tier in had else 0.0 for tier in STEPS})
        for tier, time_of in had.items():
            findings.edges[tier] = max(findings.edges.get(tier, 0.0), time_of.each_s / total_s)


def _template(house: House) -> ImageRequest:
    """What the house's defaults make of a wish, for plain diffusers."""
    name = house.fleet.default_model()
    model = house.fleet.models[name]
    width_px, height_px = parse_size(model.sizes[0])
    return ImageRequest(
        id="plain",
        group="plain",
        checkpoint=name,
        prompt="",
        width_px=width_px,
        height_px=height_px,
        num_steps=1,
        guidance=model.default_guidance,
        sampler=model.default_sampler,
        seed=0,
    )


def _report(ours: Ours, findings: Findings, door: Mapping[str, Any], *, quick: bool) -> int:
    cells = findings.cells
    step_s = statistics.fmean(ours.step_s)
    allowed_s = SLOWDOWN * cells["ours", "idle"].percentile_s(0.99) + step_s
    jobs = sum(map(len, cells["ours", "idle"].latencies_s))
    latencies = Table(title=f"Fast jobs of {STEPS['fast']} steps: seconds from accepted to final, p50/p99 of {jobs} each")
    latencies.caption = f"ours may take {SLOWDOWN} x idle p99 + a step of {step_s * 1000:.0f} ms = {allowed_s:.3f} s"
    for column in ("", "idle", "loaded", "p99 loaded / idle"):
        latencies.add_column(column, justify="right" if column else "left")
    for name in ("ours", "celery"):
        both = (cells[name, kind] for kind in ("idle", "loaded"))
        texts = [f"{cell.percentile_s(0.5):.3f}/{cell.percentile_s(0.99):.3f}" for cell in both]
        latencies.add_row("Darkroom" if name == "ours" else "Celery, strict priority", *texts, f"{findings.ratio(name):.2f}")
    running = {tier: statistics.fmean(round[tier] for round in cells["ours", "loaded"].running) for tier in LOW_TIERS}
    least = {tier: min(window[tier] for window in findings.shares) for tier in STEPS}
    shares = Table(title="What the tiers had of the worker")
    shares.caption = f"{ours.house.pool.slots} slots, of which lower tiers may take {ours.slots_for_lower_tiers}"
    for column in ("tier", "ran while fast was timed", "ran while all were full", "least device share then", "promised"):
        shares.add_column(column, justify="left" if column == "tier" else "right")
    for tier in STEPS:
        ran = f"{running[tier]:.1f}" if tier in running else ""
        promised = f"{SHARES[tier]:.2f}" if tier in SHARES else ""
        shares.add_row(tier, ran, f"{findings.saturated[tier]:.1f}", f"{least[tier]:.3f}", promised)
    for table in (latencies, shares):
        Console().print(table)
    figures: dict[str, Any] = {
        "fast_p99_loaded_s": cells["ours", "loaded"].percentile_s(0.99),
        "fast_p99_idle_s": cells["ours", "idle"].percentile_s(0.99),
        "ratio": findings.ratio("ours"),
        "celery_ratio": findings.ratio("celery"),
        "loaded_step_s": step_s,
        "slots_busy": sum(running.values()) / ours.slots_for_lower_tiers,
        **{f"least_share_{tier}": share for tier, share in least.items()},
        "running_loaded": running,
        "running_saturated": dict(findings.saturated),
        "fast_p50_s": {f"{name}_{kind}": cell.percentile_s(0.5) for (name, kind), cell in cells.items()},
        "fast_p99_s": {f"{name}_{kind}": cell.percentile_s(0.99) for (name, kind), cell in cells.items()},
        "fast_p99_s_by_round": {
            f"{name}_{kind}": [percentile(some, 0.99) for some in cell.latencies_s] for (name, kind), cell in cells.items()
        },
        "shares_by_window": findings.shares,
        "fast_jobs_per_cell": jobs,
        "gap_s": list(findings.gap_s),
        "asked_late_s": findings.late_s,
        **door,
    }
    targets = [
        Target("fast_p99_loaded_s", "<=", allowed_s, f"{SLOWDOWN} x idle p99 + a step = {allowed_s:.3f}"),
        Target("slots_busy", ">=", SLOTS_BUSY),
    ]
    for tier, share in SHARES.items():
        edge = findings.edges.get(tier, 0.0)
        targets.append(Target(f"least_share_{tier}", ">=", share - edge, f"{share} less {edge:.4f}, one job at the edge of a window"))
    not_judged = {}
    if quick:
        not_judged["fast_p99_loaded_s"] = f"{jobs} jobs have no p99"
        not_judged |= dict.fromkeys((f"least_share_{tier}" for tier in SHARES), f"windows of {QUICK.window_s:.0f} s are mostly edges")
    return report("tiers", figures, targets, not_judged, {"device": "cpu", "torch_threads": 1, "quick": quick})


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
