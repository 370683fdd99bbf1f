"""Turn a request for images into an accepted job: look up its key, resolve, admit, write, announce.

Every route uses `accept_once`, except batches (app/services/batches.py), which write many jobs at
once.
"""

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.caller import Caller
from app.documents import JobDocument, of_accepted, of_row
from app.live.forecast import Bookings, JobForecast, QueuePlace
from app.problems import (
    FleetSaturated,
    IdempotencyKeyReused,
    InvalidImageRequest,
    ModelUnserved,
    Problem,
    ReplayImpossible,
    TenantQueueFull,
    invalid_param,
)
from app.runtime import Runtime
from app.services import inputs, quotas
from app.services.inputs import UNSEEN, Intake
from edges import telemetry
from models import accepting, idempotency, jobs, releasing
from models.accepting import AcceptedRow, NewJob
from models.database import run_transaction, transaction
from models.files import FileGone
from models.idempotency import IdempotentRequest, StoredAnswer
from policy.admission import Refusal
from policy.cost import megapixel_steps
from policy.params import PICTURES, RequestedParams, Resolved
from policy.refusals import InvalidParam
from policy.release import ReleaseHint, ReleaseLimits
from policy.steps import denoising_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class JobRequest:
    """A caller's request for one job.

    requested: without its pictures. pictures: by field, an id, a data URL or a URL. metadata: the
    tenant's own. start_within_s: its start deadline; None for the tier's.
    """

    requested: RequestedParams
    pictures: Mapping[str, str | None]
    metadata: Mapping[str, str]
    start_within_s: float | None = None

    def unseen(self) -> RequestedParams:
        """Return the parameters with a placeholder for each picture, since none is decoded yet."""
        stand_ins: dict[str, Any] = {
            field: UNSEEN for field, value in self.pictures.items() if value is not None
        }
        return replace(self.requested, **stand_ins)


@dataclass(frozen=True)
class Prepared:
    """A job with every parameter resolved and every picture stored, not admitted yet.

    replay_of: the job whose parameters these are.
    """

    params: Resolved
    metadata: Mapping[str, str] | None = None
    start_within_s: float | None = None
    replay_of: uuid.UUID | None = None


@dataclass(frozen=True)
class Accepted:
    """The job that a request made or found.

    is_new: False if the same request came before with the same key. place: the queue position of a
    new job.
    """

    job: JobDocument
    is_new: bool
    place: QueuePlace | None = None


def submit(
    runtime: Runtime,
    caller: Caller,
    asked: JobRequest,
    *,
    idempotent: IdempotentRequest | None = None,
) -> Accepted:
    """Accept the requested job, once. Raises as `prepare` and `accept_once` do."""
    return accept_once(
        runtime, caller, lambda: prepare(runtime, caller, asked), idempotent=idempotent
    )


def accept_once(
    runtime: Runtime,
    caller: Caller,
    prepare: Callable[[], Prepared],
    *,
    idempotent: IdempotentRequest | None = None,
    may_answer: Callable[[JobDocument], bool] = lambda earlier: True,
) -> Accepted:
    """Accept a job, or return the one that an earlier request with the same key made.

    prepare: called only if there is no earlier job. idempotent: the request's idempotency key.
    An earlier job is returned as it is now, even if no such job could be accepted any more.
    may_answer: tells whether the earlier job still counts; if not, a new one replaces it under the
    key.

    Raises the Problem of a job that cannot be served now, and what `prepare` raises.
    """
    if (
        idempotent is not None
        and (earlier := _find_earlier(runtime, caller, idempotent)) is not None
    ):
        if may_answer(earlier):
            return _came_before(earlier)
        idempotent = replace(idempotent, renew=True)
    try:
        return _accept(runtime, caller, prepare(), idempotent)
    except idempotency.AlreadyAnswered as error:  # meanwhile, by another request
        return _came_before(_job_of(runtime, caller, error.answer))
    except idempotency.KeyReused:
        raise reused() from None
    except Problem:
        # The same request may have been accepted while this one stored its pictures.
        if idempotent is None or (earlier := _find_earlier(runtime, caller, idempotent)) is None:
            raise
        return _came_before(earlier)


def prepare(runtime: Runtime, caller: Caller, asked: JobRequest) -> Prepared:
    """Resolve the request, and store its pictures if the job could be accepted now.

    Raises as `resolve`, `foresee` and `with_pictures` do.
    """
    resolved = resolve(runtime, caller, asked.unseen())
    if asked.pictures.get("mask") is not None or any(map(inputs.is_new, asked.pictures.values())):
        # Also for a mask that is stored already: it has to be decoded.
        foresee(runtime, caller, resolved, start_within_s=asked.start_within_s)
    resolved = with_pictures(resolved, asked.pictures, Intake(runtime, caller))
    return Prepared(resolved, asked.metadata, asked.start_within_s)


