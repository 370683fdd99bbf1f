"""A rolling restart of a whole fleet under load loses nothing and does nothing twice.

    python -m benchmarks.rolling [--quick] [--workers 24] [--gap-s 2] [--keep]

So many CPU workers with a tiny model on one broker; each gets SIGTERM, one after the other, while
jobs keep coming. At most a quarter of them (half, when there are few) is away at any time. Every
worker is a process that loads torch: on two cores, two dozen take minutes to start.
"""

import argparse
import sys
from functools import partial

from benchmarks.lib import fleet_file
from benchmarks.lib.integrity.checks import hand_off_keys, job_checks, stack_checks
from benchmarks.lib.integrity.command import Findings, make_parser, run_and_judge
from benchmarks.lib.integrity.figures import RETURNED, loss_figures, work_figures
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.rollout import Rollout, Turn
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.underload import run_under_load
from benchmarks.lib.integrity.workload import endless_workload, tiers_with
from benchmarks.lib.progress import log_progress
from benchmarks.lib.verdict import Target

WORKERS = 24
QUICK_WORKERS = 4
SLOTS = 2  # a worker's; two dozen of them fill what Postgres has of connections
AWAY_SHARE = 0.25
QUICK_AWAY_SHARE = 0.5
# Jobs in hand for each slot; on two cores, those that load torch want their part too.
BUSY = 0.75
QUICK_BUSY = 0.4
STEPS = (100, 300)  # of jobs that are half done when the signal comes
QUICK_STEPS = (50, 100)
LEAD_S = 3.0
UP_WITHIN_S = 1200


def main() -> int:
    """Run, report, judge; 1 if anything was lost, doubled or otherwise wrong."""
    parser = make_parser(__doc__, quick=f"{QUICK_WORKERS} workers, short jobs")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--gap-s", type=float, default=2.0, help="between two signals")
    options = parser.parse_args()
    workers = QUICK_WORKERS if options.quick else options.workers
    targets = [
        *(Target(name, "==", 0) for name in ("lost", "doubled", "wrong")),
        Target("restarts", "==", workers),
        Target("jobs", ">", workers),
    ]
    return run_and_judge(
        "rolling",
        partial(_roll, options=options),
        targets,
        options,
        write_fleet_file=partial(fleet_file.write_small_workers, slots=SLOTS),
        workers=workers,
        wait_s=UP_WITHIN_S,
    )


def _roll(probe: StackProbe, options: argparse.Namespace) -> Findings:
    """Keep the workers busy while they are restarted; check what became of all jobs."""
    count = len(probe.workers)
    log_progress(f"{count} workers are up")
    away_share = QUICK_AWAY_SHARE if options.quick else AWAY_SHARE
    rollout = Rollout(
        probe,
        [Turn(process) for process in probe.workers],
        gap_s=options.gap_s,
        most_away=max(1, int(away_share * count)),
    )
    tiers = tiers_with(QUICK_STEPS if options.quick else STEPS)
    run = run_under_load(
        probe,
        Submitter(probe, "rolling"),
        endless_workload(seed=0, tiers=tiers, most_images=SLOTS),
        rollout,
        in_hand=int((QUICK_BUSY if options.quick else BUSY) * SLOTS * count),
        lead_s=LEAD_S,
    )
    checks = [*job_checks(probe, run), *stack_checks(probe)]
    show_checks(probe, f"rolling restart of {count} workers", checks)
    work = work_figures(run)
    figures = {
        **loss_figures(run, checks),
        "restarts": rollout.restarted,
        "duplicates": work["images_rendered_twice"],
        "attempts_preempted": sum(work["attempts"].get(outcome, 0) for outcome in RETURNED),
        **work,
        "hand_off_keys_left": hand_off_keys(probe),
    }
    return Findings(
        figures=figures,
        facts={"slots": SLOTS},
        caption="from rows; messages that found nothing to do leave none",
    )


if __name__ == "__main__":
    sys.exit(main())
