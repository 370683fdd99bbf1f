"""The failover drill: broker, hand-off and Postgres answer with errors for some seconds under load, by each that they document.

    python -m benchmarks.drill [--quick] [--for-s 10] [--only WORD ...] [--keep]

fleet.toml's own deadlines hold: a fast job that nothing starts within 30 s expires. While a part answers with errors, and after,
no process may end, no job be lost, doubled or expired. `back_s`: from the end of the outage to the first image stored after it.
"""

import argparse
import json
import os
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.survival import fleetfile, rig, tinycheckpoint
from benchmarks.survival.checks import Check, Wrong, house_checks, jobs_checks
from benchmarks.survival.customers import Customers
from benchmarks.survival.figures import work
from benchmarks.survival.ledger import Ledger, count_active, read
from benchmarks.survival.outages import Outage, ProxiedStack, outages
from benchmarks.survival.report import show_checks, show_figures
from benchmarks.survival.rig import Rig, say, wait_until
from benchmarks.survival.workload import Shape, workload
from settings import REPO

WORKERS, SLOTS = 1, 8
LEAD_S, TAIL_S = 2.0, 3.0  # of load before and after
EVERY_S = 0.3  # between two jobs
FOR_S, QUICK_FOR_S = 10.0, 3.0
QUICK = ("broker: READONLY", "handoff: READONLY", "postgres: read-only")
PATIENCE_S = 120
SHAPES = (
    Shape(tier="fast", share=0.7, steps=(2, 8)),
    Shape(tier="quality", share=0.2, steps=(6, 20)),
    Shape(tier="batch", share=0.1, steps=(6, 20)),
)


@dataclass(frozen=True)
class Drilled:
    """What came of one outage."""

    outage: Outage
    run: Ledger
    ended: tuple[str, ...]  # processes
    back_s: float | None
    most_stored: int  # messages for storing at any moment, less jobs that were storing then

    def figures(self) -> dict[str, Any]:
        doubled = sum(len(events) > 1 for events in self.run.final_events.values())
        doubled += sum(len(self.run.artifacts.get(job["id"], ())) > job["num_images"] for job in self.run.jobs)
        fast = [job for job in self.run.jobs if job["tier"] == "fast" and job["started_at"]]
        known = {str(job_id) for job_id in self.run.ids}
        return {
            "jobs": len(self.run.jobs),
            "processes_ended": len(self.ended),
            "lost": sum(asked.job_id not in known for asked in self.run.asked.values()),
            "doubled": doubled,
            "expired": sum(job["state"] == "expired" for job in self.run.jobs),
            "failed": sum(job["state"] == "failed" for job in self.run.jobs),
            "rendered_twice": work(self.run)["images_rendered_twice"],
            "extra_messages": self.most_stored,
            "fast_wait_max_s": round(max(((job["started_at"] - job["accepted_at"]).total_seconds() for job in fast), default=0.0), 1),
            "back_s": self.back_s,
        }


def drill(stack: Rig, outage: Outage, for_s: float) -> Drilled:
    """Load, the outage in the midst of it, and what became of every job."""
    say(str(outage))
    count = int((LEAD_S + for_s + TAIL_S) / EVERY_S)
    wishes = workload(count, every_s=EVERY_S, seed=0, shapes=SHAPES, cancel_share=0)
    customers, before = Customers(stack, str(outage)), _pids(stack)
    asking = threading.Thread(target=customers.ask_in_time, args=(wishes,), daemon=True)
    watch = MessageWatch(stack)
    asking.start()
    time.sleep(LEAD_S)
    with outage.lasting():
        time.sleep(for_s)
    over_at = datetime.now(UTC)
    asking.join()
    if not wait_until(lambda: count_active(stack, customers) == 0, PATIENCE_S):
        say(f"not all jobs ended within {PATIENCE_S} s")
    run, after = read(stack, customers, []), _pids(stack)
    stored = [row["created_at"] for rows in run.artifacts.values() for row in rows if row["created_at"] > over_at]
    back_s = round((min(stored) - over_at).total_seconds(), 2) if stored else None
    ended = tuple(name for name, pid in before.items() if after.get(name) != pid and not _is_the_part(name, outage))
    return Drilled(outage, run, ended, back_s, watch.stop())


