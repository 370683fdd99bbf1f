"""A rolling restart of a whole fleet under load loses nothing and does nothing twice.

    python -m benchmarks.rolling [--quick] [--workers 24] [--gap-s 2] [--keep]

So many CPU workers with a tiny model on one broker; each gets SIGTERM, one after the other, while
jobs keep coming. At most a quarter of them (half, when there are few) is away at any time. Every
worker is a process that loads torch: on two cores, two dozen take minutes to start.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lib import fleet_file, tiny_checkpoint
from benchmarks.lib.integrity.checks import hand_off_keys, job_checks, stack_checks
from benchmarks.lib.integrity.figures import RETURNED, work_figures
from benchmarks.lib.integrity.probe import StackProbe, probed_stack, wait_until
from benchmarks.lib.integrity.records import RunRecords, count_active, read_records
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import TIERS, PlannedJob, TierLoad, workload
from benchmarks.lib.progress import log_progress
from benchmarks.lib.tables import show_figures
from benchmarks.lib.verdict import Target, judge, report
from benchmarks.rolling.rollout import SLOTS, Rollout, keep_busy

WORKERS = 24
QUICK_WORKERS = 4
AWAY_SHARE = 0.25
QUICK_AWAY_SHARE = 0.5
# Jobs in hand for each slot; on two cores, those that load torch want their part too.
BUSY = 0.75
QUICK_BUSY = 0.4
STEPS = (100, 300)  # of jobs that are half done when the signal comes
QUICK_STEPS = (50, 100)
UP_WITHIN_S = 1200
END_WITHIN_S = 600


def main() -> int:
    """Run, report, judge; 1 if anything was lost, doubled or otherwise wrong."""
    options = _options()
    workers = QUICK_WORKERS if options.quick else options.workers
    targets = [
        *(Target(name, "==", 0) for name in ("lost", "doubled", "wrong")),
        Target("restarts", "==", workers),
        Target("jobs", ">", workers),
    ]
    started_at = time.monotonic()
    is_good = False
    with probed_stack(
        _write_fleet_file,
        workers=workers,
        variables={},
        wait_s=UP_WITHIN_S,
        keep=lambda: options.keep and not is_good,
    ) as probe:
        log_progress(f"{workers} workers are up")
        rollout = Rollout(
            probe,
            gap_s=options.gap_s,
            away_share=QUICK_AWAY_SHARE if options.quick else AWAY_SHARE,
        )
        run = _roll(probe, rollout, quick=options.quick)
        figures = _figures(probe, run, rollout.restarted)
        is_good = all(judge(figures, targets).values())
    if rollout.error is not None:
        log_progress(f"the rollout ended early: {rollout.error!r}")
    show_figures(
        f"rolling restart of {workers} workers",
        figures,
        "from rows; messages that found nothing to do leave none",
    )
    facts = {
        "workers": workers,
        "slots": SLOTS,
        "cores": os.cpu_count(),
        "took_s": round(time.monotonic() - started_at, 1),
        "quick": options.quick,
    }
    return report("rolling", figures, targets, facts=facts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_WORKERS} workers, short jobs; ends within a minute",
    )
    add("--workers", type=int, default=WORKERS)
    add("--gap-s", type=float, default=2.0, help="between two signals")
    add(
        "--keep",
        action="store_true",
        help="leave the data where they are when something was wrong",
    )
    return parser.parse_args()


def _write_fleet_file(folder: Path) -> Path:
    checkpoint = tiny_checkpoint.save(folder / "checkpoint")
    tables = fleet_file.small_workers(checkpoint, slots=SLOTS)
    return fleet_file.write(tables, folder / "fleet.toml")


def _jobs(*, quick: bool) -> Iterator[PlannedJob]:
    """Plan more jobs than any rollout needs."""
    steps = QUICK_STEPS if quick else STEPS
    tiers = [TierLoad(tier=each.tier, share=each.share, steps=steps) for each in TIERS]
    return iter(
        workload(100_000, every_s=0, seed=0, tiers=tiers, cancel_share=0, most_images=SLOTS)
    )


def _roll(probe: StackProbe, rollout: Rollout, *, quick: bool) -> RunRecords:
    """Keep the workers busy while they are restarted; return what became of all jobs."""
    submitter = Submitter(probe, "rolling")
    try:
        keep_busy(probe, submitter, _jobs(quick=quick), rollout, busy=QUICK_BUSY if quick else BUSY)
        submitter.settle()
    except BaseException:
        submitter.give_up()
        raise
    if not wait_until(lambda: count_active(probe, submitter) == 0, END_WITHIN_S):
        log_progress(f"not all jobs ended within {END_WITHIN_S} s")
    return read_records(probe, submitter)


def _figures(probe: StackProbe, run: RunRecords, restarts: int) -> dict[str, Any]:
    """Check the run; return the figures that are judged, and those beside them."""
    checks = [*job_checks(probe, run), *stack_checks(probe)]
    show_checks(probe, f"rolling restart of {len(probe.workers)} workers", checks)
    work = work_figures(run)
    return {
        "jobs": len(run.jobs),
        "restarts": restarts,
        "lost": len(run.jobs) - len(run.succeeded()) + run.lost(),
        "doubled": run.doubled(),
        "wrong": sum(len(check.violations) for check in checks),
        "duplicates": work["images_rendered_twice"],
        "attempts_preempted": sum(work["attempts"].get(outcome, 0) for outcome in RETURNED),
        **work,
        "hand_off_keys_left": hand_off_keys(probe),
    }


if __name__ == "__main__":
    sys.exit(main())
