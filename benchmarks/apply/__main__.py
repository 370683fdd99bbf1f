"""Revisions of the fleet put in force under load: who follows how soon, and is any job lost?

    python -m benchmarks.apply [--quick] [--keep]

Two CPU workers with a tiny model. While jobs keep coming: a model is added, a weight changed, a
tier with queued jobs removed, a mistake refused, the first revision put in force again, and a
worker killed while it is to follow.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.apply.edits import GONE_TIER, Edits
from benchmarks.lib import fleet_file, tiny_checkpoint
from benchmarks.lib.integrity.checks import job_checks, stack_checks
from benchmarks.lib.integrity.probe import StackProbe, probed_stack, wait_until
from benchmarks.lib.integrity.records import RunRecords, count_active, read_records
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import TIERS, PlannedJob, TierLoad, workload
from benchmarks.lib.progress import log_progress
from benchmarks.lib.tables import show_figures
from benchmarks.lib.verdict import Target, judge, report

WORKERS = 2
SLOTS = 4
ROOM = 12  # jobs in hand
STEPS = (100, 300)
QUICK_STEPS = (20, 60)
OF_GONE_TIER = 8  # jobs that are queued when their tier is removed
UP_WITHIN_S = 600
END_WITHIN_S = 600
FOLLOWS_WITHIN_S = 2.0


def main() -> int:
    """Run, report, judge; 1 if somebody followed late, or anything was lost, doubled or wrong."""
    options = _options()
    targets = [
        Target("follow_s_max", "<=", FOLLOWS_WITHIN_S),
        *(Target(name, "==", 0) for name in ("lost", "doubled", "wrong", "turned_away")),
        Target("revisions", "==", 5),
        Target("mistakes_refused", "==", 1),
    ]
    started_at = time.monotonic()
    is_good = False
    with probed_stack(
        _write_fleet_file,
        workers=WORKERS,
        variables={},
        wait_s=UP_WITHIN_S,
        keep=lambda: options.keep and not is_good,
    ) as probe:
        figures = _run(probe, quick=options.quick)
        is_good = all(judge(figures, targets).values())
    show_figures("revisions under load", figures, "seconds from the commit of a revision")
    facts = {
        "workers": WORKERS,
        "cores": os.cpu_count(),
        "took_s": round(time.monotonic() - started_at, 1),
        "quick": options.quick,
    }
    return report("apply", figures, targets, facts=facts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short jobs")
    parser.add_argument(
        "--keep", action="store_true", help="leave the data where they are if something was wrong"
    )
    return parser.parse_args()


def _write_fleet_file(folder: Path) -> Path:
    checkpoint = tiny_checkpoint.save(folder / "checkpoint")
    tables = fleet_file.small_workers(checkpoint, slots=SLOTS)
    return fleet_file.write(tables, folder / "fleet.toml")


def _jobs(count: int, tiers: list[str], *, seed: int, quick: bool) -> Iterator[PlannedJob]:
    steps = QUICK_STEPS if quick else STEPS
    loads = [
        TierLoad(tier=each.tier, share=each.share, steps=steps)
        for each in TIERS
        if each.tier in tiers
    ]
    return iter(
        workload(count, every_s=0, seed=seed, tiers=loads, cancel_share=0, most_images=SLOTS)
    )


def _run(probe: StackProbe, *, quick: bool) -> dict[str, Any]:
    """Keep the workers busy while the fleet is edited; return the figures."""
    submitter = Submitter(probe, "apply")
    stay = [tier for tier in probe.fleet.tiers if tier != GONE_TIER]
    jobs = _jobs(100_000, stay, seed=0, quick=quick)

    def queue_some() -> None:
        for planned in _jobs(OF_GONE_TIER, [GONE_TIER], seed=1, quick=quick):
            submitter.submit(planned)

    edits = Edits(probe, probe.stack.fleet_file, queue_some)
    try:
        edits.start()
        while edits.is_alive():
            _top_up(probe, submitter, jobs)
        submitter.settle()
    except BaseException:
        submitter.give_up()
        raise
    if edits.error is not None:
        log_progress(f"the edits ended early: {edits.error!r}")
    if not wait_until(lambda: count_active(probe, submitter) == 0, END_WITHIN_S):
        log_progress(f"not all jobs ended within {END_WITHIN_S} s")
    return _figures(probe, submitter, read_records(probe, submitter), edits)


def _top_up(probe: StackProbe, submitter: Submitter, jobs: Iterator[PlannedJob]) -> None:
    unanswered = sum(each.heard == "nothing" for each in list(submitter.submissions.values()))
    missing = ROOM - unanswered - count_active(probe, submitter)
    for planned in itertools.islice(jobs, max(0, missing)):
        submitter.submit(planned)
    time.sleep(0.25)


def _figures(
    probe: StackProbe, submitter: Submitter, run: RunRecords, edits: Edits
) -> dict[str, Any]:
    checks = [*job_checks(probe, run), *stack_checks(probe)]
    show_checks(probe, "revisions under load", checks)
    heard = [each.heard for each in submitter.submissions.values()]
    return {
        "jobs": len(run.jobs),
        "revisions": len(edits.workers_s),
        "mistakes_refused": edits.refused,
        "follow_s_max": round(max(edits.follow_s, default=float("inf")), 3),
        "workers_s": [round(seconds, 1) for seconds in edits.workers_s],
        "lost": len(run.jobs) - len(run.succeeded()) + run.lost(),
        "doubled": run.doubled(),
        "wrong": sum(len(check.violations) for check in checks),
        "turned_away": heard.count("refused"),
    }


if __name__ == "__main__":
    sys.exit(main())
