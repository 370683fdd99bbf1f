"""What twenty light tenants notice of one that dumps 5,000 jobs into their tier, and whether the dump leaves anything of the worker idle.

    python -m benchmarks.tenants [--quick] [--rounds 2] [--tier quality|batch]

One CPU worker of a house of its own. First comes its capacity: a bulk tenant alone, with work always waiting. The light tenants ask at
seeded instants of a Poisson process, together for 35 % of that, each for as many jobs as the others; every job of the run has 20 steps.
Rounds go light alone, dump alone, light with the dump, with the same instants in both light stretches, on the same stack; a dump lands
before its stretches and what is left of it is canceled after them, so the next round begins with an idle worker again.

Tier        `quality` by default: its forwards have a pinned number of rows, so a light job's step takes as long in company as alone, and
            what it loses to the dump is its turn. In a best-effort tier forwards grow with the work there is, and a part of the difference
            is the batching that gives the throughput.
Latency     Accepted to final by the database's own timestamps; p99 over all light jobs of all rounds. What is not served two minutes after
            the last arrival counts with its age by then.
Throughput  Images that succeeded in the seconds between the first and the last light arrival, all tenants together, against the dump
            alone in the same round. busy: encode, denoise and decode seconds ÷ seconds that passed, from the worker's metrics; rows: of a
            forward, those that belonged to an image.
Dump        POSTs from eight threads. Refused with 429 or 503 they wait as Retry-After says and go on; the stretches begin when all is
            accepted or the first is refused. Jobs of the tier may wait a day in this benchmark's fleet.toml, for 5,000 outlast the usual
            deadline.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.cells import percentile
from benchmarks.sharing.arrivals import play, poisson, wishes
from benchmarks.sharing.door import THREADS, Door
from benchmarks.sharing.house import House, running_house
from benchmarks.sharing.verdict import Target, jain, report

BULK, STEPS = "bulk", 20
LOAD = 0.35  # of the light tenants together, in parts of what the worker can do
TARGETS = (
    Target("light_p99_ratio", "<=", 1.3),
    Target("images_per_s_to_dump_alone", ">=", 0.9),  # the same work on the same worker: the rest is drift and the stretch's two ends
    Target("busy_share_with_dump", ">=", 0.95),
    Target("rows_to_dump_alone", ">=", 0.95),
)
A_DAY_S = 86_400
LANDS_WITHIN_S = 900


@dataclass(frozen=True)
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


FULL, QUICK = Extent(2, 20, 8, 5000, 200, 5.0, 45.0, 120.0), Extent(1, 6, 1, 80, 30, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Watched:
    """What the worker did for some seconds."""

    images_per_s: float
    busy_share: float
    mean_rows: float


@dataclass(frozen=True)
class Stretch:
    """Light tenants for some time, with or without a dump."""

    latencies_s: Mapping[str, list[float]]  # by tenant
    unserved: int  # of the jobs: they count with their age when patience ended
    watched: Watched

    def percentile_s(self, share: float) -> float:
        """Over all light jobs."""
        return percentile([latency_s for some in self.latencies_s.values() for latency_s in some], share)


@dataclass
class Findings:
    """What the run gave; lists have a value a round."""

    capacity: float = 0.0  # images/s
    alone: list[Stretch] = field(default_factory=list)
    dumped: list[Stretch] = field(default_factory=list)
    dump_alone: list[Watched] = field(default_factory=list)
    accept_s: list[float] = field(default_factory=list)  # until the dump had landed
    accepted: list[int] = field(default_factory=list)  # of it, by then
    late_s: float = 0.0


class Dump:
    """One tenant's many jobs, submitted as fast as the door lets them in, on threads of its own."""

    def __init__(self, door: Door, wish: Callable[[], dict[str, Any]], count: int) -> None:
        self._door = door
        self._wishes = iter([wish() for _ in range(count)])
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit, name=f"dump-{number}") for number in range(THREADS)]
        self._problem: BaseException | None = None
        self.accepted = 0

    def __enter__(self) -> "Dump":
        self._door.was_refused.clear()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_landed(self) -> None:
        """Return when all is accepted, or when the door says for the first time that it is too much."""
        deadline = time.monotonic() + LANDS_WITHIN_S
        while any(thread.is_alive() for thread in self._threads) and not self._door.was_refused.is_set():
            if time.monotonic() > deadline:
                raise SystemExit(f"only {self.accepted} jobs of the dump are accepted after {LANDS_WITHIN_S} s")
            time.sleep(0.05)
        if self._problem is not None:
            raise self._problem

    def _submit(self) -> None:
        try:
            while not self._stop.is_set() and (wish := self._next()) is not None:
                if self._door.ask(wish, self._stop) is not None:
                    with self._lock:
                        self.accepted += 1
        except BaseException as problem:  # noqa: BLE001  told by `wait_landed`
            self._problem = problem

    def _next(self) -> dict[str, Any] | None:
        with self._lock:
            return next(self._wishes, None)


