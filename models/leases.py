"""Leases: a worker's right to run a job until the database's clock says otherwise.

The attempt number is the fence: it grows with every lease, and every later write of a worker names it. Whoever comes
late finds another number and is told LeaseLost. No row lock outlives its statement.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from models import audit, jobs
from models.states import ACTIVE_STATES, FailureCode, ImageState, JobState, Outcome
from models.tables import Attempt, Image, Job


class LeaseLost(Exception):
    """The job is not this attempt's any more: canceled, expired or alive elsewhere. Stop, and write nothing."""


@dataclass(frozen=True)
class Lease:
    """The right to run `job`; `attempt` fences every write made under it. `pending` are the images still to render."""

    job: Job
    attempt: int
    worker: str
    pending: tuple[int, ...]

    @property
    def job_id(self) -> uuid.UUID:
        return self.job.id


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What rendering one image took; the shape of `attempts`."""

    steps: int
    shared_steps: int
    max_rows: int
    max_images: int
    mean_rows: float
    bucket_rows: int | None
    device_seconds: float
    encode_s: float
    denoise_s: float
    decode_s: float
    fingerprint: str
    fingerprint_facts: dict[str, Any]


def take(session: Session, job_id: uuid.UUID, *, worker: str, device: str, ttl_s: float) -> Lease | None:
    """Give `worker` the job until the database's now + `ttl_s`; None if it is finished or someone else holds it.

    A single UPDATE, so two workers cannot both win. Only queued jobs are given: a silent worker's job is first put back
    by the sweeper, the one place that counts lost leases.
    """
    row = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, (Job.attempt > 0) | (Job.start_by > func.clock_timestamp()))
        .values(
            state=JobState.RUNNING,
            worker=worker,
            attempt=Job.attempt + 1,
            lease_expires_at=func.clock_timestamp() + timedelta(seconds=ttl_s),
            started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
        )
        .returning(Job)
    )
    if row is None:
        return None
    pending = session.scalars(select(Image.index).where(Image.job_id == job_id, Image.state == ImageState.PENDING).order_by(Image.index))
    lease = Lease(job=row, attempt=row.attempt, worker=worker, pending=tuple(pending))
    session.add(Attempt(job_id=job_id, attempt=row.attempt, worker=worker, device=device, outcome=Outcome.RUNNING))
    audit.append(session, "job:lease:taken", chain=row.tenant_id, actor=worker, job_id=job_id, attempt=row.attempt)
    return lease


def renew(session: Session, held: Sequence[tuple[uuid.UUID, int]], *, ttl_s: float) -> set[uuid.UUID]:
    """Prolong all of a worker's leases, (job id, attempt) each, in one UPDATE; the ids that are still its own come back."""
    if not held:
        return set()
    statement = (
        update(Job)
        .where(tuple_(Job.id, Job.attempt).in_(held), Job.state == JobState.RUNNING)
        .values(lease_expires_at=func.clock_timestamp() + timedelta(seconds=ttl_s))
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    return set(session.scalars(statement))


def hand_off(session: Session, lease: Lease, index: int, *, rendered: Rendered, store_within_s: float) -> Job:
    """Note that the image's pixels wait in the hand-off; with the last image the job is `storing` and the lease is over.

    Raises LeaseLost.
    """
    job = _held(session, lease)
    image = session.get_one(Image, (job.id, index))
    image.state, image.handed_off_attempt, image.handed_off_at = ImageState.HANDED_OFF, lease.attempt, func.clock_timestamp()
    image.steps_done, image.device_seconds = rendered.steps, rendered.device_seconds
    _add_to_record(session.get_one(Attempt, (job.id, lease.attempt)), rendered)
    session.flush()
    if not session.scalar(select(func.count()).where(Image.job_id == job.id, Image.state == ImageState.PENDING)):
        job.state, job.lease_expires_at = JobState.STORING, None
        job.rendered_at = func.clock_timestamp()
        job.store_by = func.clock_timestamp() + timedelta(seconds=store_within_s)
        jobs.end_attempt(session, job, Outcome.RENDERED)
    facts = {"index": index, "steps": rendered.steps, "device_seconds": rendered.device_seconds, "fingerprint": rendered.fingerprint}
    audit.append(session, "job:image:handed-off", chain=job.tenant_id, actor=lease.worker, job_id=job.id, attempt=lease.attempt, **facts)
    return job


def give_back(session: Session, lease: Lease, *, reason: str) -> Job:
    """Return the job unharmed: the try does not count towards the cap. Raises LeaseLost."""
    job = _held(session, lease)
    jobs.end_attempt(session, job, Outcome.RETURNED, error=reason)
    jobs.requeue(job)
    facts: dict[str, Any] = {"attempt": lease.attempt, "reason": reason}
    audit.append(session, "job:lease:returned", chain=job.tenant_id, actor=lease.worker, job_id=job.id, **facts)
    return job


def fail(session: Session, lease: Lease, *, code: FailureCode, detail: str) -> Job:
    """End the job: no retry helps. Raises LeaseLost."""
    job = _held(session, lease)
    jobs.end_attempt(session, job, Outcome.FAILED, error=detail)
    jobs.finish(job, JobState.FAILED, code=code, detail=detail)
    audit.append(session, "job:state:failed", chain=job.tenant_id, actor=lease.worker, job_id=job.id, attempt=lease.attempt, code=code)
    return job


def count_error(session: Session, lease: Lease, *, detail: str, max_attempts: int) -> Job:
    """Put the job back for another try, or fail it if this was the last one allowed. Raises LeaseLost."""
    return _count(session, _held(session, lease), Outcome.ERROR, detail=detail, max_attempts=max_attempts, actor=lease.worker)


def lose(session: Session, job_id: uuid.UUID, *, max_attempts: int) -> Job | None:
    """Take an expired lease away and put the job back, or fail it; None if the worker renewed meanwhile."""
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING, Job.lease_expires_at < func.clock_timestamp())
        .with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    return _count(session, job, Outcome.LEASE_LOST, detail=f"{job.worker} fell silent", max_attempts=max_attempts, actor=jobs.SWEEPER)


