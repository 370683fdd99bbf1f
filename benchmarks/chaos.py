"""Nothing that was accepted is lost, nothing is done twice, every image is the same: a real stack under load while all of it breaks.

    python -m benchmarks.chaos [--quick] [--seeds 1,2,3] [--jobs 500] [--default-classes] [--keep]

The same jobs run first without a fault, then once a seed while processes are killed, frozen and restarted, connections cut and
Redis flushed (benchmarks/survival/faults.py says how). Every tier is reproducible then, so pixels must equal those of the
fault-free run to the bit; with --default-classes fleet.toml's own classes hold, and the largest difference of best-effort
images is told instead. Same seed, same faults at the same instants. Recovery is timed apart, on a stack that is otherwise whole.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.survival import fleetfile, rig
from benchmarks.survival.checks import Check, full_load, hand_off_keys, house_checks, jobs_checks, load_checks, orphans, same_pixels
from benchmarks.survival.customers import Customers
from benchmarks.survival.faults import Director, Fault, plan
from benchmarks.survival.figures import added_latency_s, recoveries, work
from benchmarks.survival.ledger import Ledger, count_active, read
from benchmarks.survival.report import show_checks, show_figures, spread
from benchmarks.survival.rig import Rig, say, wait_until
from benchmarks.survival.workload import TIERS, Shape, Wish, workload

WORKERS, QUICK_WORKERS = 3, 2
EVERY_S, QUICK_EVERY_S = 0.5, 0.15  # between two jobs: about two thirds of what two cores can do; as much as they can
FAULT_EVERY_S = 8.0
LEASE_S, QUICK_LEASE_S = 15.0, 4.5
PATIENCE_S = 300
UNDER_WAY_S = 3.0  # jobs of a drill run so long before the fault
NOTICE_S = 2.0  # too short for a job of the drill to end
AFTER_KILL_S, AFTER_NOTICE_S = 3.0, 1.0  # beyond the lease; with a slot free
QUICK = tuple(Shape(tier=shape.tier, share=shape.share, steps=(2, 8)) for shape in TIERS)
LOAD = tuple(Shape(tier=shape.tier, share=1, steps=(2, 4)) for shape in TIERS)
DRILL = (Shape(tier="quality", share=1, steps=(60, 60)),)


class Trial:
    """A stack, its fault-free run, and all that was found wrong so far."""

    def __init__(self, stack: Rig, *, lease_s: float, quick: bool) -> None:
        self.rig, self.lease_s, self.quick = stack, lease_s, quick
        self.wrong: dict[str, int] = {}
        self.figures: dict[str, Any] = {}

    def fault_free(self, wishes: Sequence[Wish]) -> Ledger:
        """What the others are held against."""
        reference = self.run("fault-free", wishes)
        self._judge(reference.label, jobs_checks(self.rig, reference))
        self.figures[reference.label] = work(reference)
        return reference

    def chaos(self, seed: int, wishes: Sequence[Wish], reference: Ledger) -> None:
        """The same jobs under the faults of a seed; then the house must be whole and idle, and take a fresh full load."""
        window_s = wishes[-1].at_s
        faults = plan(
            seed,
            window_s=window_s,
            every_s=FAULT_EVERY_S,
            workers=self.rig.workers,
            lease_s=self.lease_s,
            notices=rig.hears_notices(),
            few=self.quick,
        )
        label = f"chaos {seed}"
        Console().print(f"{label}: faults", *(f"{fault.at_s:6.1f} s  {fault}" for fault in faults), sep="\n", highlight=False)
        run = self.run(label, wishes, faults)
        checks = jobs_checks(self.rig, run)
        pixels, apart = same_pixels(self.rig, run, reference)
        whole = self._whole_again()
        count = full_load(self.rig)
        load = self.run(f"load after {label}", workload(count, every_s=0.01, seed=seed, shapes=LOAD, cancel_share=0))
        self._judge(label, [*checks, pixels, whole, *load_checks(self.rig, load), *house_checks(self.rig)])
        self._tell(run, reference, apart)

    def recovery(self, kind: str) -> list[float]:
        """Seconds until the jobs of one worker run again, with nothing else amiss and slots free elsewhere."""
        wishes = [
            Wish(**vars(wish) | {"parameters": wish.parameters | {"n": 3, "guidance": 1.5}})
            for wish in workload(2 * len(self.rig.workers), every_s=0.01, seed=0, shapes=DRILL, cancel_share=0)
        ]
        customers = Customers(self.rig, f"{kind} drill")
        customers.ask_in_time(wishes)
        running = "SELECT worker, count(*) AS n FROM jobs WHERE state = 'running' GROUP BY worker ORDER BY n DESC"
        wait_until(lambda: sum(row["n"] for row in self.rig.sql(running)) == len(wishes), 5, every_s=0.1)
        time.sleep(UNDER_WAY_S)
        faults = [
            Fault(at_s=0, kind=kind, target=row["worker"].partition("@")[0], for_s=NOTICE_S if kind == "notice" else 0)
            for row in self.rig.sql(running)[:1]  # who has most to lose
        ]
        done = Director(self.rig, faults).finish()
        self._wait(customers)
        run = read(self.rig, customers, done)
        self._judge(customers.label, jobs_checks(self.rig, run))
        self._whole_again()
        found = recoveries(run)
        self.figures[run.label] = figures = {"jobs_accepted": len(run.jobs), **work(run)}
        show_figures(run.label, figures)
        return list(found.after_kill_s if kind == "kill" else found.after_notice_s)

    def run(self, label: str, wishes: Sequence[Wish], faults: Sequence[Fault] = ()) -> Ledger:
        """Ask for all of it, do what is planned meanwhile, wait until every job has ended; the rows."""
        say(f"{label}: {len(wishes)} jobs, {len(faults)} faults")
        customers = Customers(self.rig, label)
        director = Director(self.rig, faults)
        try:
            customers.ask_in_time(wishes)
            done = director.finish()
        except BaseException:
            director.give_up()
            customers.give_up()
            raise
        self._wait(customers)
        return read(self.rig, customers, done)

    def _wait(self, customers: Customers) -> None:
        if not wait_until(lambda: count_active(self.rig, customers) == 0, PATIENCE_S):
            say(f"{customers.label}: not all jobs ended within {PATIENCE_S} s")

    def _whole_again(self) -> Check:
        """Every worker is back: what was killed last takes its time to load the model."""
        count, since = len(self.rig.workers), self.rig.sql("SELECT clock_timestamp() AS now")[0]["now"]
        is_whole = wait_until(lambda: self.rig.live_workers() == self.rig.workers_heard_since(since) == count, PATIENCE_S)
        return Check.of("every part is ready again", f"{len(self.rig.workers)} workers", [] if is_whole else ["/readyz says no"])

    def _judge(self, label: str, checks: Sequence[Check]) -> None:
        show_checks(self.rig, label, checks)
        for check in checks:
            self.wrong[check.name] = self.wrong.get(check.name, 0) + len(check.wrong)

    def _tell(self, run: Ledger, reference: Ledger, apart: int | None) -> None:
        found = recoveries(run)
        asked = list(run.asked.values())
        figures: dict[str, Any] = {
            "jobs_accepted": len(run.jobs),
            "faults_done": sum(not done.trouble for done in run.faults),
            "faults_without_effect": [f"{done.fault}: {done.trouble}" for done in run.faults if done.trouble],
            "answers_unknown": sum(one.unknown for one in asked),
            "unknown_but_accepted": sum(one.heard == "found" for one in asked),
            "accepted_twice": sum(len(jobs) - 1 for jobs in run.by_marker.values()),
            "asked_again": sum(one.retries for one in asked),
            "added_latency_s": spread(added_latency_s(run, reference)),
            "restarted_after_kill_s": spread(found.after_kill_s),
            "restarted_after_notice_s": spread(found.after_notice_s),
            "restarted_after_lease_loss_s": spread(found.after_loss_s),
            "restarted_after_return_s": spread(found.after_return_s),
            **work(run),
            "hand_off_keys_left": hand_off_keys(self.rig),
            "objects_without_artifact": orphans(self.rig, run),
        }
        if apart is not None:
            figures["best_effort_pixels_apart"] = apart
        caption = "from rows; messages that found nothing to do leave none; restarts amid other faults, so without a bound"
        show_figures(run.label, figures, caption)
        self.figures[run.label] = figures


def main() -> int:
    """Run, tell, judge; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 60 jobs, 2 workers, few faults, short leases; ends within a minute")
    parser.add_argument("--seeds", default="1,2,3", help="of the faults, one run each; the jobs are the same in all of them")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--default-classes", action="store_true", help="fleet.toml's own determinism classes")
    parser.add_argument("--keep", action="store_true", help="leave the data where they are when something was wrong")
    options = parser.parse_args()
    seeds = list(dict.fromkeys(map(int, options.seeds.split(","))))
    jobs, every_s, lease_s, workers = options.jobs, EVERY_S, LEASE_S, WORKERS
    if options.quick:
        seeds, jobs, every_s, lease_s, workers = seeds[:1], min(jobs, 60), QUICK_EVERY_S, QUICK_LEASE_S, QUICK_WORKERS
    wishes = workload(jobs, every_s=every_s, seed=0, shapes=QUICK if options.quick else TIERS)
    leases = {"LEASE_TTL_S": str(lease_s), "LEASE_RENEW_S": str(lease_s / 3), "LEASE_STOP_S": str(lease_s * 0.8)}
    started_at, is_good = datetime.now(UTC), False

    def fleet_file(folder: Path) -> Path:
        tables = fleetfile.shipped() if options.default_classes else fleetfile.reproducible(fleetfile.shipped())
        return fleetfile.write(tables, folder / "fleet.toml")

    with rig.running(fleet_file, workers=workers, variables=leases, wait_s=300, keep=lambda: options.keep and not is_good) as stack:
        trial = Trial(stack, lease_s=lease_s, quick=options.quick)
        reference = trial.fault_free(wishes)
        for seed in seeds:
            trial.chaos(seed, wishes, reference)
        after_kill = [] if options.quick else trial.recovery("kill")
        after_notice = [] if options.quick or not rig.hears_notices() else trial.recovery("notice")
        figures: dict[str, Any] = {"wrong": sum(trial.wrong.values())}
        unjudged = {}
        for name, values in {"recovery_after_kill_s": after_kill, "recovery_after_notice_s": after_notice}.items():
            if values:
                figures[name] = round(max(values), 3)
            else:
                unjudged[name] = "a quick run leaves it out" if options.quick else "no job was interrupted so"
        bounds = {"wrong": 0, "recovery_after_kill_s": lease_s + AFTER_KILL_S, "recovery_after_notice_s": AFTER_NOTICE_S}
        met = {name: figures[name] <= bounds[name] for name in bounds if name in figures}
        is_good = all(met.values())
    facts = {
        "wrong_by_check": trial.wrong,
        "runs": trial.figures,
        "seeds": seeds,
        "jobs": jobs,
        "workers": workers,
        "lease_s": lease_s,
        "classes": "default" if options.default_classes else "reproducible",
        "cores": os.cpu_count(),
        "took_s": round((datetime.now(UTC) - started_at).total_seconds(), 1),
        "quick": options.quick,
    }
    targets = {name: f"<= {bound:g}" for name, bound in bounds.items()}
    show_figures("chaos", figures | {f"{name} (not judged)": why for name, why in unjudged.items()})
    print(json.dumps({"benchmark": "chaos", "figures": figures, "targets": targets, "met": met, "not_judged": unjudged} | facts))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
