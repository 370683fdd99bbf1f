"""POST /v1/jobs:batch: up to a thousand jobs in one request and one transaction, each of them checked by itself."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import structlog
from flask import Blueprint, request
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from app.http.answers import answer
from app.http.auth import require_key
from app.http.body import MAX_JOBS, invalid_wish, parse_job, parse_shared, read_object, wish_of
from app.http.context import caller, runtime
from app.http.idempotency import REPLAYED, read_once
from app.http.views import urls_view
from app.live.forecast import Booked
from app.problems import InvalidImageRequest, Problem
from app.schemas import jobs as schemas
from app.services import inputs, quotas, submit
from edges import telemetry
from models import idempotency, listing
from models.accepting import NewJob, in_order
from models.database import run_transaction, transaction
from models.files import FileGone
from models.idempotency import Answer, Once
from models.tables import Job
from policy.catalog import InvalidWish
from policy.params import Resolved
from policy.states import JobState

bp = Blueprint("batches", __name__)
bp.before_request(require_key)
log = structlog.get_logger(__name__)

MAX_PROBLEM_CHARS = 262_144  # of what a batch says of the items that it refuses; of those beyond it says less
MAX_SHORT_DETAIL_CHARS = 160
Outcome = NewJob | Problem


@dataclass(frozen=True)
class _Draft:
    """An item that may be let in but for its pictures, which nobody has looked at."""

    job: NewJob
    resolved: Resolved
    pictures: Mapping[str, str | None]

    def complete(self, intake: inputs.Intake) -> Outcome:
        """The job to be written, with its pictures; or why they cannot be used."""
        try:
            resolved = submit.with_pictures(self.resolved, self.pictures, intake)
        except Problem as problem:
            return problem
        return replace(self.job, params=resolved)


@dataclass
class _Door:
    """Lets the items of one batch in, one after the other; what it let in counts when the next one is looked at."""

    booked: dict[tuple[str, str], Booked] = field(default_factory=dict)

    def admit(self, item: object, defaults: Mapping[str, Any]) -> _Draft | Problem:
        """What may be let in if its pictures can be used, or why it may not be."""
        try:
            if not isinstance(item, dict):
                raise invalid_wish(InvalidWish("", "must be an object with the fields of a job"))
            body = parse_job({**defaults, **item})
            resolved = submit.resolve(wish_of(body, inputs.unseen(body.pictures)))
            new, _ = submit.draft(resolved, metadata=body.metadata, start_within_s=body.start_deadline_s, booked=self.booked)
        except Problem as problem:
            return problem
        self.booked[new.flow] = self.booked.get(new.flow, Booked()).and_one(new.predicted_s)
        return _Draft(new, resolved, body.pictures)


@bp.post("/v1/jobs:batch")
def create_jobs() -> ResponseReturnValue:
    """Accept every job of the batch that can be: 200, and for each item, in order, its job or its problem."""
    request.max_content_length = runtime().settings.max_batch_bytes
    items, defaults = _read_batch(read_object(request, problem=InvalidImageRequest, lists={"/jobs": MAX_JOBS}))
    once = read_once(request, [items, defaults])
    if once is not None and (earlier := submit.answer_to(once)) is not None:
        return answer(_view(earlier), headers={REPLAYED: "true"})
    door = _Door()
    outcomes = _complete([door.admit(item, defaults) for item in items])
    try:
        accepted, written = _accept(outcomes, once)
    except idempotency.AlreadyAnswered as error:  # meanwhile, by another request
        return answer(_view(error.answer), headers={REPLAYED: "true"})
    except idempotency.KeyReused:
        raise submit.reused() from None
    except FileGone as error:
        raise submit.picture_gone(error) from None
    return answer(_view(accepted, written))


def _complete(drafts: Sequence[_Draft | Problem]) -> list[Outcome]:
    """Look at the pictures of those that could be let in. Raises as `quotas.foresee` does, before a new one is looked at."""
    admitted = [draft for draft in drafts if isinstance(draft, _Draft)]
    said = {value for draft in admitted for value in draft.pictures.values() if value is not None}
    if any(map(inputs.is_new, said)) or any(draft.pictures.get("mask") for draft in admitted):
        quotas.foresee(sum((draft.job.megapixel_steps for draft in admitted), Decimal(0)), jobs=len(admitted))
    intake = inputs.Intake()
    intake.look_up(said)
    return [draft.complete(intake) if isinstance(draft, _Draft) else draft for draft in drafts]


def _accept(outcomes: Sequence[Outcome], once: Once | None) -> tuple[Answer, list[NewJob]]:
    """Write what was let in, if anything was, and announce what there is room for; the answer, and the jobs that were written.

    All of it or nothing: raises BudgetSpent, QuotaExceeded or TooManyJobs if the whole does not fit into the tenant's limits.
    """
    parts, tenant_id = runtime(), caller().tenant_id
    new = iter(in_order([outcome for outcome in outcomes if isinstance(outcome, NewJob)]))
    outcomes = [next(new) if isinstance(outcome, NewJob) else outcome for outcome in outcomes]
    accepted = [outcome for outcome in outcomes if isinstance(outcome, NewJob)]
    noted = {"items": json.dumps(list(_noted(outcomes)))}  # as text: JSONB has no place for every text that JSON has
    if accepted:
        whole = sum((job.megapixel_steps for job in accepted), Decimal(0))

        def write(session: Session) -> None:
            quotas.lock(session)
            if once is not None:
                idempotency.claim(session, once, tenant_id=tenant_id)
            submit.write(session, accepted)
            if once is not None:
                idempotency.fulfil(session, once, tenant_id=tenant_id, answer=noted)

        with quotas.charged(whole):
            run_transaction(parts.database, write)
    for job in accepted:
        telemetry.JOBS_ACCEPTED.labels(job.params.tier, job.params.model).inc()
    log.info("batch_accepted", jobs=len(accepted), refused=len(outcomes) - len(accepted))
    for pool, tier in sorted({job.flow for job in accepted}):
        submit.release_waiting_jobs(pool, tier)
    return Answer(job_id=None, items=noted), accepted


def _noted(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """What is answered of each, and kept for those who ask again; of many problems the first ones in full."""
    left = MAX_PROBLEM_CHARS
    for outcome in outcomes:
        if isinstance(outcome, NewJob):
            yield {"job_id": str(outcome.id)}
            continue
        wait = {"retry_after_s": outcome.retry_after_s} if outcome.retry_after_s is not None else {}
        problem = outcome.summary() | wait
        left -= len(json.dumps(problem))
        yield {"problem": problem if left >= 0 else _shortened(problem) | wait}


def _shortened(problem: Mapping[str, Any]) -> dict[str, Any]:
    """What it is, and the first field that it is about."""
    short = {name: problem[name] for name in ("type", "title", "status")} | {"detail": problem["detail"][:MAX_SHORT_DETAIL_CHARS]}
    if errors := problem.get("errors"):
        first = {"pointer": errors[0]["pointer"], "detail": errors[0]["detail"][:MAX_SHORT_DETAIL_CHARS]}
        short |= {"errors": [first], "errors_left_out": len(errors) - 1 + problem.get("errors_left_out", 0)}
    return short


def _view(kept: Answer, written: Sequence[NewJob] = ()) -> schemas.Batch:
    """Show what the batch came to. Jobs that were just written are not read back: they are accepted, whatever becomes of the database."""
    items = json.loads((kept.items or {}).get("items", "[]"))
    job_ids = [uuid.UUID(item["job_id"]) for item in items if "job_id" in item]
    views = {job.id: _job_view(job.id, JobState.QUEUED, job.params) for job in written}
    if job_ids and not written:
        with transaction(runtime().database) as session:
            jobs = listing.some(session, job_ids, tenant_id=caller().tenant_id)
        views = {job_id: _job_view(job_id, job.state, job) for job_id, job in jobs.items()}
    return schemas.Batch(
        accepted=len(job_ids),
        refused=len(items) - len(job_ids),
        data=[_item_view(item, views) for item in items],
    )


def _item_view(
    item: Mapping[str, Any],
    views: Mapping[uuid.UUID, schemas.BatchJob],
) -> schemas.BatchAccepted | schemas.BatchRefused:
    if "job_id" in item:
        return schemas.BatchAccepted(job=views[uuid.UUID(item["job_id"])])
    return schemas.BatchRefused(status=item["problem"]["status"], problem=item["problem"])


def _job_view(job_id: uuid.UUID, state: str, params: Job | Resolved) -> schemas.BatchJob:
    """Show enough of an item's job to know it again; the rest is at its address."""
    return schemas.BatchJob(
        id=job_id,
        state=state,
        tier=params.tier,
        model=params.model,
        model_alias=params.model_alias,
        model_version=params.model_version,
        seed=params.seed,
        n=params.num_images,
        urls=urls_view(job_id),
    )


def _read_batch(body: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The items, and the fields that all of them share unless they say otherwise. Raises InvalidImageRequest."""
    for name in body:
        if name not in ("jobs", "defaults"):
            raise invalid_wish(InvalidWish(name[:64], "is no field of a batch", ["jobs", "defaults"]))
    items, defaults = body.get("jobs"), body.get("defaults", {})
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_JOBS:
        raise invalid_wish(InvalidWish("jobs", f"must be a list of 1 to {MAX_JOBS} jobs", {"min": 1, "max": MAX_JOBS}))
    if not isinstance(defaults, dict):
        raise invalid_wish(InvalidWish("defaults", "must be an object with fields of a job"))
    parse_shared(defaults)
    return items, defaults
