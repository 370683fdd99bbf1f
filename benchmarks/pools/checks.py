"""What must hold of jobs in two pools whose workers are ended by turns."""

from collections.abc import Iterator, Sequence
from datetime import timedelta

from benchmarks.lib.integrity.checks import Check, Violation
from benchmarks.lib.integrity.probe import Row
from benchmarks.lib.integrity.records import RunRecords
from benchmarks.lib.integrity.rollout import EndedWorker, Ending
from benchmarks.lib.integrity.submitter import Submitter
from policy.states import Outcome

RESERVED = "reserved"
SHARED = "shared"
RESERVED_TENANTS = (0, 1)  # numbers of tenants
# How an attempt may end by how its worker did; one that is preempted may be killed at its work.
ENDS_OF = {
    Ending.KILL: (Outcome.LEASE_LOST,),
    Ending.TERMINATE: (Outcome.PREEMPTED,),
    Ending.NOTICE: (Outcome.PREEMPTED, Outcome.LEASE_LOST),
}
NOTED_BEFORE = timedelta(seconds=1)  # an end is noted just before it is done


def placed(run: RunRecords, submitter: Submitter) -> Check:
    """Check that every job has the version it named, and ran in pools that may have it alone."""
    return Check(
        "the version that was named, in a pool of the tenant",
        f"{len(run.jobs)} jobs",
        tuple(_misplaced(run, submitter)),
    )


def ends_told(run: RunRecords, ended: Sequence[EndedWorker]) -> Check:
    """Check that attempts ended early on those workers alone that were ended then, and so."""
    attempts = [attempt for of_job in run.attempts.values() for attempt in of_job]
    early = [attempt for attempt in attempts if attempt["outcome"] != Outcome.RENDERED]
    wrong = tuple(
        Violation(
            f"attempt {attempt['attempt']} on {attempt['worker']} is {attempt['outcome']}",
            attempt["job_id"],
        )
        for attempt in early
        if not any(_explains(end, attempt) for end in ended)
    )
    return Check("leases end early with their workers alone", f"{len(attempts)} attempts", wrong)


def _misplaced(run: RunRecords, submitter: Submitter) -> Iterator[Violation]:
    reserved_for = {submitter.tenant_ids[number] for number in RESERVED_TENANTS}
    for job in run.jobs:
        may_have = {SHARED, RESERVED} if str(job["tenant_id"]) in reserved_for else {SHARED}
        pools = [str(attempt["worker"]).partition("-")[0] for attempt in run.attempts[job["id"]]]
        if not {job["pool"], *pools} <= may_have or pools[-1:] != [job["pool"]]:
            yield Violation(f"of pool {job['pool']} ran in {pools}", job["id"])
        submission = run.submission_of(job)
        made = f"{job['model']}@{job['model_version']}"
        if submission is not None and submission.planned.parameters["model"] != made:
            yield Violation(f"was made by {made}", job["id"])


def _explains(end: EndedWorker, attempt: Row) -> bool:
    """Tell whether this end of a worker is why the attempt ended."""
    return (
        end.worker == attempt["worker"]
        and attempt["outcome"] in ENDS_OF[end.ending]
        and attempt["started_at"] - NOTED_BEFORE < end.at < attempt["ended_at"] + NOTED_BEFORE
    )
