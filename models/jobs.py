"""Move a job through its life: accepted, canceled, failed, expired, stored.

Leases and releases have modules of their own. Every arrow of DESIGN section 3 is a function here or
in `leases`, fenced where a worker is the caller, with its audit event in the same transaction.
Callers commit.
"""

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session, defer, selectinload

from models import accepting, audit, flows, inputs, uploads, usage, webhooks
from models.accepting import NewJob
from models.audit_events import EventName
from models.database import AFRESH
from models.tables import Artifact, Attempt, Image, Job
from policy.cost import pool_cost, price
from policy.failures import FailureCode
from policy.fleet import Fleet
from policy.params import params_of
from policy.states import ACTIVE_STATES, FINAL_STATES, TAKEN_BACK, ImageState, JobState, Outcome
from policy.steps import image_steps
from policy.webhooks import event_of

SWEEPER = "sweeper"

# Query options for processes that may not read what tenants wrote (migrations/roles.py): to touch
# such a column is an error.
WITHOUT_PROMPTS = (defer(Job.prompt, raiseload=True), defer(Job.negative_prompt, raiseload=True))
WITHOUT_TEXTS = (*WITHOUT_PROMPTS, defer(Job.tenant_metadata, raiseload=True))


class JobAlreadyFinished(Exception):
    """The job is in another final state; nothing was changed."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} is {job.state}")
        # Values, not the row: that is expired once its transaction is rolled back.
        self.job_id = job.id
        self.state = job.state


class JobErased(Exception):
    """The job was erased: there is nothing to make another one from."""


def accept(
    session: Session,
    new_job: NewJob,
    *,
    tenant_id: uuid.UUID,
    api_key_id: uuid.UUID | None,
    currency: str,
    actor: str,
) -> Job:
    """Accept one job (`models.accepting` does any number); return it with its images, no attempts.

    Raises JobErased, FileGone.
    """
    if new_job.replay_of is not None:
        lock_against_erasure(session, new_job.replay_of)
    (row,) = accepting.accept(
        session,
        [new_job],
        tenant_id=tenant_id,
        api_key_id=api_key_id,
        currency=currency,
        actor=actor,
    )
    return session.scalars(
        select(Job).where(Job.id == row.id).options(*with_images_and_attempts())
    ).one()


def find(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID) -> Job | None:
    """Find the tenant's job with its images, attempts and artifacts.

    None also for another tenant's job, for existence is private.
    """
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id)
        .options(*with_images_and_attempts())
    )


def find_without_prompts(
    session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID
) -> Job | None:
    """Find the job as `find` does, for a process that may not read prompts."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id)
        .options(*with_images_and_attempts(), *WITHOUT_PROMPTS)
    )


def find_without_texts(session: Session, job_id: uuid.UUID) -> Job | None:
    """Read the job's row, whatever its tenant, without the text that its tenant wrote."""
    return session.get(Job, job_id, options=WITHOUT_TEXTS)


def find_with_images(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID) -> Job | None:
    """Find the tenant's job with its images, but without artifacts and attempts."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id)
        .options(selectinload(Job.images))
    )


def state_of(session: Session, job_id: uuid.UUID) -> str | None:
    return session.scalar(select(Job.state).where(Job.id == job_id))


def ended_among(session: Session, job_ids: Collection[uuid.UUID]) -> Sequence[uuid.UUID]:
    """Return those of the jobs that are in a final state."""
    return session.scalars(
        select(Job.id).where(Job.id.in_(job_ids), Job.state.in_(FINAL_STATES))
    ).all()


def rendered_facts(session: Session, job_id: uuid.UUID) -> dict[str, Any]:
    """Return the facts of the newest fingerprint of the job's images; {} if none was rendered."""
    facts = session.scalar(
        select(Attempt.fingerprint_facts)
        .where(Attempt.job_id == job_id, Attempt.fingerprint_facts.is_not(None))
        .order_by(Attempt.attempt.desc())
        .limit(1)
    )
    return facts or {}


