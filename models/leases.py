"""Give, renew and end leases: a worker's right to run a job until a time on the database's clock.

The attempt number is the fence: it grows with every lease, and every later write of a worker names
it. A worker that comes late finds another number and gets LeaseLost. No row lock outlives its
statement.

All of this assumes that a commit that was answered stays: a standby that takes over must have it
(synchronous replication, `synchronous_standby_names` and `synchronous_commit` at `on` or above). A
standby that has lost the last commits may give an attempt's number to a second worker. So the
worker's name is part of the fence: the two cannot renew each other's lease or write under it. Other
consequences of lost commits cannot be detected.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import func, or_, select, text, true, tuple_, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from models import audit, inputs, jobs
from models.audit_events import EventName
from models.database import AFRESH
from models.tables import Attempt, Image, Job
from policy import gates
from policy.cost import device_cost
from policy.failures import FailureCode
from policy.states import ACTIVE_STATES, TAKEN_BACK, ImageState, JobState, Outcome
from policy.workers import WorkerTerms

OVERDUE_S = 30.0  # past its run deadline
DEVICE_LOST = "DeviceLost"  # how the error of an attempt begins whose device was lost


class LeaseLost(Exception):
    """The job is not this attempt's any more; the caller stops and writes nothing.

    It was canceled, expired, or another attempt runs it.
    """


@dataclass(frozen=True)
class Lease:
    """The right to run `job`; `attempt` fences every write made under it.

    pending: the images still to render.  run_within_s: what is left of the job's run deadline;
    None: it has none.  reached: how far earlier attempts had come with each of the pending images,
    by index.
    """

    job: Job
    attempt: int
    worker: str
    pending: tuple[int, ...]
    run_within_s: float | None = None
    reached: Mapping[int, int] = field(default_factory=dict)

    @property
    def job_id(self) -> uuid.UUID:
        return self.job.id


@dataclass(frozen=True)
class LeftSnapshot:
    """The snapshot that a preempted attempt leaves of one image.

    snapshot_ref, size_bytes: its place and size.  steps_done, device_seconds: the work that it
    spares the next attempt.
    """

    index: int
    steps_done: int
    snapshot_ref: str
    size_bytes: int
    device_seconds: float


@dataclass(frozen=True, kw_only=True)
class RenderedWork:
    """The work of rendering one image, in the columns of `attempts`.

    prompt_tokens, truncated_tokens: of the job's prompt, and those of them that the model does not
    read; None: not known.  previewed_s_ago: seconds since the job's first preview; None: it had
    none.  suspect: why the image probably shows nothing; None: it does not seem so.
    """

    num_steps: int  # of the image, those of earlier attempts included
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
    padding_s: float
    waited_s: float
    fingerprint: str
    fingerprint_facts: dict[str, Any]
    prompt_tokens: int | None = None
    truncated_tokens: int | None = None
    previewed_s_ago: float | None = None
    suspect: str | None = None


def take(
    session: Session,
    job_id: uuid.UUID,
    *,
    worker: str,
    device: str,
    ttl_s: float,
    pool: str | None = None,
    terms: WorkerTerms | None = None,
) -> Lease | None:
    """Give `worker` the job until the database's now + `ttl_s`.

    None if it is finished or held by another worker. A single UPDATE, so two workers cannot both
    win. Only queued jobs are given: a silent worker's job is first put back by `lose`, the one
    place that counts lost leases. A job whose pictures are not there is not given, for it would
    only hold slots.

    pool: the worker's. A job that went to another pool is not given, though its old message came;
    None: of whatever pool it is.  terms: of the worker's device; None: nobody said.
    """
    statement = _take_statement(job_id, worker, ttl_s, pool)
    taken = session.execute(statement).one_or_none()
    if taken is None:
        return None
    row, run_left_s = taken
    is_pending = (Image.job_id == job_id, Image.state == ImageState.PENDING)
    pending = session.execute(
        select(Image.index, Image.reached_step).where(*is_pending).order_by(Image.index)
    ).all()
    lease = Lease(
        job=row,
        attempt=row.attempt,
        worker=worker,
        pending=tuple(index for index, _ in pending),
        run_within_s=None if run_left_s is None else max(0.0, float(run_left_s)),
        reached={index: step for index, step in pending if step},
    )
    session.add(
        Attempt(
            job_id=job_id,
            attempt=row.attempt,
            worker=worker,
            device=device,
            outcome=Outcome.RUNNING,
            **asdict(terms or WorkerTerms()),
        )
    )
    audit.append_of_attempt(session, EventName.JOB_LEASE_TAKEN, row, actor=worker)
    return lease


def _take_statement(
    job_id: uuid.UUID, worker: str, ttl_s: float, pool: str | None
) -> ReturningUpdate[Job, Any]:
    """Make the UPDATE that gives the job away; it returns the row, and what is left of its time."""
    in_pool = true() if pool is None else Job.pool == pool
    in_time = (Job.attempt > 0) | (Job.start_by > func.clock_timestamp())
    may_run = func.make_interval(0, 0, 0, 0, 0, 0, Job.run_within_s)
    return (
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, ~Job.lacks_inputs, in_time, in_pool)
        .values(
            state=JobState.RUNNING,
            worker=worker,
            attempt=Job.attempt + 1,
            lease_expires_at=func.clock_timestamp() + timedelta(seconds=ttl_s),
            started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
            run_by=func.coalesce(Job.run_by, func.clock_timestamp() + may_run),
        )
        .returning(Job, func.extract("epoch", Job.run_by - func.clock_timestamp()))
    )


def renew(
    session: Session, held: Sequence[tuple[uuid.UUID, int]], *, worker: str, ttl_s: float
) -> set[uuid.UUID]:
    """Prolong all of the worker's leases in one UPDATE; return the ids of jobs still leased to it.

    held: (job id, attempt) of each. A worker's engine should stop a job at its run deadline; where
    that clearly has not happened, the lease is not renewed.
    """
    if not held:
        return set()
    not_overdue = Job.run_by > func.clock_timestamp() - timedelta(seconds=OVERDUE_S)
    own = (
        select(Job.id)
        .where(
            tuple_(Job.id, Job.attempt).in_(held),
            Job.state == JobState.RUNNING,
            Job.worker == worker,
            or_(Job.run_by.is_(None), not_overdue),
        )
        .order_by(Job.id)
        .with_for_update(key_share=True)
    )
    statement = (
        update(Job)
        .where(Job.id.in_(own))
        .values(lease_expires_at=func.clock_timestamp() + timedelta(seconds=ttl_s))
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    return set(session.scalars(statement))


_NOTE_STEPS = text(
    """
    UPDATE images i SET reached_step = n.step
    FROM unnest(CAST(:job_ids AS uuid[]), CAST(:indexes AS integer[]), CAST(:steps AS integer[]))
        AS n (job_id, index, step)
    WHERE i.job_id = n.job_id AND i.index = n.index
          AND i.state = 'pending' AND i.reached_step < n.step
    """
)


def note_steps(session: Session, reached: Mapping[tuple[uuid.UUID, int], int]) -> None:
    """Note how far images have come, by (job, index).

    Their jobs' leases have just been renewed in this transaction. It tells what a later attempt
    does again when nothing else is left of the images: neither snapshots nor progress.
    """
    if reached:
        rows = [(str(job_id), index, step) for (job_id, index), step in sorted(reached.items())]
        job_ids, indexes, steps = (list(column) for column in zip(*rows, strict=True))
        session.execute(_NOTE_STEPS, {"job_ids": job_ids, "indexes": indexes, "steps": steps})


_NOTE_UNFINISHED = text(
    """
    UPDATE attempts a SET unfinished_s = n.seconds
    FROM unnest(CAST(:job_ids AS uuid[]), CAST(:attempts AS integer[]),
                CAST(:seconds AS double precision[])) AS n (job_id, attempt, seconds)
    WHERE a.job_id = n.job_id AND a.attempt = n.attempt AND a.ended_at IS NULL
    """
)


def note_unfinished(session: Session, spent: Mapping[tuple[uuid.UUID, int], float]) -> None:
    """Note the device seconds that attempts have spent on images in hand, by (job, attempt).

    Their jobs' leases have just been renewed in this transaction. Of a worker that dies, nothing
    else is known of that time.
    """
    if spent:
        rows = [(str(job_id), attempt, taken) for (job_id, attempt), taken in sorted(spent.items())]
        job_ids, attempts, seconds = (list(column) for column in zip(*rows, strict=True))
        values = {"job_ids": job_ids, "attempts": attempts, "seconds": seconds}
        session.execute(_NOTE_UNFINISHED, values)


def hand_off(
    session: Session, lease: Lease, index: int, *, rendered: RenderedWork, store_within_s: float
) -> Job:
    """Note that the image's pixels wait in the hand-off.

    With the last image the job is `storing` and the lease is over. Raises LeaseLost.
    """
    job = _held(session, lease)
    image = session.get_one(Image, (job.id, index))
    if image.handed_off_attempt == lease.attempt:
        return job  # noted already: the answer to a commit was lost, and this is the second try
    image.state = ImageState.HANDED_OFF
    image.handed_off_attempt = lease.attempt
    image.handed_off_at = func.clock_timestamp()
    image.steps_done = image.reached_step = rendered.num_steps
    attempt = session.get_one(Attempt, (job.id, lease.attempt))
    _charge(image, attempt, rendered.device_seconds)
    image.padding_s += rendered.padding_s
    image.suspect = rendered.suspect
    attempt.unfinished_s = max(0.0, attempt.unfinished_s - rendered.device_seconds)
    # What rendered it, where the catalogue was edited since the job was accepted.
    job.precision = rendered.fingerprint_facts.get("precision", job.precision)
    job.prompt_tokens = rendered.prompt_tokens
    job.truncated_tokens = rendered.truncated_tokens
    if job.first_preview_at is None and rendered.previewed_s_ago is not None:
        ago = timedelta(seconds=rendered.previewed_s_ago)
        job.first_preview_at = func.clock_timestamp() - ago
    _add_to_record(attempt, rendered)
    session.flush()
    if not _num_pending(session, job):
        job.state = JobState.STORING
        job.lease_expires_at = None
        job.rendered_at = func.clock_timestamp()
        job.store_by = func.clock_timestamp() + timedelta(seconds=store_within_s)
        jobs.end_attempt(session, job, Outcome.RENDERED)
    facts = {
        "index": index,
        "steps": rendered.steps,
        "device_seconds": rendered.device_seconds,
        "fingerprint": rendered.fingerprint,
    }
    audit.append_of_attempt(
        session, EventName.JOB_IMAGE_HANDED_OFF, job, actor=lease.worker, **facts
    )
    return job


def _charge(image: Image, attempt: Attempt, device_seconds: float) -> None:
    """Add device time to an image, and what it costs by the terms of the attempt's worker."""
    hourly = attempt.gpu_hour_price
    if hourly is not None:
        # What an attempt without terms has added before is taken to have cost as much.
        known = image.device_cost
        before = device_cost(image.device_seconds, hourly) if known is None else known
        image.device_cost = before + device_cost(device_seconds, hourly)
    image.device_seconds += device_seconds


