"""The life of a job: accepted, canceled, failed, expired, stored. Leases and releases have modules of their own.

Every arrow of DESIGN section 3 is a function here or in `leases`, fenced where a worker is the caller, with its audit
event in the same transaction. Callers commit.
"""

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, defer, selectinload

from models import accepting, audit, flows, idempotency, inputs, uploads, usage, webhooks
from models.accepting import NewJob
from models.audit_events import EventName
from models.database import AFRESH
from models.idempotency import Once
from models.tables import Artifact, Attempt, Image, Job
from policy.cost import price
from policy.failures import FailureCode
from policy.fleet import Fleet
from policy.params import Resolved, params_of
from policy.states import ACTIVE_STATES, FINAL_STATES, TAKEN_BACK, ImageState, JobState, Outcome
from policy.steps import image_steps
from policy.webhooks import event_of

SWEEPER = "sweeper"

# Options of a query for jobs by who may not read what tenants wrote (migrations/roles.py): to touch it is an error.
WITHOUT_PROMPTS = (defer(Job.prompt, raiseload=True), defer(Job.negative_prompt, raiseload=True))
WITHOUT_WORDS = (*WITHOUT_PROMPTS, defer(Job.tenant_metadata, raiseload=True))


class JobAlreadyFinished(Exception):
    """The job is in another final state; nothing was changed."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} is {job.state}")
        # Values, for the row is expired once its transaction is rolled back.
        self.job_id, self.state = (
            job.id,
            job.state,
        )


class NothingLeft(Exception):
    """The job was erased: there is nothing to make another one from."""


def accept(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    api_key_id: uuid.UUID | None,
    params: Resolved,
    start_within_s: float,
    currency: str,
    actor: str,
    run_within_s: float | None = None,
    predicted_s: float = 0.0,
    eta_raw_s: float | None = None,
    megapixel_steps: Decimal = Decimal(0),
    steps_per_image: int | None = None,
    tenant_metadata: Mapping[str, str] | None = None,
    requeue_of: uuid.UUID | None = None,
    replay_of: uuid.UUID | None = None,
    once: Once | None = None,
) -> Job:
    """Accept one job (`models.accepting` does any number) and read it back, with its images and no attempts.

    once: the key it comes under; raises AlreadyAnswered or KeyReused if it came before.  Raises NothingLeft, FileGone.
    """
    if once is not None:
        idempotency.claim(session, once, tenant_id=tenant_id)
    if replay_of is not None:
        hold(session, replay_of)
    new_job = NewJob(
        params=params,
        start_within_s=start_within_s,
        run_within_s=run_within_s,
        predicted_s=predicted_s,
        eta_raw_s=eta_raw_s,
        megapixel_steps=megapixel_steps,
        steps_per_image=steps_per_image,
        tenant_metadata=tenant_metadata,
        requeue_of=requeue_of,
        replay_of=replay_of,
    )
    (row,) = accepting.accept(
        session,
        [new_job],
        tenant_id=tenant_id,
        api_key_id=api_key_id,
        currency=currency,
        actor=actor,
    )
    if once is not None:
        idempotency.fulfil(session, once, tenant_id=tenant_id, job_id=row.id)
    return session.scalars(select(Job).where(Job.id == row.id).options(*whole())).one()


def find(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID) -> Job | None:
    """The tenant's job with its images, attempts and artifacts; None also for another tenant's, for existence is private."""
    return session.scalar(
        select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id).options(*whole())
    )


def find_without_prompts(
    session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID
) -> Job | None:
    """The same for who tells of a job: its prompts are not even asked for."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id)
        .options(*whole(), *WITHOUT_PROMPTS)
    )


def without_words(session: Session, job_id: uuid.UUID) -> Job | None:
    """The job's row, of whatever tenant, without what the tenant wrote."""
    return session.get(Job, job_id, options=WITHOUT_WORDS)


