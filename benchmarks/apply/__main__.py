"""Revisions of the fleet put in force under load: who follows how soon, and is any job lost?

    python -m benchmarks.apply [--quick] [--keep]

Two CPU workers with a tiny model in two versions. While jobs keep coming: a model is added, the
versions' weights changed, a tier with queued jobs removed, a mistake refused, the first revision
put in force again, and a worker killed while it is to follow.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.apply.edits import GONE_TIER, Edits
from benchmarks.lib import fleet_file, tiny_checkpoint
from benchmarks.lib.integrity.checks import job_checks, stack_checks
from benchmarks.lib.integrity.command import Findings, make_parser, run_and_judge
from benchmarks.lib.integrity.figures import loss_figures
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.underload import run_under_load
from benchmarks.lib.integrity.workload import TierLoad, endless_workload, tiers_with
from benchmarks.lib.verdict import Target

WORKERS = 2
SLOTS = 4
IN_HAND = 12  # jobs
QUICK_IN_HAND = 6
STEPS = (100, 300)
QUICK_STEPS = (20, 60)
OF_GONE_TIER = 8  # jobs that are queued when their tier is removed
FIRST_OF_GONE_TIER = 1_000_000
FOLLOWS_WITHIN_S = 2.0
TARGETS = (
    Target("follow_s_max", "<=", FOLLOWS_WITHIN_S),
    *(Target(name, "==", 0) for name in ("lost", "doubled", "wrong", "turned_away")),
    Target("revisions", "==", 5),
    Target("mistakes_refused", "==", 1),
)


def main() -> int:
    """Run, report, judge; 1 if somebody followed late, or anything was lost, doubled or wrong."""
    options = make_parser(__doc__, quick="short jobs, fewer at a time").parse_args()
    return run_and_judge(
        "apply",
        partial(_run, options=options),
        TARGETS,
        options,
        write_fleet_file=_write_fleet_file,
        workers=WORKERS,
    )


def _write_fleet_file(folder: Path) -> Path:
    checkpoint = tiny_checkpoint.save(folder / "checkpoint")
    tables = fleet_file.small_workers(checkpoint, slots=SLOTS)
    first = tables["models"]["tiny"]["versions"][0] | {"traffic_weight": 3}
    tables["models"]["tiny"]["versions"] = [first, first | {"id": "2", "traffic_weight": 1}]
    return fleet_file.write(tables, folder / "fleet.toml")


def _run(probe: StackProbe, options: argparse.Namespace) -> Findings:
    """Keep the workers busy while the fleet is edited."""
    submitter = Submitter(probe, "apply")
    steps = QUICK_STEPS if options.quick else STEPS

    def queue_some() -> None:
        tiers = [TierLoad(tier=GONE_TIER, share=1, steps=steps)]
        jobs = endless_workload(seed=1, tiers=tiers, first=FIRST_OF_GONE_TIER)
        for _ in range(OF_GONE_TIER):
            submitter.submit(next(jobs))

    edits = Edits(probe, probe.stack.fleet_file, queue_some)
    tiers = tiers_with(steps, without=GONE_TIER)
    jobs = endless_workload(seed=0, tiers=tiers, most_images=SLOTS)
    in_hand = QUICK_IN_HAND if options.quick else IN_HAND
    run = run_under_load(probe, submitter, jobs, edits, in_hand=in_hand)
    checks = [*job_checks(probe, run), *stack_checks(probe)]
    show_checks(probe, "revisions under load", checks)
    heard = [each.heard for each in submitter.submissions.values()]
    figures = {
        **loss_figures(run, checks),
        "revisions": len(edits.workers_s),
        "mistakes_refused": edits.refused,
        "follow_s_max": round(max(edits.follow_s, default=float("inf")), 3),
        "workers_s": [round(seconds, 1) for seconds in edits.workers_s],
        "turned_away": heard.count("refused"),
    }
    return Findings(figures=figures, caption="seconds from the commit of a revision")


if __name__ == "__main__":
    sys.exit(main())
