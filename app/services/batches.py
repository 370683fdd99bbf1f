"""Accept many jobs in one transaction, after checking each on its own."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.caller import Caller
from app.live.forecast import BookedJobs
from app.problems import Problem
from app.runtime import Runtime
from app.services import inputs, jobs, quotas, submit
from app.services.inputs import Intake
from app.services.submit import JobRequest, Prepared
from edges import telemetry
from models import idempotency
from models.accepting import NewJob, in_order
from models.database import run_transaction
from models.files import FileGone
from models.idempotency import IdempotentRequest, StoredAnswer
from models.tables import Job
from policy.params import Resolved
from policy.states import JobState

log = structlog.get_logger(__name__)

# Of all problems in the answer to a batch; further problems are shortened.
MAX_PROBLEM_CHARS = 262_144
MAX_SHORT_DETAIL_CHARS = 160
Outcome = NewJob | Problem
Item = Mapping[str, Any]


@dataclass(frozen=True)
class BatchJob:
    """The main facts of an item's job."""

    id: uuid.UUID
    state: str
    params: Job | Resolved


@dataclass(frozen=True)
class BatchAnswer:
    """The result of a batch.

    items: in the order of the request, the `job_id` or the `problem` of each item. jobs: the
    accepted ones, by id. is_new: False if the same request was answered before with the same key.
    """

    items: Sequence[Item]
    jobs: Mapping[uuid.UUID, BatchJob]
    is_new: bool = True


@dataclass(frozen=True)
class _Draft:
    """An item that may be accepted if its pictures can be used; they are not decoded yet."""

    job: NewJob
    pictures: Mapping[str, str | None]

    def complete(self, intake: Intake) -> Outcome:
        """Return the job with its pictures, ready to be written; or the problem of its pictures."""
        try:
            resolved = submit.with_pictures(self.job.params, self.pictures, intake)
        except Problem as problem:
            return problem
        return replace(self.job, params=resolved)


@dataclass
class _Admission:
    """Judges the items of one batch in order; accepted items count when the next one is judged."""

    runtime: Runtime
    caller: Caller
    booked: dict[tuple[str, str], BookedJobs] = field(default_factory=dict)

    def admit(self, asked: JobRequest | Problem) -> _Draft | Problem:
        """Return the item as a draft, or the problem for which it is refused."""
        if isinstance(asked, Problem):
            return asked
        try:
            resolved = submit.resolve(self.runtime, self.caller, asked.unseen())
            prepared = Prepared(resolved, asked.metadata, asked.start_within_s)
            new, _ = submit.price_and_admit(self.runtime, self.caller, prepared, booked=self.booked)
        except Problem as problem:
            return problem
        self.booked[new.flow] = self.booked.get(new.flow, BookedJobs()).with_job(new.predicted_s)
        return _Draft(new, asked.pictures)


def submit_batch(
    runtime: Runtime,
    caller: Caller,
    items: Iterator[JobRequest | Problem],
    *,
    idempotent: IdempotentRequest | None = None,
) -> BatchAnswer:
    """Accept every job of the batch that can be accepted.

    items: read only if the request is new; an item that could not be read is its problem. All
    accepted items are written, or none: raises BudgetSpent, QuotaExceeded or TooManyJobs if
    together they exceed the tenant's limits. Also raises IdempotencyKeyReused and
    InvalidImageRequest.
    """
    if (earlier := _find_earlier(runtime, caller, idempotent)) is not None:
        return earlier
    admission = _Admission(runtime, caller)
    try:
        outcomes = _complete(runtime, caller, [admission.admit(asked) for asked in items])
        done = _accept(runtime, caller, outcomes, idempotent)
    except idempotency.AlreadyAnswered as error:  # meanwhile, by another request
        return _earlier(runtime, caller, error.answer)
    except idempotency.KeyReused:
        raise submit.reused() from None
    except FileGone as error:
        raise submit.picture_gone(error) from None
    except Problem:
        # The same request may have been accepted while this one stored its pictures.
        if (earlier := _find_earlier(runtime, caller, idempotent)) is None:
            raise
        return earlier
    if not done.jobs and (earlier := _find_earlier(runtime, caller, idempotent)) is not None:
        return earlier
    return done


def _find_earlier(
    runtime: Runtime, caller: Caller, idempotent: IdempotentRequest | None
) -> BatchAnswer | None:
    """Find what the same request came to before; None without a key, or if it is new."""
    answer = (
        submit.find_replayed_answer(runtime, caller, idempotent) if idempotent is not None else None
    )
    return _earlier(runtime, caller, answer) if answer is not None else None


