"""What must hold when a run is over. Each check says what it looked at and names every job that breaks it."""

import io
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.survival.ledger import Ledger
from benchmarks.survival.rig import Rig, Row, wait_until
from benchmarks.survival.workload import marker_of
from edges.objectstore import StoreUnavailable, content_sha256
from policy.states import FINAL_STATES, JobState

_TIDY_WITHIN_S = 60  # what is still on its way when the last job is done; the broker gives back ten messages every few seconds
_VISIBILITY_S = 2 * 3600  # more than celeryconfig.py says
_WAS_TAKEN_BEFORE_S = 5  # else it may well be a sweep at work


@dataclass(frozen=True)
class Wrong:
    """One breach; `job_id` is None where it is nobody's in particular."""

    what: str
    job_id: uuid.UUID | None = None


@dataclass(frozen=True)
class Check:
    """One promise, what was looked at, and every breach of it."""

    name: str
    looked_at: str
    wrong: tuple[Wrong, ...]

    @classmethod
    def of(cls, name: str, looked_at: str, wrong: Iterable[str]) -> "Check":
        """One whose breaches are no job's in particular."""
        return cls(name, looked_at, tuple(map(Wrong, wrong)))


def jobs_checks(rig: Rig, run: Ledger) -> list[Check]:
    """What the rows and objects of one run must be."""
    jobs, images = f"{len(run.jobs)} jobs", f"{sum(job['num_images'] for job in run.succeeded())} images"
    return [
        Check("what was answered 202 is on record, nothing is refused", f"{len(run.asked)} asked for", tuple(_promised(run))),
        Check("one final state each, one final event each", jobs, tuple(_final(run))),
        Check("what its tenant wants succeeds", jobs, tuple(_wanted(run))),
        Check("what was answered as canceled is canceled", f"{_canceled(run)} canceled", tuple(_cancels(run))),
        Check("each image has one artifact, one object, its bytes", images, tuple(_stored(rig, run))),
        Check("attempts: all ended, one per number, within the count", jobs, tuple(_attempts(run))),
    ]


def same_pixels(rig: Rig, run: Ledger, reference: Ledger) -> tuple[Check, int | None]:
    """Images of reproducible jobs equal those of the reference by digest; of the others, the largest difference (0 to 255) is told."""
    wrong: list[Wrong] = []
    compared, others = 0, []
    for job, twin in pairs(run, reference):
        for ours, theirs in zip(run.artifacts[job["id"]], reference.artifacts[twin["id"]], strict=False):
            if job["determinism"] != "reproducible":
                others.append((ours, theirs))
                continue
            compared += 1
            if ours["pixels_sha256"] != theirs["pixels_sha256"]:
                wrong.append(Wrong(f"image {ours['index']} is not that of job {twin['id']}", job["id"]))
    with ThreadPoolExecutor(8) as pool:
        apart = max(pool.map(lambda pair: _apart(rig, *pair), others), default=None)
    return Check("pixels equal those of the fault-free run", f"{compared} images", tuple(wrong)), apart


def pairs(run: Ledger, reference: Ledger) -> Iterator[tuple[Row, Row]]:
    """Jobs that succeeded here and, asked for with the same words, there."""
    theirs = {marker_of(job["prompt"]): job for job in reference.succeeded()}
    for job in run.succeeded():
        if (twin := theirs.get(marker_of(job["prompt"]))) is not None:
            yield job, twin


def house_checks(rig: Rig) -> list[Check]:
    """What the house must be when nothing is left to do. Messages that dead processes never acknowledged come back first."""
    of_the_dead = let_an_hour_pass(rig)
    wait_until(lambda: not (_unfinished(rig) or _leftover_messages(rig) or _unended(rig)), _TIDY_WITHIN_S)
    verify = [Wrong(f"{row['chain_id']} {row['seq']}: {row['problem']}") for row in rig.sql("SELECT * FROM audit_verify()")]
    events = rig.sql("SELECT sum(last_seq) AS n FROM audit_chains")[0]["n"]
    rows = rig.sql("SELECT count(*) AS n FROM jobs")[0]["n"]
    return [
        Check("audit_verify() finds nothing", f"{events} events", tuple(verify)),
        Check("no job and no lease is left over", f"{rows} jobs", (*_unfinished(rig), *_unended(rig), *_miscounted(rig))),
        Check("broker: queues and unacked are empty", f"{len(rig.queues)} queues, {of_the_dead} unacked", tuple(_leftover_messages(rig))),
        Check("every process runs", f"{len(rig.stack.status())} processes", tuple(_not_running(rig))),
    ]