class MessageWatch:
    """Looks, a few times a second, by how many the messages for storing exceed the images that are to be stored."""

    def __init__(self, stack: Rig) -> None:
        self._rig, self._most = stack, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._most

    def _run(self) -> None:
        names = [name for name in self._rig.queues if name.startswith("results.")]
        query = "SELECT count(*) AS n FROM images WHERE state = 'handed_off'"
        while not self._stop.wait(0.3):
            try:
                messages = sum(self._rig.broker.llen(name) for name in names)
                self._most = max(self._most, messages - int(self._rig.sql(query)[0]["n"]))
            except Exception:  # noqa: BLE001 - the parts are away, which is what this is about
                continue


def _pids(stack: Rig) -> dict[str, int | None]:
    return {status.name: status.pid for status in stack.stack.status()}


def _is_the_part(name: str, outage: Outage) -> bool:
    return name == outage.part


def chosen(all_of_them: Sequence[Outage], options: argparse.Namespace) -> list[Outage]:
    """Those that were asked for."""
    words = options.only or (QUICK if options.quick else ("",))
    named = [one for one in all_of_them if any(word.lower() in str(one).lower() for word in words)]
    return [one for one in named if one.how == "real"] if options.quick else named


def show(drilled: Sequence[Drilled]) -> None:
    table = Table(title="failover drill")
    rows = [(str(one.outage), one.figures()) for one in drilled]
    for column in ("outage", *(name.replace("_", " ") for name in rows[0][1])):
        table.add_column(column)
    for name, figures in rows:
        table.add_row(name, *("-" if value is None else str(value) for value in figures.values()))
    Console(width=200).print(table)


def main() -> int:
    """Run, tell, judge; 1 if any process ended or any job came to harm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"each part read-only for {QUICK_FOR_S:g} s; ends within a minute")
    parser.add_argument("--for-s", type=float, help=f"how long each outage lasts; {FOR_S:g}")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="outages with this in their name: broker, READONLY, proxied ...")
    parser.add_argument("--keep", action="store_true", help="leave the data where they are when something was wrong")
    options = parser.parse_args()
    for_s = options.for_s or (QUICK_FOR_S if options.quick else FOR_S)
    started_at, is_good = time.monotonic(), False

    def fleet_file(folder: Path) -> Path:
        tables = fleetfile.many_small(tinycheckpoint.save(folder / "checkpoint"), slots=SLOTS)
        for name, tier in tomllib.loads((REPO / "fleet.toml").read_text())["tiers"].items():  # deadlines that can be missed
            tables["tiers"][name]["start_within_s"] = tier["start_within_s"]
        return fleetfile.write(tables, folder / "fleet.toml")

    with rig.running(
        fleet_file, workers=WORKERS, variables={}, wait_s=300, keep=lambda: options.keep and not is_good, kind=ProxiedStack
    ) as stack:
        drilled = []
        wrong = 0
        for outage in chosen(outages(stack), options):
            one = drill(stack, outage, for_s)
            drilled.append(one)
            say(f"{outage}: {one.figures()}")
            checks = jobs_checks(stack, one.run)
            checks.append(Check("no process ended", "every process", tuple(Wrong(f"{name} ended") for name in one.ended)))
            wrong += sum(len(check.wrong) for check in checks)
            if any(check.wrong for check in checks):
                show_checks(stack, str(outage), checks)
        at_last = house_checks(stack)
        show_checks(stack, "when all is over", at_last)
        wrong += sum(len(check.wrong) for check in at_last)
        show(drilled)
        all_figures = [one.figures() for one in drilled]
        figures: dict[str, Any] = {
            name: sum(one[name] for one in all_figures) for name in ("jobs", "processes_ended", "lost", "doubled", "expired", "failed")
        }
        figures |= {"outages": len(drilled), "wrong": wrong}
        figures["back_max_s"] = max((one["back_s"] for one in all_figures if one["back_s"] is not None), default=None)
        figures["extra_messages_max"] = max((one["extra_messages"] for one in all_figures), default=0)
        targets = dict.fromkeys(("processes_ended", "lost", "doubled", "expired", "failed", "wrong"), 0)
        met = {name: figures[name] == value for name, value in targets.items()} | {"outages": bool(drilled)}
        is_good = all(met.values())
    show_figures("drill", figures)
    facts = {
        "by_outage": {str(one.outage): one.figures() for one in drilled},
        "for_s": for_s,
        "workers": WORKERS,
        "cores": os.cpu_count(),
        "took_s": round(time.monotonic() - started_at, 1),
        "quick": options.quick,
    }
    said = {name: f"== {value}" for name, value in targets.items()} | {"outages": "> 0"}
    print(json.dumps({"benchmark": "drill", "figures": figures, "targets": said, "met": met} | facts))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