def _num_pending(session: Session, job: Job) -> int:
    """Count the job's images that are still to render."""
    is_pending = (Image.job_id == job.id, Image.state == ImageState.PENDING)
    return session.scalar(select(func.count()).where(*is_pending)) or 0


def give_back(
    session: Session,
    lease: Lease,
    *,
    reason: str,
    lacks_inputs: bool = False,
    pool: str | None = None,
) -> Job:
    """Return the job unharmed: the try does not count towards the cap. Raises LeaseLost.

    lacks_inputs: the pictures it starts from are not in the hand-off; it waits until they are
    brought again.  pool: another one, in which it is to wait, at the end of its tenant's line.
    """
    job = _held(session, lease)
    jobs.end_attempt(session, job, Outcome.RETURNED, error=reason)
    jobs.requeue(job)
    if lacks_inputs:
        inputs.lose(job)
    left = job.pool
    if pool is not None:  # with its state, in one UPDATE: it is counted in one flow alone
        jobs.enter_pool(session, job, pool)
    audit.append_of_attempt(
        session, EventName.JOB_LEASE_RETURNED, job, actor=lease.worker, reason=reason
    )
    if pool is not None:
        jobs.note_pool_change(session, job, left=left, actor=lease.worker)
    return job


def return_of_lost_device(session: Session, lease: Lease, *, detail: str, max_attempts: int) -> Job:
    """Return a job whose device was lost: the try does not count, unless one was lost before.

    For a job may itself break every device that it runs on. Raises LeaseLost.
    """
    job = _held(session, lease)
    losses = select(Attempt.attempt).where(
        Attempt.job_id == job.id, Attempt.error.startswith(DEVICE_LOST)
    )
    if session.scalar(losses.limit(1)) is None:
        return give_back(session, lease, reason=DEVICE_LOST)
    detail = f"{DEVICE_LOST}: {detail}"
    return count_error(session, lease, detail=detail, max_attempts=max_attempts)