def resolve(runtime: Runtime, caller: Caller, requested: RequestedParams) -> Resolved:
    """Resolve every requested parameter.

    Raises InvalidImageRequest, which names the field, and Forbidden.
    """
    try:
        resolved = runtime.resolve(requested, runtime.asker(caller))
    except InvalidParam as error:
        raise invalid_param(error) from None
    quotas.check_allowed(runtime, caller, resolved)
    return resolved


def foresee(
    runtime: Runtime, caller: Caller, resolved: Resolved, *, start_within_s: float | None = None
) -> None:
    """Raise what the job would be refused for now; nothing is written.

    Call it before pictures are decoded and stored, which a refusal would waste.
    """
    new, _ = price_and_admit(runtime, caller, Prepared(resolved, start_within_s=start_within_s))
    quotas.foresee(runtime, caller, new.megapixel_steps)


def with_pictures(resolved: Resolved, fields: Mapping[str, str | None], intake: Intake) -> Resolved:
    """Add the files of the picture fields, storing new pictures.

    Raises as `Intake.files` and `check_mask` do.
    """
    found = intake.files(fields)
    if "mask" in found:
        intake.check_mask(found["mask"], resolved.width_px, resolved.height_px)
    ids: dict[str, Any] = {PICTURES[field].name: file.id for field, file in found.items()}
    return replace(resolved, **ids)


def price_and_admit(
    runtime: Runtime,
    caller: Caller,
    prepared: Prepared,
    *,
    booked: Bookings | None = None,
) -> tuple[NewJob, JobForecast]:
    """Price and admit a job; return the row to write, and the forecast for it.

    booked: what the caller will write before it. Raises the Problem of a job that is refused.
    """
    resolved = prepared.params
    fleet = runtime.fleet
    # For replays, which were not resolved just now.
    quotas.check_allowed(runtime, caller, resolved)
    tier = fleet.tiers[resolved.tier]
    deadline_s = start_deadline_s(prepared.start_within_s, tier.start_within_s)
    expected = runtime.forecaster.expect(resolved, caller.tenant_id, booked)
    if expected.refusal is not None:
        telemetry.SHED.labels(expected.refusal.reason).inc()
        raise problem_of(expected.refusal)
    new = NewJob(
        params=resolved,
        start_within_s=deadline_s,
        run_within_s=tier.run_within_s,
        predicted_s=expected.predicted_s,
        eta_raw_s=expected.eta_raw_s,
        eta_p90_s=expected.place.eta.p90_s,
        megapixel_steps=megapixel_steps(fleet, resolved),
        steps_per_image=denoising_of(fleet, resolved).steps,
        tenant_metadata=prepared.metadata,
        warnings=runtime.expected_warnings(resolved),
        fleet_revision=runtime.current.number or None,
        request_id=caller.request_id,
        traceparent=caller.traceparent,
        replay_of=prepared.replay_of,
    )
    return new, expected


def _accept(
    runtime: Runtime, caller: Caller, prepared: Prepared, idempotent: IdempotentRequest | None
) -> Accepted:
    """Write the job with its images, and announce it if the limits allow."""
    drafted, expected = price_and_admit(runtime, caller, prepared)
    hint, limits = runtime.forecaster.release_hint(prepared.params, caller.tenant_id)
    at_once = limits if hint is ReleaseHint.IMMEDIATE else None

    def write_job(session: Session) -> tuple[NewJob, AcceptedRow]:
        return _write_job(session, runtime, caller, drafted, idempotent, at_once)

    try:
        with quotas.budget_charge(runtime, caller, drafted.megapixel_steps):
            new, row = run_transaction(runtime.database, write_job)
    except jobs.JobErased:
        raise ReplayImpossible("The job was erased: its parameters are gone.") from None
    except FileGone as error:  # it was erased after its look-up a moment ago
        if prepared.replay_of is not None:
            raise ReplayImpossible("A picture that the job starts from was deleted.") from None
        raise picture_gone(error) from None
    _announce(runtime, caller, new, row, hint)
    document = of_accepted(new, row, tenant_id=caller.tenant_id, currency=runtime.fleet.currency)
    return Accepted(document, is_new=True, place=expected.place)


def _write_job(
    session: Session,
    runtime: Runtime,
    caller: Caller,
    new: NewJob,
    idempotent: IdempotentRequest | None,
    at_once: ReleaseLimits | None,
) -> tuple[NewJob, AcceptedRow]:
    """Write the job; return it with what is known of it now, and its row.

    at_once: write it as announced if these limits allow; None: it is announced after the commit.
    """
    quotas.lock_tenant_usage(session, caller)
    if idempotent is not None:
        idempotency.claim(session, idempotent, tenant_id=caller.tenant_id)
    if new.replay_of is not None:
        jobs.lock_against_erasure(session, new.replay_of)
    if at_once is not None:
        may_pass = releasing.may_pass_at_once(
            session,
            pool=new.params.pool,
            tier=new.params.tier,
            limits=at_once,
            tenant_id=caller.tenant_id,
            num_images=new.params.num_images,
        )
        new = replace(new, announced=may_pass)
    (row,) = insert_jobs(session, runtime, caller, [new])
    if idempotent is not None:
        idempotency.fulfil(session, idempotent, tenant_id=caller.tenant_id, job_id=row.id)
    return new, row


