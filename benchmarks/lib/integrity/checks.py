"""What must hold when a run is over.

Each check says what it looked at and names every job that breaks it.
"""

import io
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.lib.integrity.probe import Row, StackProbe, wait_until
from benchmarks.lib.integrity.records import RunRecords
from benchmarks.lib.integrity.workload import marker_of
from edges.objectstore import StoreUnavailable, content_sha256
from policy.states import FINAL_STATES, JobState

# What is still on its way when the last job is done; the broker gives back ten messages every few
# seconds.
_TIDY_WITHIN_S = 60
_VISIBILITY_S = 2 * 3600  # more than celeryconfig.py says
_WAS_TAKEN_BEFORE_S = 5  # else it may well be a sweep at work

_UNFINISHED = """
SELECT id, state FROM jobs
WHERE state IN ('queued', 'running', 'storing') OR lease_expires_at IS NOT NULL
"""
_UNENDED = """
SELECT job_id, attempt, worker FROM attempts WHERE ended_at IS NULL OR outcome = 'running'
"""
_MISCOUNTED = """
SELECT pool, tier, tenant_id, queued_jobs, queued_images FROM flows
WHERE queued_jobs <> 0 OR queued_images <> 0
"""


@dataclass(frozen=True)
class Violation:
    """One breach; `job_id` is None where it is nobody's in particular."""

    what: str
    job_id: uuid.UUID | None = None


@dataclass(frozen=True)
class Check:
    """One promise, what was looked at, and every breach of it."""

    name: str
    looked_at: str
    violations: tuple[Violation, ...]

    @classmethod
    def of(cls, name: str, looked_at: str, violations: Iterable[str]) -> "Check":
        """Make one whose violations are no job's in particular."""
        return cls(name, looked_at, tuple(map(Violation, violations)))


def job_checks(probe: StackProbe, run: RunRecords) -> list[Check]:
    """Check the rows and objects of one run."""
    jobs = f"{len(run.jobs)} jobs"
    images = f"{sum(job['num_images'] for job in run.succeeded())} images"
    return [
        Check(
            "what was answered 202 is on record, nothing is refused",
            f"{len(run.submissions)} asked for",
            tuple(_promised(run)),
        ),
        Check("one final state each, one final event each", jobs, tuple(_final(run))),
        Check("what its tenant wants succeeds", jobs, tuple(_wanted(run))),
        Check(
            "what was answered as canceled is canceled",
            f"{_canceled(run)} canceled",
            tuple(_cancels(run)),
        ),
        Check(
            "each image has one artifact, one object, its bytes", images, tuple(_stored(probe, run))
        ),
        Check("attempts: all ended, one per number, within the count", jobs, tuple(_attempts(run))),
    ]


def same_pixels(
    probe: StackProbe, run: RunRecords, reference: RunRecords
) -> tuple[Check, int | None]:
    """Check that images of reproducible jobs equal those of the reference by digest.

    Of the others, the largest difference (0 to 255) is returned.
    """
    wrong: list[Violation] = []
    compared = 0
    others: list[tuple[Row, Row]] = []
    for job, twin in pairs(run, reference):
        for ours, theirs in zip(
            run.artifacts[job["id"]], reference.artifacts[twin["id"]], strict=False
        ):
            if job["determinism"] != "reproducible":
                others.append((ours, theirs))
                continue
            compared += 1
            if ours["pixels_sha256"] != theirs["pixels_sha256"]:
                wrong.append(
                    Violation(f"image {ours['index']} is not that of job {twin['id']}", job["id"])
                )
    with ThreadPoolExecutor(8) as pool:
        apart = max(pool.map(lambda pair: _apart(probe, *pair), others), default=None)
    name = "pixels equal those of the fault-free run"
    return Check(name, f"{compared} images", tuple(wrong)), apart


def pairs(run: RunRecords, reference: RunRecords) -> Iterator[tuple[Row, Row]]:
    """Give the jobs that succeeded here and, asked for with the same words, there."""
    theirs = {marker_of(job["prompt"]): job for job in reference.succeeded()}
    for job in run.succeeded():
        if (twin := theirs.get(marker_of(job["prompt"]))) is not None:
            yield job, twin


