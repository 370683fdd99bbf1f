"""Serve POST /v1/jobs:batch: up to a thousand jobs in one request.

Each job is accepted or refused on its own.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.auth import require_key
from app.http.body import job_request, parse_job, parse_shared, read_object
from app.http.context import caller, runtime
from app.http.idempotency import REPLAYED, read_idempotent
from app.http.views import urls_view
from app.problems import InvalidImageRequest, Problem, invalid_param
from app.schemas import jobs as schemas
from app.schemas.bodies import MAX_JOBS
from app.services.batches import BatchAnswer, BatchJob, Item, submit_batch
from app.services.submit import JobRequest
from policy.refusals import InvalidParam

bp = Blueprint("batches", __name__)
bp.before_request(require_key)


@bp.post("/v1/jobs:batch")
def create_jobs() -> ResponseReturnValue:
    """Accept every job of the batch that can be accepted.

    Answers 200 with the job or the problem of each item, in the order of the request.
    """
    request.max_content_length = runtime().settings.max_batch_bytes
    body = read_object(request, problem=InvalidImageRequest, lists={"/jobs": MAX_JOBS})
    items, defaults = _read_batch(body)
    idempotent = read_idempotent(request, [items, defaults])
    done = submit_batch(runtime(), caller(), _asked(items, defaults), idempotent=idempotent)
    return answer(_view(done), headers={} if done.is_new else {REPLAYED: "true"})


def _asked(items: Sequence[Any], defaults: Mapping[str, Any]) -> Iterator[JobRequest | Problem]:
    """Yield the job request of each item, or the problem of an item that cannot be read."""
    for item in items:
        try:
            if not isinstance(item, dict):
                raise invalid_param(InvalidParam("", "must be an object with the fields of a job"))
            yield job_request(parse_job({**defaults, **item}))
        except Problem as problem:
            yield problem


def _view(done: BatchAnswer) -> schemas.Batch:
    return schemas.Batch(
        accepted=sum("job_id" in item for item in done.items),
        refused=sum("problem" in item for item in done.items),
        data=[_item_view(item, done.jobs) for item in done.items],
    )


def _item_view(
    item: Item, jobs: Mapping[uuid.UUID, BatchJob]
) -> schemas.BatchAccepted | schemas.BatchRefused:
    if "job_id" in item:
        return schemas.BatchAccepted(job=_job_view(jobs[uuid.UUID(item["job_id"])]))
    return schemas.BatchRefused(status=item["problem"]["status"], problem=item["problem"])


def _job_view(job: BatchJob) -> schemas.BatchJob:
    """Show the main members of an item's job; the rest is at its URL."""
    params = job.params
    return schemas.BatchJob(
        id=job.id,
        state=job.state,
        tier=params.tier,
        model=params.model,
        model_alias=params.model_alias,
        model_version=params.model_version,
        seed=params.seed,
        n=params.num_images,
        urls=urls_view(job.id),
    )


def _read_batch(body: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Read the items, and the defaults for fields that they omit. Raises InvalidImageRequest."""
    for name in body:
        if name not in ("jobs", "defaults"):
            wrong = InvalidParam(name[:64], "is not a field of a batch", ["jobs", "defaults"])
            raise invalid_param(wrong)
    items = body.get("jobs")
    defaults = body.get("defaults", {})
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_JOBS:
        detail = f"must be a list of 1 to {MAX_JOBS} jobs"
        raise invalid_param(InvalidParam("jobs", detail, {"min": 1, "max": MAX_JOBS}))
    if not isinstance(defaults, dict):
        raise invalid_param(InvalidParam("defaults", "must be an object with the fields of a job"))
    parse_shared(defaults)
    return items, defaults