def let_an_hour_pass(rig: Rig) -> int:
    """Make the broker believe that the visibility timeout of all that is unacknowledged is over; how many messages that were.

    They are delivered again then, must find nothing to do, and go.
    """
    now = time.time()
    overdue = dict.fromkeys(rig.broker.zrangebyscore("unacked_index", 0, now - _WAS_TAKEN_BEFORE_S), now - _VISIBILITY_S)
    if overdue:
        rig.broker.zadd("unacked_index", overdue, xx=True)
    return len(overdue)


def hand_off_keys(rig: Rig) -> dict[str, int]:
    """What is left in the hand-off's Redis, counted by the first word of the key; it goes with its TTL."""
    counts: dict[str, int] = {}
    for key in rig.handoff.scan_iter(count=1000):
        word = key.decode(errors="replace").partition(":")[0]
        counts[word] = counts.get(word, 0) + 1
    return counts


def orphans(rig: Rig, run: Ledger) -> int:
    """Objects of the run's tenants that no artifact names: an upload whose job was canceled or rendered otherwise meanwhile."""
    named = {row["object_key"] for rows in run.artifacts.values() for row in rows}
    bucket = rig.stack.data_dir / "s3" / rig.env["S3_BUCKET"]
    tenants = {str(job["tenant_id"]) for job in run.jobs}
    stored = {str(path.relative_to(bucket)) for tenant in tenants for path in (bucket / "t" / tenant).rglob("*") if path.is_file()}
    return len(stored - named)


def full_load(rig: Rig) -> int:
    """Images that fill every slot of every worker."""
    return len(rig.workers) * next(iter(rig.fleet.pools.values())).slots


def load_checks(rig: Rig, run: Ledger) -> list[Check]:
    """A fresh full load runs through, and every worker has its part in it: no slot and no worker is stuck."""
    wrong = [Wrong(f"is {job['state']}", job["id"]) for job in run.jobs if job["state"] != JobState.SUCCEEDED]
    missing = len(run.asked) - len(run.jobs)
    if missing:
        wrong.append(Wrong(f"{missing} were not accepted"))
    at_work = {attempt["worker"] for attempts in run.attempts.values() for attempt in attempts}
    wrong += [Wrong(f"{name} took no job") for name in map(rig.worker_name, rig.workers) if name not in at_work]
    return [Check("a fresh full load runs through, on every worker", f"{len(run.jobs)} jobs", tuple(wrong))]


def _promised(run: Ledger) -> Iterator[Wrong]:
    known = {str(job_id) for job_id in run.ids}
    for marker, asked in run.asked.items():
        if asked.job_id is not None and asked.job_id not in known:
            yield Wrong(f"{marker} was {asked.heard} as {asked.job_id} and has no row")
        if asked.heard == "refused":
            yield Wrong(f"{marker} was refused")


def _final(run: Ledger) -> Iterator[Wrong]:
    for job in run.jobs:
        events = run.final_events.get(job["id"], [])
        if job["state"] not in list(FINAL_STATES):
            yield Wrong(f"is {job['state']}", job["id"])
        elif events != [f"job:state:{job['state']}"]:
            yield Wrong(f"is {job['state']}, its final events are {events}", job["id"])


def _wanted(run: Ledger) -> Iterator[Wrong]:
    for job in run.jobs:
        asked = run.asked_of(job)
        is_wanted = asked is None or asked.cancel is None
        if job["state"] != JobState.SUCCEEDED and (is_wanted or job["state"] != JobState.CANCELED):
            yield Wrong(f"is {job['state']} {job['failure_code'] or ''}: {job['failure_detail'] or ''}", job["id"])