def insert_jobs(
    session: Session, runtime: Runtime, caller: Caller, new: Sequence[NewJob]
) -> list[AcceptedRow]:
    """Insert the caller's jobs, if its stocks allow. Call it after `quotas.lock_tenant_usage`.

    Raises QuotaExceeded, TooManyJobs; the transaction must then be rolled back.
    """
    rows = accepting.accept(
        session,
        new,
        currency=runtime.fleet.currency,
        tenant_id=caller.tenant_id,
        api_key_id=caller.api_key_id,
        actor=caller.actor,
    )
    quotas.check_stocks(session, caller)
    return rows


def _announce(
    runtime: Runtime, caller: Caller, new: NewJob, row: AcceptedRow, hint: ReleaseHint
) -> None:
    """Count the committed job, and announce it or the waiting jobs before it."""
    params = new.params
    telemetry.JOBS_ACCEPTED.labels(params.tier, params.model).inc()
    log.info("job_accepted", job_id=str(row.id), tier=params.tier, model=params.model)
    if new.announced:
        runtime.release.announce(params.pool, params.tier, row.id, num_images=params.num_images)
    elif hint is not ReleaseHint.BACKLOGGED:
        release_waiting_jobs(runtime, caller, params.pool, params.tier)


def release_waiting_jobs(runtime: Runtime, caller: Caller, pool: str, tier: str) -> None:
    """Announce waiting jobs as the limits allow; the caller's rows must be committed.

    An error here does not undo the accept. If the process crashes, or the broker or the database
    goes away, the sweeper announces them.
    """
    try:
        runtime.release.release(pool, tier, tenant_id=caller.tenant_id)
    except SQLAlchemyError as error:
        log.warning("release_postponed", pool=pool, tier=tier, reason=type(error).__name__)


def find_replayed_answer(
    runtime: Runtime, caller: Caller, idempotent: IdempotentRequest
) -> StoredAnswer | None:
    """Return the stored answer of the same request; None if it is new or to be renewed.

    Raises IdempotencyKeyReused.
    """
    if idempotent.renew:
        return None
    try:
        with transaction(runtime.database) as session:
            answer = idempotency.look_up(session, idempotent, tenant_id=caller.tenant_id)
    except idempotency.KeyReused:
        raise reused() from None
    return answer


def _came_before(job: JobDocument) -> Accepted:
    telemetry.REQUESTS_REPLAYED.inc()
    return Accepted(job, is_new=False)


def _find_earlier(
    runtime: Runtime, caller: Caller, idempotent: IdempotentRequest
) -> JobDocument | None:
    answer = find_replayed_answer(runtime, caller, idempotent)
    return _job_of(runtime, caller, answer) if answer is not None else None


def _job_of(runtime: Runtime, caller: Caller, answer: StoredAnswer) -> JobDocument:
    with transaction(runtime.database) as session:
        job_id = answer.job_id
        job = jobs.find(session, job_id, tenant_id=caller.tenant_id) if job_id else None
    if job is None:
        raise reused()
    return of_row(job)


def problem_of(refusal: Refusal) -> Problem:
    """Make the problem of a job that is refused now but may be accepted later."""
    kinds: dict[str, type[Problem]] = {
        "unserved": ModelUnserved,
        "tenant_queue_full": TenantQueueFull,
    }
    kind = kinds.get(refusal.reason, FleetSaturated)
    return kind(refusal.detail, retry_after_s=refusal.retry_after_s, reason=refusal.reason)


def picture_gone(error: FileGone) -> InvalidImageRequest:
    """Make the problem of a picture that was erased while the request was being served."""
    detail = f"The picture {error.file_id} has just been deleted."
    return InvalidImageRequest(detail, errors=[{"pointer": "", "detail": detail}])


def reused() -> IdempotencyKeyReused:
    """Make the problem of an idempotency key that came with another request before."""
    return IdempotencyKeyReused(
        "This Idempotency-Key was used for another request within the last day.",
        header="Idempotency-Key",
    )


def start_deadline_s(asked_s: float | None, longest_s: float) -> float:
    """Return the seconds within which the job must start: the requested ones, or the tier's.

    Raises InvalidImageRequest.
    """
    if asked_s is None:
        return longest_s
    if not (math.isfinite(asked_s) and 0 < asked_s <= longest_s):
        accepted = {"min": 0, "max": longest_s}
        detail = f"must be more than 0 and at most {longest_s} seconds"
        raise invalid_param(InvalidParam("start_deadline_s", detail, accepted))
    return asked_s
