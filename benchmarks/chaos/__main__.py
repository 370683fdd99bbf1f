"""Nothing that was accepted is lost or done twice, and every image is the same, while all breaks.

    python -m benchmarks.chaos [--quick] [--seeds 1,2,3] [--jobs 500] [--default-classes] [--keep]

A real stack under load. The same jobs run first without a fault, then once a seed while processes
are killed, frozen and restarted, connections cut and Redis flushed (faults.py says how). Every tier
is reproducible then, so pixels must equal those of the fault-free run to the bit; with
--default-classes fleet.toml's own classes hold, and the largest difference of best-effort images is
told instead. Same seed, same faults at the same instants. Recovery is timed apart, on a stack that
is otherwise whole.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.trial import Trial
from benchmarks.lib import fleet_file
from benchmarks.lib.integrity.command import Findings, make_parser, run_and_judge
from benchmarks.lib.integrity.probe import StackProbe, hears_notices
from benchmarks.lib.integrity.workload import TIERS, tiers_with, workload
from benchmarks.lib.verdict import Target

QUICK_TIERS = tiers_with((2, 8))
# Beyond the lease; with a slot free.
AFTER_KILL_S = 3.0
AFTER_NOTICE_S = 1.0
# Of the time that workers were busy, and of all that was paid: what no account tells.
MOST_UNEXPLAINED = 0.01


@dataclass(frozen=True)
class Extent:
    """How much is measured. every_s: between two jobs."""

    seeds: list[int]
    jobs: int
    every_s: float
    lease_s: float
    workers: int


def extent_of(options: argparse.Namespace) -> Extent:
    """Return how much is asked for."""
    seeds = list(dict.fromkeys(map(int, options.seeds.split(","))))
    if options.quick:  # as many jobs as two cores can do
        return Extent(seeds[:1], min(options.jobs, 60), every_s=0.15, lease_s=4.5, workers=2)
    return Extent(seeds, options.jobs, every_s=0.5, lease_s=15.0, workers=3)  # two thirds of it


def main() -> int:
    """Run, report, judge; 1 if anything was wrong."""
    options = _options()
    extent = extent_of(options)
    return run_and_judge(
        "chaos",
        partial(_run, extent=extent, options=options),
        _targets(extent.lease_s),
        options,
        write_fleet_file=partial(_write_fleet_file, default_classes=options.default_classes),
        workers=extent.workers,
        variables=_lease_settings(extent.lease_s),
    )


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__, quick="one seed, 60 jobs, 2 workers, few faults, short leases")
    add = parser.add_argument
    add(
        "--seeds",
        default="1,2,3",
        help="of the faults, one run each; the jobs are the same in all of them",
    )
    add("--jobs", type=int, default=500)
    add("--default-classes", action="store_true", help="fleet.toml's own determinism classes")
    return parser.parse_args()


def _write_fleet_file(folder: Path, *, default_classes: bool) -> Path:
    tables = fleet_file.without_deadlines(fleet_file.shipped())
    if not default_classes:
        tables = fleet_file.reproducible(tables)
    return fleet_file.write(tables, folder / "fleet.toml")


def _lease_settings(lease_s: float) -> dict[str, str]:
    return {
        "LEASE_TTL_S": str(lease_s),
        "LEASE_RENEW_S": str(lease_s / 3),
        "LEASE_STOP_S": str(lease_s * 0.8),
    }


def _targets(lease_s: float) -> list[Target]:
    bounds = {
        "wrong": 0,
        "unexplained_of_busy": MOST_UNEXPLAINED,
        "unexplained_of_billed": MOST_UNEXPLAINED,
        "recovery_after_kill_s": lease_s + AFTER_KILL_S,
        "recovery_after_notice_s": AFTER_NOTICE_S,
    }
    return [Target(name, "<=", bound, f"{bound:g}") for name, bound in bounds.items()]


def _run(probe: StackProbe, extent: Extent, options: argparse.Namespace) -> Findings:
    """Run all; return the figures that are judged, and why others are not."""
    quick = options.quick
    jobs = workload(
        extent.jobs,
        every_s=extent.every_s,
        seed=0,
        tiers=QUICK_TIERS if quick else TIERS,
    )
    trial = Trial(probe, lease_s=extent.lease_s, quick=quick)
    reference = trial.fault_free(jobs)
    for seed in extent.seeds:
        trial.chaos(seed, jobs, reference)
    recovery_s = {
        "recovery_after_kill_s": [] if quick else trial.recovery("kill"),
        "recovery_after_notice_s": [] if quick or not hears_notices() else trial.recovery("notice"),
    }
    figures: dict[str, Any] = {"wrong": sum(trial.wrong.values()), **trial.accounts.shares()}
    not_judged: dict[str, str] = {}
    for name, values in recovery_s.items():
        if values:
            figures[name] = round(max(values), 3)
        else:
            why = "a quick run leaves it out" if quick else "no job was interrupted so"
            not_judged[name] = why
    facts = {
        "wrong_by_check": trial.wrong,
        "runs": trial.figures,
        "seeds": extent.seeds,
        "jobs": extent.jobs,
        "lease_s": extent.lease_s,
        "classes": "default" if options.default_classes else "reproducible",
    }
    return Findings(figures=figures, not_judged=not_judged, facts=facts)


if __name__ == "__main__":
    sys.exit(main())
