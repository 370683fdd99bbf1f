"""A rolling restart of a whole fleet under load loses nothing and does nothing twice.

    python -m benchmarks.rolling [--quick] [--workers 24] [--gap-s 2] [--keep]

So many CPU workers with a tiny model on one broker; each gets SIGTERM, one after the other, while jobs keep coming. At most a
quarter of them (half, when there are few) is away at any time. Every worker is a process that loads torch: on two cores, two
dozen take minutes to start.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.survival import fleetfile, rig, tinycheckpoint
from benchmarks.survival.checks import hand_off_keys, house_checks, jobs_checks
from benchmarks.survival.customers import Customers
from benchmarks.survival.figures import RETURNED, work
from benchmarks.survival.ledger import Ledger, count_active, read
from benchmarks.survival.report import show_checks, show_figures
from benchmarks.survival.rig import Rig, say, wait_until
from benchmarks.survival.workload import TIERS, Shape, Wish, workload
from fleet.stack import ProcessStatus

WORKERS, QUICK_WORKERS = 24, 4
SLOTS = 2  # a worker's; two dozen of them fill what Postgres has of connections
AWAY_SHARE, QUICK_AWAY_SHARE = 0.25, 0.5
BUSY, QUICK_BUSY = 0.75, 0.4  # jobs in hand for each slot; on two cores, those that load torch want their part too
LOADED_AFTER = 12  # times that jobs are asked for before the first signal
STEPS, QUICK_STEPS = (100, 300), (50, 100)  # jobs that are half done when the signal comes
UP_WITHIN_S, BACK_WITHIN_S, END_WITHIN_S = 1200, 900, 600


class Rollout(threading.Thread):
    """Restarts every worker once, in order. `restarted`: how many, when all are back. `error`: what ended it early."""

    def __init__(self, stack: Rig, *, gap_s: float, away_share: float) -> None:
        super().__init__(name="rollout", daemon=True)
        self.restarted = 0
        self.error: BaseException | None = None
        self._rig, self._gap_s = stack, gap_s
        self._most_away = max(1, int(away_share * len(stack.workers)))
        self._old_pids: dict[str, int | None] = {}

    def run(self) -> None:
        try:
            for name in self._rig.workers:
                self._wait_for(self._most_away - 1)
                say(f"SIGTERM {name}")
                self._old_pids[name] = self._rig.stack.pid(name)
                self._rig.stack.kill(name, signal.SIGTERM)
                time.sleep(self._gap_s)
            self._wait_for(0)
            self.restarted = len(self._old_pids)
        except BaseException as error:  # noqa: BLE001  told by the main thread
            self.error = error

    def _wait_for(self, most: int) -> None:
        """Return when at most so many are away."""
        if not wait_until(lambda: len(self._away()) <= most, BACK_WITHIN_S, every_s=1):
            raise TimeoutError(f"{', '.join(self._away())} did not come back")

    def _away(self) -> list[str]:
        """The workers that were told to go and whose successors have not yet said that they are alive."""
        seen_at = {row["name"]: row["seen_at"] for row in self._rig.sql("SELECT name, seen_at FROM workers")}
        now = {status.name: status for status in self._rig.stack.status()}
        return [name for name, pid in self._old_pids.items() if not _is_back(now[name], pid, seen_at.get(self._rig.worker_name(name)))]


def _is_back(status: ProcessStatus, old_pid: int | None, seen_at: datetime | None) -> bool:
    """Whether a new process runs and has signed on. supervisord tells its start in whole seconds, rounded down."""
    if status.pid in (None, old_pid) or status.started_at is None or seen_at is None:
        return False
    return seen_at > status.started_at + timedelta(seconds=1)


def keep_busy(stack: Rig, customers: Customers, wishes: Iterator[Wish], rollout: Rollout, *, busy: float) -> None:
    """Ask for so many jobs a slot, and for another whenever one has ended, until the rollout is over."""
    enough = int(busy * SLOTS * len(stack.workers))

    def top_up() -> None:
        on_their_way = sum(asked.heard == "nothing" for asked in list(customers.asked.values()))
        for wish in itertools.islice(wishes, max(0, enough - on_their_way - count_active(stack, customers))):
            customers.ask(wish)
        time.sleep(0.25)

    for _ in range(LOADED_AFTER):
        top_up()
    rollout.start()
    while rollout.is_alive():
        top_up()


def summary(run: Ledger, restarts: int, wrong: int) -> dict[str, Any]:
    """The figures that are judged, and those beside them."""
    figures = work(run)
    known = {str(job_id) for job_id in run.ids}
    return {
        "jobs": len(run.jobs),
        "restarts": restarts,
        "lost": len(run.jobs) - len(run.succeeded()) + sum(asked.job_id not in known for asked in run.asked.values() if asked.job_id),
        "doubled": sum(len(events) > 1 for events in run.final_events.values())
        + sum(len(run.artifacts[job["id"]]) > job["num_images"] for job in run.jobs if job["id"] in run.artifacts),
        "wrong": wrong,
        "duplicates": figures["images_rendered_twice"],
        "attempts_preempted": sum(figures["attempts"].get(outcome, 0) for outcome in RETURNED),
        **figures,
    }


def main() -> int:
    """Run, tell, judge; 1 if anything was lost, doubled or otherwise wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_WORKERS} workers, short jobs; ends within a minute")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--gap-s", type=float, default=2.0, help="between two signals")
    parser.add_argument("--keep", action="store_true", help="leave the data where they are when something was wrong")
    options = parser.parse_args()
    workers = QUICK_WORKERS if options.quick else options.workers
    started_at, is_good = time.monotonic(), False
    shapes = [Shape(tier=shape.tier, share=shape.share, steps=QUICK_STEPS if options.quick else STEPS) for shape in TIERS]
    wishes = iter(workload(100_000, every_s=0, seed=0, shapes=shapes, cancel_share=0, most_images=SLOTS))

    def fleet_file(folder: Path) -> Path:
        checkpoint = tinycheckpoint.save(folder / "checkpoint")
        return fleetfile.write(fleetfile.many_small(checkpoint, slots=SLOTS), folder / "fleet.toml")

    with rig.running(fleet_file, workers=workers, variables={}, wait_s=UP_WITHIN_S, keep=lambda: options.keep and not is_good) as stack:
        customers = Customers(stack, "rolling")
        rollout = Rollout(stack, gap_s=options.gap_s, away_share=QUICK_AWAY_SHARE if options.quick else AWAY_SHARE)
        say(f"{workers} workers are up")
        try:
            keep_busy(stack, customers, wishes, rollout, busy=QUICK_BUSY if options.quick else BUSY)
            customers.settle()
        except BaseException:
            customers.give_up()
            raise
        if not wait_until(lambda: count_active(stack, customers) == 0, END_WITHIN_S):
            say(f"not all jobs ended within {END_WITHIN_S} s")
        run = read(stack, customers, [])
        checks = [*jobs_checks(stack, run), *house_checks(stack)]
        show_checks(stack, f"rolling restart of {workers} workers", checks)
        figures = summary(run, rollout.restarted, sum(len(check.wrong) for check in checks)) | {"hand_off_keys_left": hand_off_keys(stack)}
        targets = {"lost": 0, "doubled": 0, "wrong": 0, "restarts": workers}
        met = {name: figures[name] == value for name, value in targets.items()} | {"jobs": figures["jobs"] > workers}
        is_good = all(met.values())
    if rollout.error is not None:
        say(f"the rollout ended early: {rollout.error!r}")
    show_figures(f"rolling restart of {workers} workers", figures, "from rows; messages that found nothing to do leave none")
    facts = {"workers": workers, "slots": SLOTS, "cores": os.cpu_count(), "took_s": round(time.monotonic() - started_at, 1)}
    said = {name: f"== {value}" for name, value in targets.items()} | {"jobs": f"> {workers}"}
    print(json.dumps({"benchmark": "rolling", "figures": figures, "targets": said, "met": met} | facts | {"quick": options.quick}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