def glance(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID) -> Job | None:
    """The tenant's job and its images, without what came of them."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id)
        .options(selectinload(Job.images))
    )


def state_of(session: Session, job_id: uuid.UUID) -> str | None:
    return session.scalar(select(Job.state).where(Job.id == job_id))


def ended_among(session: Session, job_ids: Collection[uuid.UUID]) -> Sequence[uuid.UUID]:
    """Those of the jobs that are in a final state."""
    return session.scalars(
        select(Job.id).where(Job.id.in_(job_ids), Job.state.in_(FINAL_STATES))
    ).all()


def cancel(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str) -> Job | None:
    """Take the job back; None if the tenant has no such job. Harmless when repeated; JobAlreadyFinished if it ended otherwise."""
    job = lock(session, job_id, tenant_id=tenant_id)
    if job is None or job.state == JobState.CANCELED:
        return job
    if job.state not in ACTIVE_STATES:
        raise JobAlreadyFinished(job)
    take_back(session, job, actor=actor)
    session.refresh(job)
    return job


def lock(
    session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, options: Sequence[Any] = ()
) -> Job | None:
    """The tenant's job, whole as `find` gives it, and nobody else's to change until commit. options: what of it is left out."""
    is_it = select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)
    return session.scalar(
        is_it.with_for_update().options(*whole(), *options), execution_options=AFRESH
    )


def take_back(session: Session, job: Job, *, actor: str) -> None:
    """End an active job, which the caller locked, that its tenant does not want any more."""
    was = job.state
    if was == JobState.RUNNING:
        end_attempt(session, job, Outcome.CANCELED)
    bill = finish(session, job, JobState.CANCELED)
    audit.append_of_attempt(
        session, EventName.JOB_STATE_CANCELED, job, actor=actor, was=was, **bill
    )


def abandon(session: Session, job: Job, steps_done: Mapping[int, int], *, actor: str) -> None:
    """Book the work on images of a canceled job, which the caller locked, that was not known of when it was canceled.

    steps_done: how far each had come, by index. Nothing for what is stored, or is in the row already.
    """
    rows = session.scalars(
        select(Image).where(Image.job_id == job.id, Image.state != ImageState.STORED)
    ).all()
    before = _counted(job, rows)
    for row in rows:
        row.steps_done = max(row.steps_done, min(steps_done.get(row.index, 0), image_steps(job)))
    steps = _counted(job, rows) - before
    if not steps:
        return
    shares = _shares(job)
    amount = shares.of_steps(before + steps) - shares.of_steps(before)
    session.flush()
    usage.abandon(session, amount, tenant_id=job.tenant_id, day=job.usage_day)
    facts = {"steps": steps, "abandoned": str(amount)}
    audit.append_of_attempt(session, EventName.JOB_WORK_ABANDONED, job, actor=actor, **facts)


def expire(session: Session, job_id: uuid.UUID) -> Job | None:
    """End a job that nothing started before its deadline; None if something did meanwhile."""
    job = session.scalar(
        select(Job)
        .where(
            Job.id == job_id,
            Job.state == JobState.QUEUED,
            Job.attempt == 0,
            inputs.start_deadline() < func.clock_timestamp(),
        )
        .options(*WITHOUT_WORDS)
        .with_for_update(skip_locked=True),
        execution_options=AFRESH,
    )
    if job is not None:
        finish(session, job, JobState.EXPIRED)
        audit.append(
            session, EventName.JOB_STATE_EXPIRED, chain=job.tenant_id, actor=SWEEPER, job_id=job.id
        )
    return job


def overrun(session: Session, job_id: uuid.UUID) -> Job | None:
    """Fail a job that waits again, after an earlier attempt, and is past its run deadline; None if something took it meanwhile."""
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, Job.run_by < func.clock_timestamp())
        .options(*WITHOUT_WORDS)
        .with_for_update(skip_locked=True),
        execution_options=AFRESH,
    )
    if job is not None:
        detail = f"not rendered within {job.run_within_s:g} s of its start"
        facts = {"code": FailureCode.RUN_DEADLINE} | finish(
            session, job, JobState.FAILED, code=FailureCode.RUN_DEADLINE, detail=detail
        )
        audit.append(
            session,
            EventName.JOB_STATE_FAILED,
            chain=job.tenant_id,
            actor=SWEEPER,
            job_id=job.id,
            **facts,
        )
    return job


def requeue_dead(
    session: Session, job_id: uuid.UUID, *, start_within_s: float, actor: str
) -> Job | None:
    """Accept a failed job's wish again, as a job of its own: a final state stays final. None if there is no such job.

    Raises JobAlreadyFinished when it was requeued before.
    """
    is_it = (Job.id == job_id, Job.state == JobState.FAILED, Job.erased_at.is_(None))
    dead = session.scalar(select(Job).where(*is_it).with_for_update(), execution_options=AFRESH)
    if dead is None:
        return None
    if session.scalar(select(Job.id).where(Job.requeue_of == job_id)) is not None:
        raise JobAlreadyFinished(dead)
    return accept(
        session,
        tenant_id=dead.tenant_id,
        api_key_id=dead.api_key_id,
        params=params_of(dead),
        start_within_s=start_within_s,
        run_within_s=dead.run_within_s,
        predicted_s=dead.predicted_s,
        megapixel_steps=dead.megapixel_steps,
        steps_per_image=dead.steps_per_image,
        tenant_metadata=dead.tenant_metadata,
        currency=dead.currency,
        actor=actor,
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
    """Record an uploaded image, and what the job costs by now; with the last one it succeeds, in the same transaction.

    artifact: columns of Artifact from `object_key` to `content_sha256`.  fleet: says what device time costs.
    None, and nothing is written, if the image is stored already, belongs to another attempt, or the job ended otherwise.
    """
    job = session.get(Job, job_id, with_for_update=True, options=WITHOUT_WORDS)
    image = session.get(Image, (job_id, index))
    # Queued: its lease was lost after this hand-off.
    if job is None or image is None or job.state not in ACTIVE_STATES:
        return None
    if image.state != ImageState.HANDED_OFF or image.handed_off_attempt != attempt:
        return None
    row = Artifact(tenant_id=job.tenant_id, job_id=job_id, index=index, **artifact)
    session.add(row)
    uploads.end(session, row.object_key)
    session.flush()
    image.state, image.artifact_id = ImageState.STORED, row.id
    job.device_seconds += image.device_seconds
    job.cost = price(fleet, pool=job.pool, tier=job.tier, device_seconds=job.device_seconds)
    digests = {"pixels_sha256": row.pixels_sha256, "content_sha256": row.content_sha256}
    facts = {"index": index, "artifact_id": str(row.id), **digests}
    session.flush()
    remaining = session.scalar(
        select(func.count()).where(Image.job_id == job_id, Image.state != ImageState.STORED)
    )
    if remaining:
        if job.state == JobState.STORING:
            job.store_by = func.clock_timestamp() + timedelta(seconds=store_within_s)
        audit.append(
            session,
            EventName.JOB_IMAGE_STORED,
            chain=job.tenant_id,
            actor=actor,
            job_id=job_id,
            attempt=attempt,
            **facts,
        )
        return job
    finish(session, job, JobState.SUCCEEDED)
    audit.append(
        session,
        EventName.JOB_IMAGE_STORED,
        chain=job.tenant_id,
        actor=actor,
        job_id=job_id,
        attempt=attempt,
        **facts,
    )
    bill = {"device_seconds": job.device_seconds, "cost": str(job.cost), "currency": job.currency}
    audit.append(
        session,
        EventName.JOB_STATE_SUCCEEDED,
        chain=job.tenant_id,
        actor=actor,
        job_id=job_id,
        attempt=attempt,
        **bill,
    )
    return job


def handed_off(session: Session, job_id: uuid.UUID) -> dict[int, int]:
    """The images whose pixels wait in the hand-off: attempt by index."""
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
    """Set a final state, drop every claim on the job, charge its flow what it really took, settle its entry in the ledger and note the
    webhooks that are to tell of it. The caller appends the audit event, with the facts that are returned: what it came to if it came to
    anything without succeeding.
    """
    job.state, job.finished_at = state, func.clock_timestamp()
    job.lease_expires_at = job.announced_at = job.store_by = None
    job.failure_code, job.failure_detail = code, detail
    session.flush()
    # What began and came to nothing costs its place all the same.
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
    stored, steps = _came_to(session, job) if state != JobState.SUCCEEDED else (job.num_images, 0)
    shares = _shares(job)
    booking = usage.Booking(
        reserved=job.megapixel_steps,
        settled=shares.of_images(stored),
        abandoned=shares.of_steps(steps) if state in TAKEN_BACK else Decimal(0),
        cost=job.cost or Decimal(0),
        succeeded=state == JobState.SUCCEEDED,
    )
    usage.settle(session, booking, tenant_id=job.tenant_id, day=job.usage_day)
    webhooks.note(session, job, event_of(state))
    if booking.succeeded or not (stored or booking.abandoned):
        return {}
    in_words = {name: str(getattr(booking, name)) for name in ("settled", "abandoned", "cost")}
    return {"images_stored": stored, **in_words, "currency": job.currency}


def _shares(job: Job) -> usage.Shares:
    return usage.Shares(job.megapixel_steps, job.num_images, image_steps(job))


def _counted(job: Job, images: Sequence[Image]) -> int:
    """Add up the denoise steps of images that are not stored, of each no more than the job was counted for."""
    return sum(min(image.steps_done, image_steps(job)) for image in images)


def _came_to(session: Session, job: Job) -> tuple[int, int]:
    """How many of the job's images are stored, and the denoise steps that its rows know of the others."""
    if job.attempt == 0:
        return 0, 0
    is_stored = Image.state == ImageState.STORED
    # A pipeline may make more than was counted.
    counted = func.least(Image.steps_done, image_steps(job))
    sums = (func.count().filter(is_stored), func.coalesce(func.sum(counted).filter(~is_stored), 0))
    stored, steps = session.execute(select(*sums).where(Image.job_id == job.id)).one()
    return stored, steps


