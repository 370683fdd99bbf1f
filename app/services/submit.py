"""From a wish to an accepted job: resolve, ask whether it can be served, write it, let it out. Every way in leads through here."""

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.documents import JobDocument, of_accepted, of_row
from app.http.body import invalid_wish
from app.http.context import caller, runtime
from app.http.idempotency import HEADER
from app.live.forecast import Bookings, Expected, QueuePlace
from app.problems import (
    FleetSaturated,
    IdempotencyKeyReused,
    InvalidImageRequest,
    ModelUnserved,
    Problem,
    ReplayImpossible,
    TenantQueueFull,
)
from app.services import quotas
from app.services.inputs import Intake
from edges import telemetry
from models import accepting, idempotency, jobs, releasing
from models.accepting import AcceptedRow, NewJob
from models.database import run_transaction, transaction
from models.files import FileGone
from models.idempotency import Answer, Once
from policy import warnings
from policy.admission import Refusal
from policy.catalog import InvalidWish
from policy.cost import megapixel_steps
from policy.params import PICTURES, Resolved, Wish
from policy.release import ReleaseHint, ReleaseLimits
from policy.steps import denoising_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Accepted:
    """The job that a request came to. Not new: the same request came before, under the same key. place: where a new one stands."""

    job: JobDocument
    is_new: bool
    place: QueuePlace | None = None


def resolve(wish: Wish) -> Resolved:
    """Every parameter of the wish. Raises InvalidImageRequest, which names the field, and Forbidden."""
    try:
        resolved = runtime().resolve(wish)
    except InvalidWish as error:
        raise invalid_wish(error) from None
    quotas.check_allowed(resolved)
    return resolved


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
        return Accepted(earlier, is_new=False)
    parts, tenant_id = runtime(), caller().tenant_id
    drafted, expected = draft(resolved, metadata=metadata, start_within_s=start_within_s, replay_of=replay_of)
    hint, release_limits = parts.forecaster.release_hint(resolved, tenant_id)

    def written(session: Session) -> tuple[NewJob, AcceptedRow]:
        new = drafted
        quotas.lock(session)
        if once is not None:
            idempotency.claim(session, once, tenant_id=tenant_id)
        if replay_of is not None:
            jobs.hold(session, replay_of)
        if hint is ReleaseHint.IMMEDIATE:
            new = replace(new, announced=_may_pass_at_once(session, resolved, release_limits))
        (row,) = write(session, [new])
        if once is not None:
            idempotency.fulfil(session, once, tenant_id=tenant_id, job_id=row.id)
        return new, row

    try:
        with quotas.charged(drafted.megapixel_steps):
            new, row = run_transaction(parts.database, written)
    except idempotency.AlreadyAnswered as error:  # meanwhile, by another request
        return Accepted(_job_of(error.answer), is_new=False)
    except idempotency.KeyReused:
        raise reused() from None
    except jobs.NothingLeft:
        raise ReplayImpossible("The job was erased: its parameters are gone.") from None
    except FileGone as error:  # since it was looked up, a moment ago
        if replay_of is not None:
            raise ReplayImpossible("A picture that the job starts from was deleted.") from None
        raise picture_gone(error) from None
    _announce(new, row, hint)
    document = of_accepted(new, row, tenant_id=tenant_id, currency=parts.fleet.currency)
    return Accepted(document, is_new=True, place=expected.place)


def _announce(new: NewJob, row: AcceptedRow, hint: ReleaseHint) -> None:
    """Count the job, now that it is committed, and hand it or those before it to Celery."""
    params = new.params
    telemetry.JOBS_ACCEPTED.labels(params.tier, params.model).inc()
    log.info("job_accepted", job_id=str(row.id), tier=params.tier, model=params.model)
    if new.announced:
        runtime().release.announce(params.pool, params.tier, row.id, num_images=params.num_images)
    elif hint is not ReleaseHint.BACKLOGGED:
        release_waiting_jobs(params.pool, params.tier)


def _may_pass_at_once(session: Session, resolved: Resolved, limits: ReleaseLimits) -> bool:
    return releasing.may_pass_at_once(
        session,
        pool=resolved.pool,
        tier=resolved.tier,
        limits=limits,
        tenant_id=caller().tenant_id,
        num_images=resolved.num_images,
    )


def with_pictures(resolved: Resolved, fields: Mapping[str, str | None], intake: Intake) -> Resolved:
    """The same with the files that its fields stand for, brought if they are new. Raises as `Intake.files` and `check_mask` do."""
    found = intake.files(fields)
    if "mask" in found:
        intake.check_mask(found["mask"], resolved.width_px, resolved.height_px)
    return replace(resolved, **{PICTURES[field].name: file.id for field, file in found.items()})


def foresee(resolved: Resolved, *, start_within_s: float | None = None) -> None:
    """Raise what the job would be refused for now. Nothing is written: for pictures that would be decoded and stored for nothing."""
    new, _ = draft(resolved, metadata=None, start_within_s=start_within_s)
    quotas.foresee(new.megapixel_steps)