def cancel(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str) -> Job | None:
    """Cancel the job; None if the tenant has no such job.

    Harmless when repeated. Raises JobAlreadyFinished if it ended otherwise.
    """
    job = lock(session, job_id, tenant_id=tenant_id)
    if job is None or job.state == JobState.CANCELED:
        return job
    if job.state not in ACTIVE_STATES:
        raise JobAlreadyFinished(job)
    cancel_locked(session, job, actor=actor)
    session.refresh(job)
    return job


def lock(
    session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, options: Sequence[Any] = ()
) -> Job | None:
    """Find the job as `find` does, and lock its row until commit.

    options: query options, of what is to be left out.
    """
    query = select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)
    return session.scalar(
        query.with_for_update().options(*with_images_and_attempts(), *options),
        execution_options=AFRESH,
    )


def cancel_locked(session: Session, job: Job, *, actor: str) -> None:
    """Cancel an active job that the caller has locked."""
    was = job.state
    if was == JobState.RUNNING:
        end_attempt(session, job, Outcome.CANCELED)
    bill = finish(session, job, JobState.CANCELED)
    audit.append_of_attempt(
        session, EventName.JOB_STATE_CANCELED, job, actor=actor, was=was, **bill
    )


def abandon(session: Session, job: Job, steps_done: Mapping[int, int], *, actor: str) -> None:
    """Book work on images of a canceled job that was not known when it was canceled.

    The caller has locked the job. steps_done: how far each image had come, by index. Nothing is
    booked for images that are stored, or steps that are in the row already.
    """
    rows = session.scalars(
        select(Image).where(Image.job_id == job.id, Image.state != ImageState.STORED)
    ).all()
    before = _sum_steps_done(job, rows)
    for row in rows:
        row.steps_done = max(row.steps_done, min(steps_done.get(row.index, 0), image_steps(job)))
    steps = _sum_steps_done(job, rows) - before
    if not steps:
        return
    shares = _shares(job)
    amount = shares.of_steps(before + steps) - shares.of_steps(before)
    session.flush()
    usage.abandon(session, amount, tenant_id=job.tenant_id, day=job.usage_day)
    facts = {"steps": steps, "abandoned": str(amount)}
    audit.append_of_attempt(session, EventName.JOB_WORK_ABANDONED, job, actor=actor, **facts)


def expire(session: Session, job_id: uuid.UUID) -> Job | None:
    """End a job that nothing started before its deadline; None if it was started meanwhile."""
    job = session.scalar(
        select(Job)
        .where(
            Job.id == job_id,
            Job.state == JobState.QUEUED,
            Job.attempt == 0,
            inputs.start_deadline() < func.clock_timestamp(),
        )
        .options(*WITHOUT_TEXTS)
        .with_for_update(skip_locked=True),
        execution_options=AFRESH,
    )
    if job is not None:
        finish(session, job, JobState.EXPIRED)
        audit.append(
            session, EventName.JOB_STATE_EXPIRED, chain=job.tenant_id, actor=SWEEPER, job_id=job.id
        )
    return job


def fail_past_deadline(session: Session, job_id: uuid.UUID) -> Job | None:
    """Fail a job that waits again after an earlier attempt and is past its run deadline.

    None if a worker took it meanwhile.
    """
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, Job.run_by < func.clock_timestamp())
        .options(*WITHOUT_TEXTS)
        .with_for_update(skip_locked=True),
        execution_options=AFRESH,
    )
    if job is not None:
        detail = f"not rendered within {job.run_within_s:g} s of its start"
        _fail_queued(session, job, FailureCode.RUN_DEADLINE, detail)
    return job


def fail_gone(session: Session, job_id: uuid.UUID, *, code: FailureCode, detail: str) -> Job | None:
    """Fail a queued job of which something is no longer offered; None if it was taken.

    code, detail: what is not.
    """
    job = _queued(session, job_id)
    if job is not None:
        _fail_queued(session, job, code, detail)
    return job


def _fail_queued(session: Session, job: Job, code: FailureCode, detail: str) -> None:
    """Fail a job that waits and is locked, with its audit event."""
    facts = {"code": code} | finish(session, job, JobState.FAILED, code=code, detail=detail)
    audit.append(
        session,
        EventName.JOB_STATE_FAILED,
        chain=job.tenant_id,
        actor=SWEEPER,
        job_id=job.id,
        **facts,
    )


