"""From a wish to an accepted job: resolve, ask whether it can be served, write it, let it out. Every way in leads through here."""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.auth import caller
from app.body import invalid_wish
from app.gateway import gateway
from app.idempotency import HEADER
from app.outlook import Expected, QueuePlace, WayOut
from app.problems import FleetSaturated, IdempotencyKeyReused, ModelUnserved, Problem, TenantQueueFull
from edges import telemetry
from models import accepting, idempotency, jobs, releasing
from models.accepting import AcceptedRow, NewJob
from models.database import transaction
from models.idempotency import Answer, Once
from models.states import ImageState, JobState
from models.tables import Image, Job
from policy.admission import Refusal
from policy.catalog import InvalidWish, Resolved, Wish
from policy.cost import megapixel_steps

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Accepted:
    """The job that a request came to. Not new: the same request came before, under the same key. place: where a new one stands."""

    job: Job
    is_new: bool
    place: QueuePlace | None = None


def resolve(wish: Wish) -> Resolved:
    """Every parameter of the wish. Raises InvalidImageRequest, which names the field."""
    try:
        return gateway().resolve(wish)
    except InvalidWish as error:
        raise invalid_wish(error) from None


def accept(
    resolved: Resolved,
    *,
    metadata: Mapping[str, str] | None = None,
    start_within_s: float | None = None,
    replay_of: uuid.UUID | None = None,
    once: Once | None = None,
) -> Accepted:
    """Write the job, complete with its images, and announce it if there is room.

    metadata: the tenant's own.  start_within_s: its start deadline; None, or longer than the tier's own, is the tier's.  replay_of: the job
    whose parameters these are.  once: the key it comes under; if it came before, the job of then is the answer, as it is now, whatever
    could be served now. Raises the Problem of a job that cannot be served now.
    """
    if once is not None and (earlier := answered(once)) is not None:
        return earlier
    parts, tenant_id = gateway(), caller().tenant_id
    tier = parts.fleet.tiers[resolved.tier]
    deadline_s = _deadline_s(start_within_s, tier.start_within_s)
    expected = expect(resolved)
    if expected.refusal is not None:
        raise refused(expected.refusal)
    way_out, room = parts.lookout.way_out(resolved, tenant_id)
    new_job = NewJob(
        params=vars(resolved),
        start_within_s=deadline_s,
        run_within_s=tier.run_within_s,
        predicted_s=expected.predicted_s,
        eta_raw_s=expected.eta_raw_s,
        megapixel_steps=megapixel_steps(parts.fleet, resolved),
        labels=metadata,
        replay_of=replay_of,
    )
    try:
        with transaction(parts.database) as session:
            if once is not None:
                idempotency.claim(session, once, tenant_id=tenant_id)
            if way_out is WayOut.AT_ONCE:
                of_it = {"pool": resolved.pool, "tier": resolved.tier, "tenant_id": tenant_id, "num_images": resolved.num_images}
                new_job = replace(new_job, announced=releasing.may_pass_at_once(session, room=room, **of_it))
            row = _write(session, new_job)
            if once is not None:
                idempotency.fulfil(session, once, tenant_id=tenant_id, job_id=row.id)
    except idempotency.AlreadyAnswered as error:  # meanwhile, by another request
        return Accepted(_job_of(error.answer), is_new=False)
    except idempotency.KeyReused:
        raise _reused() from None
    telemetry.JOBS_ACCEPTED.labels(resolved.tier, resolved.model).inc()
    log.info("job_accepted", job_id=str(row.id), tier=resolved.tier, model=resolved.model)
    if new_job.announced:
        parts.release.announce(resolved.pool, resolved.tier, row.id)
    elif way_out is not WayOut.IN_TURN:
        let_out(row.id, resolved.pool, resolved.tier)
    return Accepted(_as_written(new_job, row), is_new=True, place=expected.place)


def _write(session: Session, new_job: NewJob) -> AcceptedRow:
    asking, currency = caller(), gateway().fleet.currency
    of_caller = {"tenant_id": asking.tenant_id, "api_key_id": asking.api_key_id, "actor": asking.actor}
    return accepting.accept(session, [new_job], currency=currency, **of_caller)[0]


def _as_written(new_job: NewJob, row: AcceptedRow) -> Job:
    """The job as it stands in the database, without asking again: what a view shows of one that has just been accepted."""
    job = Job(id=row.id, tenant_id=caller().tenant_id, state=JobState.QUEUED, attempt=0, device_seconds=0.0, **new_job.params)
    job.accepted_at, job.start_by, job.release_tag = row.accepted_at, row.start_by, row.release_tag
    job.predicted_s, job.megapixel_steps, job.labels = new_job.predicted_s, new_job.megapixel_steps, dict(new_job.labels or {})
    job.replay_of = new_job.replay_of
    seed, images = new_job.params["seed"], range(new_job.params["num_images"])
    job.images = [Image(index=index, seed=seed + index, state=ImageState.PENDING, artifact=None) for index in images]
    return job


def answered(once: Once) -> Accepted | None:
    """The job that the same request came to before, as it is now; None if it is new. Raises IdempotencyKeyReused."""
    try:
        with transaction(gateway().database) as session:
            answer = idempotency.look_up(session, once, tenant_id=caller().tenant_id)
    except idempotency.KeyReused:
        raise _reused() from None
    return Accepted(_job_of(answer), is_new=False) if answer is not None else None


def expect(resolved: Resolved) -> Expected:
    """What a job of the caller's would take, and whether it would be refused now."""
    return gateway().lookout.expect(resolved, caller().tenant_id)


def refused(refusal: Refusal) -> Problem:
    """The problem of a wish that could be served at another time."""
    telemetry.SHED.labels(refusal.reason).inc()
    kinds: dict[str, type[Problem]] = {"unserved": ModelUnserved, "tenant_queue_full": TenantQueueFull}
    kind = kinds.get(refusal.reason, FleetSaturated)
    return kind(refusal.detail, retry_after_s=refusal.retry_after_s, reason=refusal.reason)


def let_out(job_id: uuid.UUID, pool: str, tier: str) -> None:
    """Announce what there is room for, now that the row is committed. The job is accepted whatever happens here: the sweeper
    covers a crash, a broker or a database that goes away between the two."""
    try:
        gateway().release.release(pool, tier, tenant_id=caller().tenant_id)
    except SQLAlchemyError as error:
        log.warning("release_postponed", job_id=str(job_id), reason=type(error).__name__)


def _job_of(answer: Answer) -> Job:
    with transaction(gateway().database) as session:
        job = jobs.find(session, answer.job_id, tenant_id=caller().tenant_id) if answer.job_id else None
    if job is None:
        raise _reused()
    return job


def _reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused("This Idempotency-Key came with another request within the last day.", header=HEADER)


def _deadline_s(asked_s: float | None, longest_s: float) -> float:
    if asked_s is None:
        return longest_s
    if not (math.isfinite(asked_s) and 0 < asked_s <= longest_s):
        accepted = {"min": 0, "max": longest_s}
        raise invalid_wish(InvalidWish("start_deadline_s", f"must be more than 0 and at most {longest_s} seconds", accepted))
    return asked_s