def main() -> int:
    """Measure, print tables and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ends within a minute; not_judged says what so little cannot show")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help="of a full run; each takes some ten minutes")
    parser.add_argument("--tier", choices=["quality", "batch"], default="quality")
    options = parser.parse_args()
    extent = QUICK if options.quick else replace(FULL, rounds=options.rounds)
    light = [f"light-{number:02}" for number in range(1, extent.light_tenants + 1)]
    with running_house([BULK, *light], {f"tiers.{options.tier}": {"start_within_s": A_DAY_S}}) as house:
        findings = _measure(house, light, options.tier, extent)
        light_accept_s = [seconds for name in light for seconds in house.doors[name].accept_s]
        door = {
            "dump_refusals": house.doors[BULK].refusals,
            "light_refusals": sum(house.doors[name].refusals for name in light),
            "light_accept_p99_s": percentile(light_accept_s, 0.99),
        }
    return _report(findings, extent, options.tier, door, quick=options.quick)


def _measure(house: House, light: list[str], tier: str, extent: Extent) -> Findings:
    findings = Findings()
    wish = wishes(tier, STEPS, seed=0)
    with _landed(house, wish, extent.capacity_jobs):
        findings.capacity = _watch(house, extent).images_per_s
    for number in range(extent.rounds):
        trace = poisson(light, extent.jobs_each, LOAD * findings.capacity, seed=number)
        findings.alone.append(_light(house, trace, wishes(tier, STEPS, seed=1000 + number), extent, findings))
        _say(f"round {number + 1} of {extent.rounds}, light alone: p99 {findings.alone[-1].percentile_s(0.99):.2f} s")
        started_at = time.monotonic()
        with _landed(house, wish, extent.dump) as dump:
            findings.accept_s.append(time.monotonic() - started_at)
            findings.accepted.append(dump.accepted)
            _say(f"{dump.accepted} jobs of the dump accepted in {findings.accept_s[-1]:.1f} s")
            findings.dump_alone.append(_watch(house, extent))
            findings.dumped.append(_light(house, trace, wishes(tier, STEPS, seed=1000 + number), extent, findings, dump_is_there=True))
        _say(f"round {number + 1} of {extent.rounds}, with the dump: p99 {findings.dumped[-1].percentile_s(0.99):.2f} s")
    return findings


@contextmanager
def _landed(house: House, wish: Callable[[], dict[str, Any]], count: int) -> Iterator[Dump]:
    """A dump that has been accepted and keeps the worker full; all gone afterwards."""
    with Dump(house.doors[BULK], wish, count) as dump:
        dump.wait_landed()
        yield dump
    house.clear(BULK)


def _watch(house: House, extent: Extent) -> Watched:
    """The worker with nothing but a dump."""
    time.sleep(extent.fill_s)
    return _watched(house, lambda: time.sleep(extent.alone_s))


def _light(
    house: House,
    trace: list[tuple[float, str]],
    wish: Callable[[], dict[str, Any]],
    extent: Extent,
    findings: Findings,
    *,
    dump_is_there: bool = False,
) -> Stretch:
    """Let the light tenants ask; wait until they are served, or until patience ends: then what they wait for is canceled."""
    asked = [(tenant, wish()) for _, tenant in trace]
    job_ids: list[str] = []

    def ask(number: int) -> None:
        tenant, its_wish = asked[number]
        if (job_id := house.doors[tenant].ask(its_wish)) is not None:
            job_ids.append(job_id)

    def arrive() -> None:
        findings.late_s = max(findings.late_s, play([at for at, _ in trace], ask))

    watched = _watched(house, arrive)
    if dump_is_there and len(house.ledger.unfinished_ids(BULK)) < house.pool.slots:
        raise SystemExit("the dump is used up while light tenants still come: it must be larger")
    unserved = house.ledger.wait_served(job_ids, extent.patience_s)
    stretch = Stretch(house.ledger.latencies_s(job_ids), unserved, watched)
    if unserved:
        for tenant in {tenant for _, tenant in trace}:
            house.doors[tenant].cancel(house.ledger.unfinished_ids(tenant))
    return stretch


def _watched(house: House, go_on: Callable[[], None]) -> Watched:
    """What the worker does while `go_on` runs."""
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(house.meter.read)  # both clocks at the same time
        begin, before = house.ledger.now(), reading.result()
        go_on()
        reading = threads.submit(house.meter.read)
        end, after = house.ledger.now(), reading.result()
    gained = after - before
    images = sum(house.ledger.images(begin, end).values())
    return Watched(images / (end - begin).total_seconds(), gained.busy_share, gained.mean_rows)


def _report(findings: Findings, extent: Extent, tier: str, door: Mapping[str, Any], *, quick: bool) -> int:
    alone, dumped = ([latency_s for stretch in some for latency_s in _all(stretch)] for some in (findings.alone, findings.dumped))
    table = Table(title=f"{extent.light_tenants} light tenants and a dump of {extent.dump} jobs in tier {tier}, one CPU worker")
    table.caption = f"capacity {findings.capacity:.2f} images/s; the light tenants ask for {LOAD:.0%} of it, {len(alone)} jobs in all"
    for column in ("round", "light p50/p99, s", "images/s", "busy", "rows"):
        table.add_column(column, justify="left" if column == "round" else "right")
    rounds = zip(findings.alone, findings.dump_alone, findings.dumped, strict=True)
    for number, (light, dump, both) in enumerate(rounds, start=1):
        for name, stretch, watched in (("light alone", light, light.watched), ("dump alone", None, dump), ("both", both, both.watched)):
            latency = f"{stretch.percentile_s(0.5):.2f}/{stretch.percentile_s(0.99):.2f}" if stretch else ""
            speed = (f"{watched.images_per_s:.2f}", f"{watched.busy_share:.2f}", f"{watched.mean_rows:.1f}")
            table.add_row(f"{number} {name}", latency, *speed)
    Console().print(table)
    per_s = [both.watched.images_per_s / dump.images_per_s for both, dump in zip(findings.dumped, findings.dump_alone, strict=True)]
    mean_rows = {
        "light_alone": statistics.fmean(light.watched.mean_rows for light in findings.alone),
        "dump_alone": statistics.fmean(dump.mean_rows for dump in findings.dump_alone),
        "both": statistics.fmean(both.watched.mean_rows for both in findings.dumped),
    }
    accept = statistics.fmean(count / seconds for count, seconds in zip(findings.accepted, findings.accept_s, strict=True))
    figures: dict[str, Any] = {
        "light_p99_ratio": percentile(dumped, 0.99) / percentile(alone, 0.99),
        "light_p50_ratio": percentile(dumped, 0.5) / percentile(alone, 0.5),
        "images_per_s_to_dump_alone": statistics.fmean(per_s),
        "busy_share_with_dump": statistics.fmean(both.watched.busy_share for both in findings.dumped),
        "busy_share_light_alone": statistics.fmean(light.watched.busy_share for light in findings.alone),
        "busy_share_dump_alone": statistics.fmean(dump.busy_share for dump in findings.dump_alone),
        "rows_to_dump_alone": mean_rows["both"] / mean_rows["dump_alone"],
        "mean_rows": mean_rows,
        "images_per_s": {
            "capacity": findings.capacity,
            "light_alone": [light.watched.images_per_s for light in findings.alone],
            "dump_alone": [dump.images_per_s for dump in findings.dump_alone],
            "both": [both.watched.images_per_s for both in findings.dumped],
        },
        "light_s": {
            "alone_p50": percentile(alone, 0.5),
            "alone_p99": percentile(alone, 0.99),
            "dumped_p50": percentile(dumped, 0.5),
            "dumped_p99": percentile(dumped, 0.99),
            "alone_p99_by_round": [light.percentile_s(0.99) for light in findings.alone],
            "dumped_p99_by_round": [both.percentile_s(0.99) for both in findings.dumped],
        },
        "jain_of_light_mean_latencies": {"alone": _jain(findings.alone), "dumped": _jain(findings.dumped)},
        "light_jobs_per_condition": len(alone),
        "light_jobs_unserved": sum(stretch.unserved for stretch in (*findings.alone, *findings.dumped)),
        "dump_accepted": findings.accepted,
        "dump_accept_s": findings.accept_s,
        "dump_accepted_per_s": accept,
        "asked_late_s": findings.late_s,
        **door,
    }
    not_judged: dict[str, str] = {}
    if quick:
        not_judged["light_p99_ratio"] = f"{len(alone)} jobs have no p99"
        not_judged |= dict.fromkeys(("images_per_s_to_dump_alone", "rows_to_dump_alone"), f"{extent.alone_s:.0f} s see too few images")
    if tier != "quality":
        not_judged["rows_to_dump_alone"] = "forwards of a best-effort tier have as many rows as are worth their while"
    return report("tenants", figures, TARGETS, not_judged, {"device": "cpu", "torch_threads": 1, "tier": tier, "quick": quick})


def _all(stretch: Stretch) -> list[float]:
    return [latency_s for some in stretch.latencies_s.values() for latency_s in some]


def _jain(stretches: list[Stretch]) -> float:
    """Of the light tenants' mean latencies over all rounds: 1 when all of them waited alike."""
    by_tenant: dict[str, list[float]] = {}
    for stretch in stretches:
        for tenant, latencies_s in stretch.latencies_s.items():
            by_tenant.setdefault(tenant, []).extend(latencies_s)
    return jain([statistics.fmean(latencies_s) for latencies_s in by_tenant.values()])


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