def move(session: Session, job_id: uuid.UUID, pool: str) -> Job | None:
    """Put a queued job into another pool, at the end of its tenant's line; None if it was taken."""
    job = _queued(session, job_id)
    if job is not None:
        left = job.pool
        enter_pool(session, job, pool)
        note_pool_change(session, job, left=left, actor=SWEEPER)
    return job


def enter_pool(session: Session, job: Job, pool: str, *, release_tag: float | None = None) -> None:
    """Have a job that is locked, and queued by now, wait in another pool.

    release_tag: its start tag there; None: at the end of its tenant's line. The caller appends the
    audit event.
    """
    job.pool = pool
    job.pool_since = func.clock_timestamp()
    job.announced_at = None
    job.is_front = False
    if release_tag is not None:
        job.release_tag = release_tag
    session.flush()  # the triggers `flows_count_…` count it there
    if release_tag is None:
        job.release_tag = flows.line_up(
            session,
            pool=pool,
            tier=job.tier,
            tenant_id=job.tenant_id,
            cost_s=job.predicted_s,
        )


def note_pool_change(session: Session, job: Job, *, left: str, actor: str) -> None:
    """Append the audit event of a job that waits in another pool than `left` now."""
    audit.append(
        session,
        EventName.JOB_POOL_CHANGED,
        chain=job.tenant_id,
        actor=actor,
        job_id=job.id,
        left=left,
        pool=job.pool,
    )


def _queued(session: Session, job_id: uuid.UUID) -> Job | None:
    """Lock a job that waits; None if it does not, or somebody else has it."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED)
        .options(*WITHOUT_TEXTS)
        .with_for_update(skip_locked=True),
        execution_options=AFRESH,
    )


class Route(NamedTuple):
    """The pool for which a job is accepted, and by which revision of the fleet (None: a file)."""

    pool: str
    fleet_revision: int | None


def _route_of(job: Job) -> Route:
    return Route(job.pool, job.fleet_revision)


def requeue_dead(
    session: Session,
    job_id: uuid.UUID,
    *,
    start_within_s: float,
    actor: str,
    route: Callable[[Job], Route] = _route_of,
) -> Job | None:
    """Accept a failed job's parameters again, as a new job: a final state stays final.

    route: chooses the pool for it, and may raise; by default that of the failed job. None if there
    is no such job. Raises JobAlreadyFinished when it was requeued before.
    """
    conditions = (Job.id == job_id, Job.state == JobState.FAILED, Job.erased_at.is_(None))
    query = select(Job).where(*conditions)
    dead = session.scalar(query.with_for_update(), execution_options=AFRESH)
    if dead is None:
        return None
    if session.scalar(select(Job.id).where(Job.requeue_of == job_id)) is not None:
        raise JobAlreadyFinished(dead)
    return accept(
        session,
        _copy_of(dead, start_within_s, route(dead)),
        tenant_id=dead.tenant_id,
        api_key_id=dead.api_key_id,
        currency=dead.currency,
        actor=actor,
    )


def _copy_of(dead: Job, start_within_s: float, route: Route) -> NewJob:
    return NewJob(
        params=replace(params_of(dead), pool=route.pool),
        start_within_s=start_within_s,
        run_within_s=dead.run_within_s,
        predicted_s=dead.predicted_s,
        megapixel_steps=dead.megapixel_steps,
        steps_per_image=dead.steps_per_image,
        tenant_metadata=dead.tenant_metadata,
        fleet_revision=route.fleet_revision,
        requeue_of=dead.id,
    )


def store(
    session: Session,
    *,
    job_id: uuid.UUID,
    index: int,
    attempt: int,
    artifact: Mapping[str, Any],
    fleet: Fleet,
    store_within_s: float,
    actor: str,
) -> Job | None:
    """Record an uploaded image and what the job costs by now; with its last image the job succeeds.

    All in one transaction. artifact: columns of Artifact from `object_key` to `content_sha256`.
    fleet: says what device time costs.  None, and nothing is written, if the image is stored
    already, belongs to another attempt, or the job ended otherwise.
    """
    job = session.get(Job, job_id, with_for_update=True, options=WITHOUT_TEXTS)
    image = session.get(Image, (job_id, index))
    # Active includes queued: its lease may have been lost after this hand-off.
    if job is None or image is None or job.state not in ACTIVE_STATES:
        return None
    if image.state != ImageState.HANDED_OFF or image.handed_off_attempt != attempt:
        return None
    row = _record_artifact(session, job, image, artifact)
    session.flush()
    job.cost = price(fleet, tier=job.tier, cost=_device_cost(session, job, fleet))
    unstored = (Image.job_id == job_id, Image.state != ImageState.STORED)
    is_last = not session.scalar(select(func.count()).where(*unstored))
    if is_last:
        finish(session, job, JobState.SUCCEEDED)
    elif job.state == JobState.STORING:
        job.store_by = func.clock_timestamp() + timedelta(seconds=store_within_s)
    _append_stored(session, row, attempt=attempt, actor=actor)
    if is_last:
        _append_succeeded(session, job, attempt=attempt, actor=actor)
    return job


def _record_artifact(
    session: Session, job: Job, image: Image, artifact: Mapping[str, Any]
) -> Artifact:
    """Write what was stored of the image, and add its device time to the job's."""
    row = Artifact(tenant_id=job.tenant_id, job_id=job.id, index=image.index, **artifact)
    session.add(row)
    uploads.end(session, row.object_key)
    session.flush()
    image.state = ImageState.STORED
    image.artifact_id = row.id
    job.device_seconds += image.device_seconds
    return row