def preempt(
    session: Session, lease: Lease, *, reason: str, left: Sequence[LeftSnapshot], store: str
) -> Job:
    """Return the job because its worker has to go, with the snapshots `left` of its images.

    It does not count as a try. store: where the snapshots lie.  Raises LeaseLost.
    """
    job = _held(session, lease)
    attempt = session.get_one(Attempt, (job.id, lease.attempt))
    for image in left:
        _keep_snapshot(session.get_one(Image, (job.id, image.index)), attempt, image)
        attempt.device_seconds += image.device_seconds
    attempt.snapshot_bytes = sum(image.size_bytes for image in left)
    attempt.snapshot_store = store if left else None
    jobs.end_attempt(session, job, Outcome.PREEMPTED, error=reason)
    if _num_pending(session, job) == len(left):
        attempt.waste_class = None
    jobs.requeue(job)
    audit.append_of_attempt(
        session,
        EventName.JOB_LEASE_PREEMPTED,
        job,
        actor=lease.worker,
        reason=reason,
        snapshots=len(left),
        snapshot_bytes=attempt.snapshot_bytes,
        steps_done={str(image.index): image.steps_done for image in left},
    )
    return job


def _keep_snapshot(row: Image, attempt: Attempt, left: LeftSnapshot) -> None:
    row.snapshot_ref = left.snapshot_ref
    row.steps_done = left.steps_done
    row.reached_step = max(row.reached_step, left.steps_done)
    # Not wasted: the tenant pays for it once the image is finished from the snapshot.
    _charge(row, attempt, left.device_seconds)