def _cancels(run: Ledger) -> Iterator[Wrong]:
    for job in run.jobs:
        asked = run.asked_of(job)
        if asked is None or asked.job_id != str(job["id"]):
            continue
        if asked.cancel == "canceled" and job["state"] != JobState.CANCELED:
            yield Wrong(f"was canceled and is {job['state']}", job["id"])
        if asked.cancel is not None and asked.cancel not in ("canceled", "late"):
            yield Wrong(f"the cancel was {asked.cancel}", job["id"])


def _canceled(run: Ledger) -> int:
    return sum(asked.cancel == "canceled" for asked in run.asked.values())


def _stored(rig: Rig, run: Ledger) -> Iterator[Wrong]:
    rows = []
    for job in run.succeeded():
        artifacts = run.artifacts.get(job["id"], [])
        if [row["index"] for row in artifacts] != list(range(job["num_images"])):
            yield Wrong(f"has artifacts {[row['index'] for row in artifacts]} of {job['num_images']} images", job["id"])
        rows += artifacts
    with ThreadPoolExecutor(8) as pool:
        for row, problem in zip(rows, pool.map(lambda row: _object_problem(rig, row), rows), strict=True):
            if problem:
                yield Wrong(f"image {row['index']}: {problem}", row["job_id"])


def _object_problem(rig: Rig, artifact: Row) -> str:
    try:
        content = rig.store.get(artifact["object_key"])
    except StoreUnavailable as error:
        return f"the object cannot be read: {error}"
    if content_sha256(content) != artifact["content_sha256"] or len(content) != artifact["size_bytes"]:
        return "the object is not what was stored"
    return ""


def _attempts(run: Ledger) -> Iterator[Wrong]:
    for job in run.jobs:
        rows = run.attempts.get(job["id"], [])
        if [row["attempt"] for row in rows] != list(range(1, job["attempt"] + 1)):
            yield Wrong(f"is at attempt {job['attempt']} and has {[row['attempt'] for row in rows]}", job["id"])
        yield from (Wrong(f"attempt {row['attempt']} is {row['outcome']}", job["id"]) for row in rows if row["ended_at"] is None)


def _apart(rig: Rig, ours: Row, theirs: Row) -> int:
    left, right = (_pixels(rig.store.get(row["object_key"])) for row in (ours, theirs))
    return int(np.abs(left - right).max())


def _pixels(content: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.int16)


def _unfinished(rig: Rig) -> list[Wrong]:
    query = "SELECT id, state FROM jobs WHERE state IN ('queued', 'running', 'storing') OR lease_expires_at IS NOT NULL"
    return [Wrong(f"is {row['state']}", row["id"]) for row in rig.sql(query)]


def _unended(rig: Rig) -> list[Wrong]:
    query = "SELECT job_id, attempt, worker FROM attempts WHERE ended_at IS NULL OR outcome = 'running'"
    return [Wrong(f"attempt {row['attempt']} on {row['worker']} has not ended", row["job_id"]) for row in rig.sql(query)]


def _miscounted(rig: Rig) -> list[Wrong]:
    """Sums of waiting work that triggers keep: nothing waits any more."""
    if not rig.has("flows", "queued_jobs"):
        return []
    query = "SELECT pool, tier, tenant_id, queued_jobs, queued_images FROM flows WHERE queued_jobs <> 0 OR queued_images <> 0"
    return [Wrong(f"flow {row['pool']} {row['tier']} {row['tenant_id']} counts {row['queued_jobs']} jobs") for row in rig.sql(query)]


def _leftover_messages(rig: Rig) -> list[Wrong]:
    pipe = rig.broker.pipeline()  # at one instant: the sweeper's own message comes and goes
    for name in rig.queues:
        pipe.llen(name)
    pipe.hlen("unacked")
    pipe.zcard("unacked_index")
    counts = dict(zip([*rig.queues, "unacked", "unacked_index"], pipe.execute(), strict=True))
    return [Wrong(f"{name} has {count}") for name, count in counts.items() if count]


def _not_running(rig: Rig) -> list[Wrong]:
    return [Wrong(f"{status.name} is {status.state} ({status.detail})") for status in rig.stack.status() if status.state != "running"]