def stack_checks(probe: StackProbe) -> list[Check]:
    """Check what must be when nothing is left to do.

    Messages that dead processes never acknowledged come back first.
    """
    unacknowledged = expire_visibility_timeouts(probe)
    wait_until(
        lambda: not (_unfinished(probe) or _leftover_messages(probe) or _unended(probe)),
        _TIDY_WITHIN_S,
    )
    verify = [
        Violation(f"{row['chain_id']} {row['seq']}: {row['problem']}")
        for row in probe.sql("SELECT * FROM audit_verify()")
    ]
    events = probe.sql("SELECT sum(last_seq) AS n FROM audit_chains")[0]["n"]
    rows = probe.sql("SELECT count(*) AS n FROM jobs")[0]["n"]
    return [
        Check("audit_verify() finds nothing", f"{events} events", tuple(verify)),
        Check(
            "no job and no lease is left over",
            f"{rows} jobs",
            (*_unfinished(probe), *_unended(probe), *_miscounted(probe)),
        ),
        Check(
            "broker: queues and unacked are empty",
            f"{len(probe.queues)} queues, {unacknowledged} unacked",
            tuple(_leftover_messages(probe)),
        ),
        Check(
            "every process runs",
            f"{len(probe.stack.status())} processes",
            tuple(_not_running(probe)),
        ),
    ]


def expire_visibility_timeouts(probe: StackProbe) -> int:
    """Make the broker believe that the visibility timeout of all unacknowledged messages is over.

    Returns how many there were. They are delivered again then, must find nothing to do, and go.
    """
    now = time.time()
    unacked = probe.broker.zrangebyscore("unacked_index", 0, now - _WAS_TAKEN_BEFORE_S)
    overdue: dict[Any, float] = dict.fromkeys(unacked, now - _VISIBILITY_S)
    if overdue:
        probe.broker.zadd("unacked_index", overdue, xx=True)
    return len(overdue)


def hand_off_keys(probe: StackProbe) -> dict[str, int]:
    """Count what is left in the hand-off's Redis by the first word of the key; TTLs end it."""
    counts: dict[str, int] = {}
    for key in probe.handoff.scan_iter(count=1000):
        word = key.decode(errors="replace").partition(":")[0]
        counts[word] = counts.get(word, 0) + 1
    return counts


def orphans(probe: StackProbe, run: RunRecords) -> int:
    """Count the objects of the run's tenants that no artifact names.

    Uploads of jobs that were canceled, or rendered otherwise, meanwhile.
    """
    named = {row["object_key"] for rows in run.artifacts.values() for row in rows}
    bucket = probe.stack.data_dir / "s3" / probe.env["S3_BUCKET"]
    tenants = {str(job["tenant_id"]) for job in run.jobs}
    stored = {
        str(path.relative_to(bucket))
        for tenant in tenants
        for path in (bucket / "t" / tenant).rglob("*")
        if path.is_file()
    }
    return len(stored - named)


def full_load(probe: StackProbe) -> int:
    """Return how many images fill every slot of every worker."""
    return sum(probe.pool_of(process).slots for process in probe.workers)


def load_checks(probe: StackProbe, run: RunRecords) -> list[Check]:
    """Check that a fresh full load runs through, and that every worker has its part in it.

    Then no slot and no worker is stuck.
    """
    wrong = [
        Violation(f"is {job['state']}", job["id"])
        for job in run.jobs
        if job["state"] != JobState.SUCCEEDED
    ]
    missing = len(run.submissions) - len(run.jobs)
    if missing:
        wrong.append(Violation(f"{missing} were not accepted"))
    at_work = {attempt["worker"] for attempts in run.attempts.values() for attempt in attempts}
    wrong += [
        Violation(f"{name} took no job")
        for name in map(probe.worker_name, probe.workers)
        if name not in at_work
    ]
    name = "a fresh full load runs through, on every worker"
    return [Check(name, f"{len(run.jobs)} jobs", tuple(wrong))]


def _promised(run: RunRecords) -> Iterator[Violation]:
    known = {str(job_id) for job_id in run.ids}
    for marker, submission in run.submissions.items():
        if submission.job_id is not None and submission.job_id not in known:
            yield Violation(
                f"{marker} was {submission.heard} as {submission.job_id} and has no row"
            )
        if submission.heard == "refused":
            yield Violation(f"{marker} was refused")


def _final(run: RunRecords) -> Iterator[Violation]:
    for job in run.jobs:
        events = run.final_events.get(job["id"], [])
        if job["state"] not in list(FINAL_STATES):
            yield Violation(f"is {job['state']}", job["id"])
        elif events != [f"job:state:{job['state']}"]:
            yield Violation(f"is {job['state']}, its final events are {events}", job["id"])