def note_resumption(
    session: Session, lease: Lease, *, resumed: Mapping[int, int], lost_steps: int
) -> str | None:
    """Note on the attempt's record the steps that snapshots spared it, and those it does again.

    resumed: the step at which each image begins, by index; 0: from the start, so the device time
    before it bought nothing.  lost_steps: steps of earlier attempts that are done again.  Returns
    the outcome of the attempt before it if steps were lost, else None.  Raises LeaseLost.
    """
    _held(session, lease)
    attempt = session.get_one(Attempt, (lease.job_id, lease.attempt), with_for_update=True)
    attempt.resumed_steps = sum(resumed.values())
    attempt.lost_steps = lost_steps
    pending = select(Image).where(
        Image.job_id == lease.job_id, Image.index.in_(resumed), Image.state == ImageState.PENDING
    )
    for image in session.scalars(pending.order_by(Image.index)):
        image.steps_done = image.reached_step = resumed[image.index]
        if not image.steps_done:
            image.device_seconds = image.padding_s = 0.0
            image.device_cost = None
            image.snapshot_ref = None
    if lost_steps:
        earlier = select(Attempt.outcome).where(
            Attempt.job_id == lease.job_id, Attempt.attempt < lease.attempt
        )
        attempt.lost_cause = session.scalar(earlier.order_by(Attempt.attempt.desc()).limit(1))
    return attempt.lost_cause


