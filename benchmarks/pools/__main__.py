"""Two pools and two versions on one host, workers ended by turns: does anybody notice?

    python -m benchmarks.pools [--quick] [--keep]

One tiny model in two versions, in a pool that is reserved for two tenants and in one that all
share; a second model of the shared pool cannot be loaded. While jobs keep coming, one worker after
the other is killed, told to end, or preempted, so at any time a worker of the shared pool is there.
Then the jobs that were interrupted, and others, are asked for again without a disturbance: their
pixels must be the same.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.lib import fleet_file, tiny_checkpoint
from benchmarks.lib.integrity.checks import job_checks, same_pixels, stack_checks
from benchmarks.lib.integrity.command import Findings, make_parser, run_and_judge
from benchmarks.lib.integrity.figures import loss_figures, work_figures
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.records import RunRecords, records_at_the_end
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.rollout import Ending, Rollout, Turn
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.underload import run_under_load
from benchmarks.lib.integrity.workload import PlannedJob, endless_workload, tiers_with
from benchmarks.lib.progress import log_progress
from benchmarks.lib.verdict import Target
from benchmarks.pools.checks import RESERVED, RESERVED_TENANTS, SHARED, ends_told, placed
from darkroom_client import Client
from darkroom_client.errors import ProblemError

WORKERS = f"{RESERVED}=1,{SHARED}=2"
SLOTS = 4
IN_HAND = 8  # jobs
LEASE_S = 6.0
STEPS = (60, 200)
QUICK_STEPS = (20, 60)
LEAD_S = 2.0
GAP_S = 1.0
COMPARED = 40  # jobs that were not interrupted
BY_TURNS = "by turns"
AGAIN = "again"
BROKEN = "broken"
TARGETS = (
    *(Target(name, "==", 0) for name in ("lost", "doubled", "wrong", "unavailable")),
    Target("interrupted", ">", 0),
    Target("broken_refused", "==", 2),
    *(Target(f"jobs_of_{pool}", ">", 0) for pool in (RESERVED, SHARED)),
)


def main() -> int:
    """Run, report, judge; 1 if anything was lost, refused by chance or otherwise wrong."""
    options = make_parser(__doc__, quick="three turns, short jobs").parse_args()
    return run_and_judge(
        "pools",
        partial(_run, options=options),
        [*TARGETS, Target("restarts", "==", len(_turns(quick=options.quick)))],
        options,
        write_fleet_file=_write_fleet_file,
        workers=WORKERS,
        variables={
            "LEASE_TTL_S": str(LEASE_S),
            "LEASE_RENEW_S": str(LEASE_S / 3),
            "LEASE_STOP_S": str(LEASE_S * 0.8),
        },
    )


def _write_fleet_file(folder: Path) -> Path:
    """Write two pools with two versions of a model, and a model without its denoiser's weights."""
    first = tiny_checkpoint.save(folder / "first")
    second = tiny_checkpoint.save(folder / "second", seed=1)
    broken = shutil.copytree(first, folder / BROKEN)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tables = fleet_file.small_workers(first, slots=SLOTS)
    model = tables["models"]["tiny"]
    sources = {"tiny": (first, second), BROKEN: (broken,)}
    tables["models"] = {
        name: model
        | {
            "aliases": [],
            "versions": [
                {"id": str(number), "source": str(source)}
                for number, source in enumerate(of_model, 1)
            ],
        }
        for name, of_model in sources.items()
    }
    (pool,) = tables["pools"].values()
    pool |= {"warm_floor": 0}  # so that a pool without a worker does not accept jobs to wait for it
    tenants = [f"{label} {number}" for label in (BY_TURNS, AGAIN) for number in RESERVED_TENANTS]
    tables["pools"] = {
        RESERVED: pool
        | {
            "models": ["tiny"],
            "tenants": tenants,
            "overflow_to": SHARED,
            "overflow_after_s": 5.0,
        },
        SHARED: pool | {"models": ["tiny", BROKEN]},
    }
    return fleet_file.write(fleet_file.reproducible(tables), folder / "fleet.toml")