def lose_hand_off(session: Session, job_id: uuid.UUID, indexes: Sequence[int], *, attempt_of: dict[int, int]) -> Job | None:
    """The pixels of these images are gone: render them again, which does not count as a try. None if they were stored meanwhile.

    attempt_of: the attempt whose pixels were looked for, by index; an image handed off again since then is left alone.
    """
    job = session.get(Job, job_id, with_for_update=True)
    if job is None or job.state not in ACTIVE_STATES:
        return None
    gone = []
    for image in session.scalars(select(Image).where(Image.job_id == job_id, Image.index.in_(indexes))):
        if image.state == ImageState.HANDED_OFF and image.handed_off_attempt == attempt_of[image.index]:
            image.state, image.handed_off_attempt, image.handed_off_at = ImageState.PENDING, None, None
            gone.append(image.index)
    if not gone:
        return None
    if job.state == JobState.STORING:  # a queued one waits already; a running one is its worker's, which gives it back when it is done
        jobs.requeue(job)
    audit.append(
        session, "job:hand-off:lost", chain=job.tenant_id, actor=jobs.SWEEPER, job_id=job_id, attempt=job.attempt, indexes=sorted(gone)
    )
    return job


def note_waste(session: Session, job_id: uuid.UUID, attempt: int, *, device_seconds: float) -> None:
    """Add device time that bought no image to the attempt's record; its `waste_class` says why."""
    if device_seconds > 0 and (row := session.get(Attempt, (job_id, attempt), with_for_update=True)) is not None:
        row.device_seconds += device_seconds


def _held(session: Session, lease: Lease) -> Job:
    """The job's row, locked, if it is still this attempt's."""
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.state == JobState.RUNNING).with_for_update()
    )
    if job is None:
        raise LeaseLost(f"job {lease.job_id} is not attempt {lease.attempt}'s any more")
    return job


def _count(session: Session, job: Job, outcome: Outcome, *, detail: str, max_attempts: int, actor: str) -> Job:
    jobs.end_attempt(session, job, outcome, error=detail)
    job.counted_attempts += 1
    facts = {"counted_attempts": job.counted_attempts, "outcome": outcome.value}
    if job.counted_attempts >= max_attempts:
        jobs.finish(job, JobState.FAILED, code=FailureCode.ATTEMPTS_EXHAUSTED, detail=detail)
        event, facts["code"] = "job:state:failed", FailureCode.ATTEMPTS_EXHAUSTED
    else:
        jobs.requeue(job)
        event = "job:lease:expired" if outcome is Outcome.LEASE_LOST else "job:attempt:failed"
    audit.append(session, event, chain=job.tenant_id, actor=actor, job_id=job.id, attempt=job.attempt, **facts)
    return job


def _add_to_record(attempt: Attempt, rendered: Rendered) -> None:
    steps = attempt.steps + rendered.steps
    attempt.mean_rows = (attempt.mean_rows * attempt.steps + rendered.mean_rows * rendered.steps) / max(1, steps)
    attempt.steps = steps
    attempt.shared_steps += rendered.shared_steps
    attempt.max_rows = max(attempt.max_rows, rendered.max_rows)
    attempt.max_images = max(attempt.max_images, rendered.max_images)
    attempt.bucket_rows = rendered.bucket_rows
    attempt.device_seconds += rendered.device_seconds
    attempt.encode_s += rendered.encode_s
    attempt.denoise_s += rendered.denoise_s
    attempt.decode_s += rendered.decode_s
    attempt.fingerprint, attempt.fingerprint_facts = rendered.fingerprint, rendered.fingerprint_facts