def warn(
    session: Session, lease: Lease, warnings: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Add warnings to the job: parts of its texts that turned out to have no effect.

    warnings: each has `code` and `field`, and whatever else is shown.  Returns those that were not
    there yet.  Raises LeaseLost.
    """
    job = _held(session, lease)
    known = job.warnings or []
    new = [
        dict(each)
        for each in warnings
        if not any((each["code"], each["field"]) == (old["code"], old["field"]) for old in known)
    ]
    if new:
        job.warnings = [*known, *new]
    for each in new:
        facts = {name: value for name, value in each.items() if name != "detail"}
        audit.append_of_attempt(
            session, EventName.JOB_TEXT_LEFT_UNREAD, job, actor=lease.worker, **facts
        )
    return new


def fail(session: Session, lease: Lease, *, code: FailureCode, detail: str) -> Job:
    """End the job: no retry helps. Raises LeaseLost."""
    job = _held(session, lease)
    jobs.end_attempt(session, job, Outcome.FAILED, error=detail)
    facts = {"code": code} | jobs.finish(session, job, JobState.FAILED, code=code, detail=detail)
    audit.append_of_attempt(session, EventName.JOB_STATE_FAILED, job, actor=lease.worker, **facts)
    return job


def count_error(session: Session, lease: Lease, *, detail: str, max_attempts: int) -> Job:
    """Put the job back for another try, or fail it if this was the last one allowed.

    Raises LeaseLost.
    """
    return _count(
        session,
        _held(session, lease),
        Outcome.ERROR,
        detail=detail,
        max_attempts=max_attempts,
        actor=lease.worker,
    )


def lose(
    session: Session, job_id: uuid.UUID, *, max_attempts: int, worker: str | None = None
) -> Job | None:
    """End an expired lease and put the job back, or fail it; None if the worker renewed meanwhile.

    worker: a worker that has just started under this name; its predecessor's leases, expired or
    not, belong to no process any more.
    """
    is_nobodys = (
        Job.lease_expires_at < func.clock_timestamp() if worker is None else Job.worker == worker
    )
    nobodys = (
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING, is_nobodys)
        .options(*jobs.WITHOUT_TEXTS)
    )
    job = session.scalar(nobodys.with_for_update(skip_locked=True), execution_options=AFRESH)
    if job is None:
        return None
    detail = f"{job.worker} fell silent" if worker is None else f"{job.worker} was started again"
    return _count(
        session,
        job,
        Outcome.LEASE_LOST,
        detail=detail,
        max_attempts=max_attempts,
        actor=worker or jobs.SWEEPER,
    )


def running_on(session: Session, worker: str) -> list[uuid.UUID]:
    """List the jobs whose lease is in the name of `worker`."""
    return list(
        session.scalars(select(Job.id).where(Job.state == JobState.RUNNING, Job.worker == worker))
    )


def lose_hand_off(
    session: Session, job_id: uuid.UUID, indexes: Sequence[int], *, attempt_of: Mapping[int, int]
) -> Job | None:
    """Have these images rendered again, for their pixels are gone; None if they were stored.

    It does not count as a try; but a job that has lost the pixels of one image too often
    (policy/gates.py) fails, or it would be rendered for ever. Its stored images stay.

    attempt_of: the attempt whose pixels were looked for, by index; an image handed off again since
    then is left alone. A job that was rendered has met its run deadline: while its pixels waited to
    be stored nothing ran, so it is given the whole time again.
    """
    job = session.get(Job, job_id, with_for_update=True, options=jobs.WITHOUT_TEXTS)
    if job is None or job.state not in ACTIVE_STATES:
        return None
    query = select(Image).where(Image.job_id == job_id, Image.index.in_(indexes))
    gone: dict[int, int] = {}  # how often, by index
    for image in session.scalars(query):
        is_handed_off = image.state == ImageState.HANDED_OFF
        if is_handed_off and image.handed_off_attempt == attempt_of[image.index]:
            _begin_again(image)
            gone[image.index] = image.hand_offs_lost
    if not gone:
        return None
    if gates.is_unstorable(max(gone.values())):
        return _end_unstorable(session, job, gone)
    # A queued job waits already; a running one is given back by its worker when that is done.
    if job.state == JobState.STORING:
        jobs.requeue(job)
        inputs.lose(job)  # its pictures were dropped with the last image
        if job.run_within_s is not None:
            job.run_by = func.clock_timestamp() + timedelta(seconds=job.run_within_s)
    _note_lost_hand_off(session, job, gone)
    return job


def _begin_again(image: Image) -> None:
    """Have an image rendered from the start whose pixels were lost."""
    image.state = ImageState.PENDING
    image.handed_off_attempt = None
    image.handed_off_at = None
    image.device_seconds = image.padding_s = 0.0
    image.device_cost = None
    image.steps_done = 0  # `reached_step` stays: those steps are done again
    image.hand_offs_lost += 1


def note_waste(
    session: Session, lease: Lease, *, device_seconds: float, steps_done: Mapping[int, int]
) -> None:
    """Add device time that bought no image to the attempt's record; its `waste_class` says why.

    steps_done: how far the images had come that it was spent on, by index. If the tenant canceled
    the job, that is booked on the tenant's account.
    """
    job = session.get(Job, lease.job_id, with_for_update={"key_share": True})
    row = session.get(Attempt, (lease.job_id, lease.attempt), with_for_update=True)
    if job is None or row is None or row.worker != lease.worker:
        return
    row.device_seconds += device_seconds
    row.unfinished_s = 0.0
    if job.state in TAKEN_BACK and job.attempt == lease.attempt:
        jobs.abandon(session, job, steps_done, actor=lease.worker)


def _end_unstorable(session: Session, job: Job, gone: Mapping[int, int]) -> Job:
    """Fail a job whose pixels were lost too often. gone: how often, by index."""
    index = max(gone, key=lambda index: gone[index])
    detail = f"image {index}: its pixels were lost {gone[index]} times before they could be stored"
    jobs.end_attempt(session, job, Outcome.FAILED, error=detail)
    code = FailureCode.NOT_STORED
    facts = {"code": code} | jobs.finish(session, job, JobState.FAILED, code=code, detail=detail)
    _note_lost_hand_off(session, job, gone)
    audit.append_of_attempt(session, EventName.JOB_STATE_FAILED, job, actor=jobs.SWEEPER, **facts)
    return job


def _note_lost_hand_off(session: Session, job: Job, gone: Mapping[int, int]) -> None:
    audit.append_of_attempt(
        session, EventName.JOB_HAND_OFF_LOST, job, actor=jobs.SWEEPER, indexes=sorted(gone)
    )


def _held(session: Session, lease: Lease) -> Job:
    """Lock and return the job's row if it is still this attempt's. Raises LeaseLost."""
    is_its = (
        Job.attempt == lease.attempt,
        Job.worker == lease.worker,
        Job.state == JobState.RUNNING,
    )
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id, *is_its).with_for_update(),
        execution_options=AFRESH,
    )
    if job is None:
        raise LeaseLost(f"job {lease.job_id} is not attempt {lease.attempt}'s any more")
    return job


def _count(
    session: Session, job: Job, outcome: Outcome, *, detail: str, max_attempts: int, actor: str
) -> Job:
    jobs.end_attempt(session, job, outcome, error=detail)
    job.counted_attempts += 1
    facts = {"counted_attempts": job.counted_attempts, "outcome": outcome.value}
    if job.counted_attempts >= max_attempts:
        code = FailureCode.ATTEMPTS_EXHAUSTED
        facts |= jobs.finish(session, job, JobState.FAILED, code=code, detail=detail)
        event = EventName.JOB_STATE_FAILED
        facts["code"] = code
    else:
        jobs.requeue(job)
        was_lost = outcome is Outcome.LEASE_LOST
        event = EventName.JOB_LEASE_EXPIRED if was_lost else EventName.JOB_ATTEMPT_FAILED
    audit.append_of_attempt(session, event, job, actor=actor, **facts)
    return job


def _add_to_record(attempt: Attempt, rendered: RenderedWork) -> None:
    steps = attempt.steps + rendered.steps
    rows = attempt.mean_rows * attempt.steps + rendered.mean_rows * rendered.steps
    attempt.mean_rows = rows / max(1, steps)
    attempt.steps = steps
    attempt.shared_steps += rendered.shared_steps
    attempt.max_rows = max(attempt.max_rows, rendered.max_rows)
    attempt.max_images = max(attempt.max_images, rendered.max_images)
    attempt.bucket_rows = rendered.bucket_rows
    attempt.device_seconds += rendered.device_seconds
    attempt.encode_s += rendered.encode_s
    attempt.denoise_s += rendered.denoise_s
    attempt.decode_s += rendered.decode_s
    attempt.padding_s += rendered.padding_s
    attempt.waited_s = max(attempt.waited_s, rendered.waited_s)
    attempt.fingerprint = rendered.fingerprint
    attempt.fingerprint_facts = rendered.fingerprint_facts