def _device_cost(session: Session, job: Job, fleet: Fleet) -> Decimal:
    """Add up what the stored images cost: by the terms of their workers, or as the pool says."""
    is_untold = Image.device_cost.is_(None)
    columns = (
        func.sum(Image.device_cost),
        func.coalesce(func.sum(Image.device_seconds).filter(is_untold), 0.0),
    )
    is_stored = (Image.job_id == job.id, Image.state == ImageState.STORED)
    told, untold_s = session.execute(select(*columns).where(*is_stored)).one()
    return (told or Decimal(0)) + pool_cost(fleet, job.pool, untold_s)


def _append_stored(session: Session, row: Artifact, *, attempt: int, actor: str) -> None:
    audit.append(
        session,
        EventName.JOB_IMAGE_STORED,
        chain=row.tenant_id,
        actor=actor,
        job_id=row.job_id,
        attempt=attempt,
        index=row.index,
        artifact_id=str(row.id),
        pixels_sha256=row.pixels_sha256,
        content_sha256=row.content_sha256,
    )


def _append_succeeded(session: Session, job: Job, *, attempt: int, actor: str) -> None:
    audit.append(
        session,
        EventName.JOB_STATE_SUCCEEDED,
        chain=job.tenant_id,
        actor=actor,
        job_id=job.id,
        attempt=attempt,
        device_seconds=job.device_seconds,
        cost=str(job.cost),
        currency=job.currency,
    )


def handed_off(session: Session, job_id: uuid.UUID) -> dict[int, int]:
    """Read the images whose pixels wait in the hand-off: attempt by index."""
    query = select(Image.index, Image.handed_off_attempt).where(
        Image.job_id == job_id, Image.state == ImageState.HANDED_OFF
    )
    return {
        index: attempt
        for index, attempt in session.execute(query.order_by(Image.index))
        if attempt is not None
    }


def finish(
    session: Session,
    job: Job,
    state: JobState,
    *,
    code: FailureCode | None = None,
    detail: str | None = None,
) -> dict[str, Any]:
    """Set a final state and settle everything that hangs on the job.

    Drops every claim on the job, charges its flow what it really took, settles its entry in the
    ledger and writes the deliveries of its webhooks. The caller appends the audit event, with the
    facts that are returned: the amounts that a job came to without succeeding, if any.
    """
    job.state = state
    job.has_just_ended = True
    job.finished_at = func.clock_timestamp()
    job.lease_expires_at = job.announced_at = job.store_by = None
    job.failure_code = code
    job.failure_detail = detail
    session.flush()
    _settle_flow(session, job, state)
    stored, steps = (
        _count_results(session, job) if state != JobState.SUCCEEDED else (job.num_images, 0)
    )
    booking = _booking(job, state, num_stored=stored, steps=steps)
    usage.settle(session, booking, tenant_id=job.tenant_id, day=job.usage_day)
    webhooks.note(session, job, event_of(state))
    if booking.succeeded or not (stored or booking.abandoned):
        return {}
    return {
        "images_stored": stored,
        "settled": str(booking.settled),
        "abandoned": str(booking.abandoned),
        "cost": str(booking.cost),
        "currency": job.currency,
    }