def requeue(job: Job) -> None:
    """Back to the waiting ones, with its place kept: `release_tag` is not touched. The caller appends the audit event."""
    job.state, job.is_front = JobState.QUEUED, False
    job.lease_expires_at = job.announced_at = job.store_by = job.worker = job.rendered_at = None


def hold(session: Session, job_id: uuid.UUID) -> None:
    """Keep the job from being erased until commit; others may go on with it."""
    query = select(Job.erased_at).where(Job.id == job_id).with_for_update(read=True, key_share=True)
    row = session.execute(query).one_or_none()
    if row is None or row.erased_at is not None:  # without a row: it was pruned
        raise NothingLeft


def end_attempt(session: Session, job: Job, outcome: Outcome, *, error: str | None = None) -> None:
    """Close the record of the job's current attempt."""
    attempt = session.get(Attempt, (job.id, job.attempt))
    if attempt is None or attempt.ended_at is not None:
        return
    attempt.outcome, attempt.ended_at, attempt.error = outcome, func.clock_timestamp(), error
    if outcome is not Outcome.RENDERED:
        attempt.waste_class = outcome.value


def whole() -> tuple[Any, ...]:
    """Options of a query for jobs: with their images, artifacts and attempts."""
    return (selectinload(Job.images).selectinload(Image.artifact), selectinload(Job.attempts))