def _wanted(run: RunRecords) -> Iterator[Violation]:
    for job in run.jobs:
        submission = run.submission_of(job)
        is_wanted = submission is None or submission.cancel is None
        if job["state"] != JobState.SUCCEEDED and (is_wanted or job["state"] != JobState.CANCELED):
            yield Violation(
                f"is {job['state']} {job['failure_code'] or ''}: {job['failure_detail'] or ''}",
                job["id"],
            )


def _cancels(run: RunRecords) -> Iterator[Violation]:
    for job in run.jobs:
        submission = run.submission_of(job)
        if submission is None or submission.job_id != str(job["id"]):
            continue
        if submission.cancel == "canceled" and job["state"] != JobState.CANCELED:
            yield Violation(f"was canceled and is {job['state']}", job["id"])
        if submission.cancel is not None and submission.cancel not in ("canceled", "late"):
            yield Violation(f"the cancel was {submission.cancel}", job["id"])


def _canceled(run: RunRecords) -> int:
    return sum(submission.cancel == "canceled" for submission in run.submissions.values())


def _stored(probe: StackProbe, run: RunRecords) -> Iterator[Violation]:
    rows = []
    for job in run.succeeded():
        artifacts = run.artifacts.get(job["id"], [])
        indices = [row["index"] for row in artifacts]
        if indices != list(range(job["num_images"])):
            yield Violation(f"has artifacts {indices} of {job['num_images']} images", job["id"])
        rows += artifacts
    with ThreadPoolExecutor(8) as pool:
        for row, problem in zip(
            rows, pool.map(lambda row: _object_problem(probe, row), rows), strict=True
        ):
            if problem:
                yield Violation(f"image {row['index']}: {problem}", row["job_id"])


def _object_problem(probe: StackProbe, artifact: Row) -> str:
    try:
        content = probe.store.get(artifact["object_key"])
    except StoreUnavailable as error:
        return f"the object cannot be read: {error}"
    if (
        content_sha256(content) != artifact["content_sha256"]
        or len(content) != artifact["size_bytes"]
    ):
        return "the object is not what was stored"
    return ""


def _attempts(run: RunRecords) -> Iterator[Violation]:
    for job in run.jobs:
        rows = run.attempts.get(job["id"], [])
        numbers = [row["attempt"] for row in rows]
        if numbers != list(range(1, job["attempt"] + 1)):
            yield Violation(f"is at attempt {job['attempt']} and has {numbers}", job["id"])
        yield from (
            Violation(f"attempt {row['attempt']} is {row['outcome']}", job["id"])
            for row in rows
            if row["ended_at"] is None
        )


def _apart(probe: StackProbe, ours: Row, theirs: Row) -> int:
    left, right = (_pixels(probe.store.get(row["object_key"])) for row in (ours, theirs))
    return int(np.abs(left - right).max())


def _pixels(content: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.int16)


def _unfinished(probe: StackProbe) -> list[Violation]:
    return [Violation(f"is {row['state']}", row["id"]) for row in probe.sql(_UNFINISHED)]


def _unended(probe: StackProbe) -> list[Violation]:
    return [
        Violation(f"attempt {row['attempt']} on {row['worker']} has not ended", row["job_id"])
        for row in probe.sql(_UNENDED)
    ]


def _miscounted(probe: StackProbe) -> list[Violation]:
    """Compare the sums of waiting work that triggers keep: nothing waits any more."""
    if not probe.has("flows", "queued_jobs"):
        return []
    return [
        Violation(
            f"flow {row['pool']} {row['tier']} {row['tenant_id']} counts {row['queued_jobs']} jobs"
        )
        for row in probe.sql(_MISCOUNTED)
    ]


def _leftover_messages(probe: StackProbe) -> list[Violation]:
    pipe = probe.broker.pipeline()  # at one instant: the sweeper's own message comes and goes
    for name in probe.queues:
        pipe.llen(name)
    pipe.hlen("unacked")
    pipe.zcard("unacked_index")
    counts = dict(zip([*probe.queues, "unacked", "unacked_index"], pipe.execute(), strict=True))
    return [Violation(f"{name} has {count}") for name, count in counts.items() if count]


def _not_running(probe: StackProbe) -> list[Violation]:
    return [
        Violation(f"{status.name} is {status.state} ({status.detail})")
        for status in probe.stack.status()
        if status.state != "running"
    ]