def _settle_flow(session: Session, job: Job, state: JobState) -> None:
    """Charge the job's flow what it took.

    A job that was started and did not succeed is charged what was predicted.
    """
    if state == JobState.SUCCEEDED or job.attempt == 0:
        actual_s = job.device_seconds if state == JobState.SUCCEEDED else 0.0
        difference_s = actual_s - job.predicted_s
        flows.settle(
            session,
            pool=job.pool,
            tier=job.tier,
            tenant_id=job.tenant_id,
            difference_s=difference_s,
        )


def _booking(job: Job, state: JobState, *, num_stored: int, steps: int) -> usage.Booking:
    """Return what the ledger is told. steps: noted of images that are not stored."""
    shares = _shares(job)
    return usage.Booking(
        reserved=job.megapixel_steps,
        settled=shares.of_images(num_stored),
        abandoned=shares.of_steps(steps) if state in TAKEN_BACK else Decimal(0),
        cost=job.cost or Decimal(0),
        succeeded=state == JobState.SUCCEEDED,
    )


def _shares(job: Job) -> usage.Shares:
    return usage.Shares(job.megapixel_steps, job.num_images, image_steps(job))


def _sum_steps_done(job: Job, images: Sequence[Image]) -> int:
    """Add up the denoise steps of images that are not stored.

    Of each no more than the job was counted for.
    """
    return sum(min(image.steps_done, image_steps(job)) for image in images)


def _count_results(session: Session, job: Job) -> tuple[int, int]:
    """Count the job's stored images, and the denoise steps noted of the others."""
    if job.attempt == 0:
        return 0, 0
    is_stored = Image.state == ImageState.STORED
    # A pipeline may make more steps than were counted.
    counted = func.least(Image.steps_done, image_steps(job))
    sums = (func.count().filter(is_stored), func.coalesce(func.sum(counted).filter(~is_stored), 0))
    stored, steps = session.execute(select(*sums).where(Image.job_id == job.id)).one()
    return stored, steps


def requeue(job: Job) -> None:
    """Put the job back among the waiting ones, with its place: `release_tag` is not touched.

    The caller appends the audit event.
    """
    job.state = JobState.QUEUED
    job.is_front = False
    job.lease_expires_at = job.announced_at = job.store_by = job.worker = job.rendered_at = None


def lock_against_erasure(session: Session, job_id: uuid.UUID) -> None:
    """Keep the job from being erased until commit; other changes of it are not blocked.

    Raises JobErased.
    """
    query = select(Job.erased_at).where(Job.id == job_id).with_for_update(read=True, key_share=True)
    row = session.execute(query).one_or_none()
    if row is None or row.erased_at is not None:  # without a row: it was pruned
        raise JobErased


def end_attempt(session: Session, job: Job, outcome: Outcome, *, error: str | None = None) -> None:
    """Close the record of the job's current attempt."""
    attempt = session.get(Attempt, (job.id, job.attempt))
    if attempt is None or attempt.ended_at is not None:
        return
    attempt.outcome = outcome
    attempt.ended_at = func.clock_timestamp()
    attempt.error = error
    if outcome in (Outcome.RENDERED, Outcome.PREEMPTED, Outcome.RETURNED):
        attempt.unfinished_s = 0.0  # of others their worker tells, if it lives
    if outcome is not Outcome.RENDERED:
        attempt.waste_class = outcome.value


def with_images_and_attempts() -> tuple[Any, ...]:
    """Return query options that load jobs with their images, artifacts and attempts."""
    return (selectinload(Job.images).selectinload(Image.artifact), selectinload(Job.attempts))