def _turns(*, quick: bool) -> list[Turn]:
    """Give every worker its turn; all of them in every way unless it has to be quick."""
    reserved, first, second = (f"worker-{name}" for name in ("reserved-1", "shared-1", "shared-2"))
    turns = [
        Turn(reserved, Ending.KILL),
        Turn(first, Ending.TERMINATE),
        Turn(second, Ending.NOTICE),
        Turn(reserved, Ending.TERMINATE),
        Turn(first, Ending.NOTICE),
        Turn(second, Ending.KILL),
        Turn(reserved, Ending.NOTICE),
        Turn(first, Ending.KILL),
        Turn(second, Ending.TERMINATE),
    ]
    return turns[:3] if quick else turns


def _jobs(steps: tuple[int, int]) -> Iterator[PlannedJob]:
    """Plan jobs of both versions by turns."""
    planned = endless_workload(seed=0, tiers=tiers_with(steps), most_images=SLOTS)
    for number, job in enumerate(planned):
        model = f"tiny@{1 + number % 2}"
        yield replace(job, parameters={**job.parameters, "model": model})


def _run(probe: StackProbe, options: argparse.Namespace) -> Findings:
    """End workers by turns under load, and compare with the same jobs when all is well."""
    _, client = probe.new_tenant("curious")
    broken_refused = _refuses_broken(probe, client)
    rollout = Rollout(probe, _turns(quick=options.quick), gap_s=GAP_S, most_away=1)
    jobs = _jobs(QUICK_STEPS if options.quick else STEPS)
    submitter = Submitter(probe, BY_TURNS)
    run = run_under_load(probe, submitter, jobs, rollout, in_hand=IN_HAND, lead_s=LEAD_S)
    broken_refused += _refuses_broken(probe, client)
    client.close()
    interrupted = [job for job in run.jobs if job["attempt"] > 1]
    again = _again(probe, run)
    pixels, _ = same_pixels(probe, run, again)
    checks = [
        *job_checks(probe, run),
        placed(run, submitter),
        ends_told(run, rollout.ended),
        pixels,
        *stack_checks(probe),
    ]
    show_checks(probe, "workers ended by turns", checks)
    by_pool = Counter(job["pool"] for job in run.jobs)
    figures: dict[str, Any] = {
        **loss_figures(run, checks),
        "unavailable": sum(each.unavailable for each in submitter.submissions.values()),
        "restarts": rollout.restarted,
        "interrupted": len(interrupted),
        "broken_refused": broken_refused,
        **{f"jobs_of_{pool}": by_pool[pool] for pool in (RESERVED, SHARED)},
        "compared": len(again.jobs),
        **work_figures(run),
    }
    return Findings(figures=figures, facts={"lease_s": LEASE_S})


def _again(probe: StackProbe, run: RunRecords) -> RunRecords:
    """Make the jobs that were interrupted, and some of the others, once more."""
    submitter = Submitter(probe, AGAIN)
    for planned in _chosen(run):
        submitter.submit(planned)
    submitter.settle()
    return records_at_the_end(probe, submitter)


def _chosen(run: RunRecords) -> list[PlannedJob]:
    interrupted: list[PlannedJob] = []
    others: list[PlannedJob] = []
    for job in run.jobs:
        if (submission := run.submission_of(job)) is not None:
            (interrupted if job["attempt"] > 1 else others).append(submission.planned)
    return interrupted + others[:COMPARED]


def _refuses_broken(probe: StackProbe, client: Client) -> int:
    """Tell whether the broken model, and it alone, is refused and named: 1 or 0."""
    try:
        client.create_job("a red circle", model=BROKEN)
    except ProblemError as problem:
        slug = problem.slug
    else:
        slug = "accepted"
    readiness = httpx.get(f"{probe.env['DARKROOM_URL']}/readyz", timeout=5, trust_env=False)
    unserved = readiness.json()["parts"]["workers"].get("unserved")
    log_progress(f"the broken model: {slug}; /readyz names {unserved}")
    return int(slug == "model-unserved" and unserved == [f"{BROKEN}@1"])


if __name__ == "__main__":
    sys.exit(main())