def _complete(
    runtime: Runtime, caller: Caller, drafts: Sequence[_Draft | Problem]
) -> list[Outcome]:
    """Add the pictures to the drafts. Before a new picture is decoded, the limits are checked.

    Raises as `quotas.foresee` does.
    """
    admitted = [draft for draft in drafts if isinstance(draft, _Draft)]
    said = {value for draft in admitted for value in draft.pictures.values() if value is not None}
    if any(map(inputs.is_new, said)) or any(draft.pictures.get("mask") for draft in admitted):
        whole = sum((draft.job.megapixel_steps for draft in admitted), Decimal(0))
        quotas.foresee(runtime, caller, whole, jobs=len(admitted))
    intake = Intake(runtime, caller)
    intake.look_up(said)
    return [draft.complete(intake) if isinstance(draft, _Draft) else draft for draft in drafts]


def _accept(
    runtime: Runtime,
    caller: Caller,
    outcomes: Sequence[Outcome],
    idempotent: IdempotentRequest | None,
) -> BatchAnswer:
    """Write the accepted jobs, if any, and announce as many as the limits allow."""
    new = iter(in_order([outcome for outcome in outcomes if isinstance(outcome, NewJob)]))
    outcomes = [next(new) if isinstance(outcome, NewJob) else outcome for outcome in outcomes]
    accepted = [outcome for outcome in outcomes if isinstance(outcome, NewJob)]
    items = list(_noted(outcomes))
    if accepted:
        # As text: JSONB cannot hold every JSON string.
        _write(runtime, caller, accepted, idempotent, {"items": json.dumps(items)})
    for job in accepted:
        telemetry.JOBS_ACCEPTED.labels(job.params.tier, job.params.model).inc()
    log.info("batch_accepted", jobs=len(accepted), refused=len(outcomes) - len(accepted))
    for pool, tier in sorted({job.flow for job in accepted}):
        submit.release_waiting_jobs(runtime, caller, pool, tier)
    # Not read back: the jobs are accepted, even if the database goes away now.
    shown = {job.id: BatchJob(job.id, JobState.QUEUED, job.params) for job in accepted}
    return BatchAnswer(items, shown)


def _write(
    runtime: Runtime,
    caller: Caller,
    accepted: Sequence[NewJob],
    idempotent: IdempotentRequest | None,
    noted: Mapping[str, str],
) -> None:
    tenant_id = caller.tenant_id

    def write(session: Session) -> None:
        quotas.lock_tenant_usage(session, caller)
        if idempotent is not None:
            idempotency.claim(session, idempotent, tenant_id=tenant_id)
        submit.insert_jobs(session, runtime, caller, accepted)
        if idempotent is not None:
            idempotency.fulfil(session, idempotent, tenant_id=tenant_id, answer=noted)

    whole = sum((job.megapixel_steps for job in accepted), Decimal(0))
    with quotas.budget_charge(runtime, caller, whole, jobs=len(accepted)):
        run_transaction(runtime.database, write)


def _earlier(runtime: Runtime, caller: Caller, answer: StoredAnswer) -> BatchAnswer:
    """Return the stored answer of the same batch, with its jobs as they are now."""
    telemetry.REQUESTS_REPLAYED.inc()
    items = json.loads((answer.items or {}).get("items", "[]"))
    job_ids = [uuid.UUID(item["job_id"]) for item in items if "job_id" in item]
    found = jobs.find_many(runtime, caller, job_ids) if job_ids else {}
    shown = {job_id: BatchJob(job_id, job.state, job) for job_id, job in found.items()}
    return BatchAnswer(items, shown, is_new=False)


def _noted(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield the answer for each item, as it is sent and stored for repeated requests.

    Problems beyond MAX_PROBLEM_CHARS in total are shortened.
    """
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
    """Keep the type of the problem, and its first wrong field."""
    short = {name: problem[name] for name in ("type", "title", "status")}
    short["detail"] = problem["detail"][:MAX_SHORT_DETAIL_CHARS]
    if errors := problem.get("errors"):
        detail = errors[0]["detail"][:MAX_SHORT_DETAIL_CHARS]
        short["errors"] = [{"pointer": errors[0]["pointer"], "detail": detail}]
        short["errors_left_out"] = len(errors) - 1 + problem.get("errors_left_out", 0)
    return short