def draft(
    resolved: Resolved,
    *,
    metadata: Mapping[str, str] | None,
    start_within_s: float | None,
    replay_of: uuid.UUID | None = None,
    booked: Bookings | None = None,
) -> tuple[NewJob, Expected]:
    """All that is to be written of a job that may be let in now, and what is expected of it.

    booked: what the caller is about to write before it. Raises the Problem of one that may not be let in.
    """
    quotas.check_allowed(resolved)  # a replay was not resolved just now
    fleet, tier = runtime().fleet, runtime().fleet.tiers[resolved.tier]
    deadline_s = start_deadline_s(start_within_s, tier.start_within_s)
    expected = runtime().forecaster.expect(resolved, caller().tenant_id, booked)
    if expected.refusal is not None:
        telemetry.SHED.labels(expected.refusal.reason).inc()
        raise problem_of(expected.refusal)
    new = NewJob(
        params=resolved,
        start_within_s=deadline_s,
        run_within_s=tier.run_within_s,
        predicted_s=expected.predicted_s,
        eta_raw_s=expected.eta_raw_s,
        megapixel_steps=megapixel_steps(fleet, resolved),
        steps_per_image=denoising_of(fleet, resolved).steps,
        tenant_metadata=metadata,
        warnings=warnings.expected(fleet.models[resolved.model], resolved),
        replay_of=replay_of,
    )
    return new, expected


def write(session: Session, new: Sequence[NewJob]) -> list[AcceptedRow]:
    """Write the caller's jobs, if its stocks allow. Raises QuotaExceeded, TooManyJobs: nothing is written then, by rolling back.

    To be called in a transaction that began with `quotas.lock`.
    """
    asking, currency = caller(), runtime().fleet.currency
    of_caller = {"tenant_id": asking.tenant_id, "api_key_id": asking.api_key_id, "actor": asking.actor}
    rows = accepting.accept(session, new, currency=currency, **of_caller)
    quotas.check_stocks(session)
    return rows


def answered(once: Once) -> JobDocument | None:
    """The job that the same request came to before, as it is now; None if it is new. Raises IdempotencyKeyReused."""
    answer = answer_to(once)
    return _job_of(answer) if answer is not None else None


def answer_to(once: Once) -> Answer | None:
    """What the same request came to before; None if it is new. Raises IdempotencyKeyReused."""
    try:
        with transaction(runtime().database) as session:
            answer = idempotency.look_up(session, once, tenant_id=caller().tenant_id)
    except idempotency.KeyReused:
        raise reused() from None
    if answer is not None:
        telemetry.REQUESTS_REPLAYED.inc()
    return answer


def problem_of(refusal: Refusal) -> Problem:
    """The problem of a wish that could be served at another time."""
    kinds: dict[str, type[Problem]] = {"unserved": ModelUnserved, "tenant_queue_full": TenantQueueFull}
    kind = kinds.get(refusal.reason, FleetSaturated)
    return kind(refusal.detail, retry_after_s=refusal.retry_after_s, reason=refusal.reason)


def release_waiting_jobs(pool: str, tier: str) -> None:
    """Announce waiting jobs as the limits allow, now that the caller's rows are committed.

    They are accepted whatever happens here: the sweeper covers a crash, a broker or a database that goes away between the two.
    """
    try:
        runtime().release.release(pool, tier, tenant_id=caller().tenant_id)
    except SQLAlchemyError as error:
        log.warning("release_postponed", pool=pool, tier=tier, reason=type(error).__name__)


def _job_of(answer: Answer) -> JobDocument:
    with transaction(runtime().database) as session:
        job = jobs.find(session, answer.job_id, tenant_id=caller().tenant_id) if answer.job_id else None
    if job is None:
        raise reused()
    return of_row(job)


def picture_gone(error: FileGone) -> InvalidImageRequest:
    """The problem of a picture that was erased while the request that names it was being read."""
    detail = f"The picture {error.file_id} was deleted meanwhile."
    return InvalidImageRequest(detail, errors=[{"pointer": "", "detail": detail}])


def reused() -> IdempotencyKeyReused:
    """The problem of a key that came with another request."""
    return IdempotencyKeyReused("This Idempotency-Key came with another request within the last day.", header=HEADER)


def start_deadline_s(asked_s: float | None, longest_s: float) -> float:
    """Seconds within which the job must start: what is asked for, or the tier's own. Raises InvalidImageRequest."""
    if asked_s is None:
        return longest_s
    if not (math.isfinite(asked_s) and 0 < asked_s <= longest_s):
        accepted = {"min": 0, "max": longest_s}
        raise invalid_wish(InvalidWish("start_deadline_s", f"must be more than 0 and at most {longest_s} seconds", accepted))
    return asked_s
