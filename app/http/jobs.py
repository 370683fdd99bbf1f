"""Serve /v1/jobs: accept, show, list, cancel, replay and erase jobs, and deliver their images."""

import uuid

import structlog
from flask import Blueprint, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import SQLAlchemyError
from werkzeug import Response

from app.documents import JobDocument
from app.http import delivery, uploads
from app.http.answers import answer, answer_page
from app.http.auth import require_key
from app.http.body import job_request, read_job, read_nothing, read_wait_s
from app.http.connection import has_left
from app.http.context import caller, runtime
from app.http.idempotency import REPLAYED, read_idempotent
from app.http.listing import read_query
from app.http.views import job_view, status_view
from app.live.forecast import QueuePlace
from app.schemas import jobs as schemas
from app.schemas.base import to_json
from app.services import cancel, jobs, wait
from app.services.replay import replay
from app.services.submit import Accepted, submit
from edges.progress import Step
from models.tables import Job
from policy.states import JobState

log = structlog.get_logger(__name__)

bp = Blueprint("jobs", __name__, url_prefix="/v1/jobs")
bp.before_request(require_key)


@bp.post("")
def create_job() -> ResponseReturnValue:
    """Accept an image request: 202 and the job, or a problem.

    With `Prefer: wait=N`, answer when the job has ended or after N seconds. A repeated request with
    the same `Idempotency-Key` gets the job that the first one made.
    """
    wait_s = read_wait_s(request, runtime().settings.max_wait_s)
    return _answer(_accepted(), wait_s)


@bp.post("/<uuid:job_id>/replay")
def replay_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """Accept a new job with every parameter of this one, including its model version.

    Takes no body; otherwise it answers as POST /v1/jobs does.
    """
    wait_s = read_wait_s(request, runtime().settings.max_wait_s)
    read_nothing(request)
    idempotent = read_idempotent(request, {})
    return _answer(replay(runtime(), caller(), job_id, idempotent=idempotent), wait_s)


@bp.get("/<uuid:job_id>")
def show_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """Show the job; with `Prefer: wait=N`, when it has ended or after N seconds (at most 60)."""
    asked_s = read_wait_s(request, runtime().settings.max_wait_s)
    with wait.waiting_place(runtime(), caller(), asked_s) as wait_s:
        response = answer(_view(*_wait_for_job(job_id, wait_s)))
    if asked_s:
        response.headers["Preference-Applied"] = f"wait={wait_s}"
    response.headers["Cache-Control"] = "private, no-cache"
    response.add_etag()
    return response.make_conditional(request)


@bp.get("/<uuid:job_id>/status")
def show_status(job_id: uuid.UUID) -> ResponseReturnValue:
    """Show the changing members of a job, at most a second old.

    Meant for polling: cheap, and cheaper still with `If-None-Match`.
    """
    status = runtime().statuses.get(
        caller().tenant_id, job_id, lambda: _read_status(job_id), root=request.script_root
    )
    response = Response(status.content, content_type="application/json")
    response.headers["Cache-Control"] = "private, max-age=1"
    response.set_etag(status.etag)
    return response.make_conditional(request)


@bp.get("")
def list_jobs() -> ResponseReturnValue:
    """List the tenant's jobs, newest first.

    Takes `limit` (1 to 100), `cursor`, `state`, `created_after`, `created_before` and
    `metadata.<key>`. With several conditions a page may have fewer jobs than `limit`, or none,
    although `next_cursor` leads to more.
    """
    job_filter, limit = read_query(request.args)
    found = jobs.page(runtime(), caller(), job_filter, limit=limit + 1)
    return answer_page(
        request,
        schemas.JobPage,
        found.jobs,
        job_view,
        limit=limit,
        id_of=lambda job: job.id,
        more_before=found.more_before,
    )


@bp.delete("/<uuid:job_id>")
def erase_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """Delete the job's prompts, metadata and images; harmless when repeated.

    The fact that the job existed, and what it cost, are kept.
    """
    cancel.erase(runtime(), caller(), job_id)
    return "", 204


@bp.post("/<uuid:job_id>/cancel")
def cancel_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """Cancel the job; harmless when repeated. 409 if it has ended otherwise."""
    return answer(job_view(cancel.cancel(runtime(), caller(), job_id)))


@bp.get("/<uuid:job_id>/images/<int:index>")
def show_image(job_id: uuid.UUID, index: int) -> ResponseReturnValue:
    """Deliver the stored image; 410 once the job was erased.

    302 to a presigned URL, or with `?redirect=false` the bytes themselves.
    """
    artifact = jobs.stored_image(runtime(), caller(), job_id, index)
    return delivery.deliver(delivery.StoredContent.image(artifact))


def _accepted() -> Accepted:
    """Read the body and accept its job.

    A function of its own so that the body, with its pictures, is freed before the client waits.
    """
    request.max_content_length = runtime().settings.max_job_body_bytes
    body = read_job(request)
    idempotent = read_idempotent(request, body.model_dump(exclude_defaults=True))
    return submit(runtime(), caller(), job_request(body), idempotent=idempotent)


def _answer(accepted: Accepted, wait_s: int) -> ResponseReturnValue:
    """Answer with the job that the request made, now or earlier with the same key."""
    job = accepted.job
    headers = {"Location": url_for(".show_job", job_id=job.id), "Retry-After": "1"}
    if not accepted.is_new:
        headers[REPLAYED] = "true"
    if wait_s:
        with wait.waiting_place(runtime(), caller(), wait_s) as applied_s:
            try:
                view = _view(*_wait_for_job(job.id, applied_s))
            except SQLAlchemyError as error:
                # The job is accepted: after an error the client would submit it again.
                log.warning("wait_given_up", job_id=str(job.id), reason=type(error).__name__)
            else:
                headers["Preference-Applied"] = f"wait={applied_s}"
                return answer(view, 202, headers)
    view = job_view(job, place=accepted.place) if accepted.is_new else _view(job, _steps(job))
    return answer(view, 202, headers)


def _read_status(job_id: uuid.UUID) -> bytes:
    job = jobs.find_with_images(runtime(), caller(), job_id)
    steps = _steps(job)
    return to_json(status_view(job, steps, _place(job, steps)))


def _view(job: Job | JobDocument, steps: list[Step]) -> schemas.Job:
    return job_view(job, steps, _place(job, steps))


def _place(job: Job | JobDocument, steps: list[Step]) -> QueuePlace | None:
    if job.state not in (JobState.QUEUED, JobState.RUNNING):
        return None
    return runtime().forecaster.place_of(job, sum(step.step for step in steps))


def _steps(job: Job | JobDocument) -> list[Step]:
    return runtime().signals.steps(job.id) if job.state == JobState.RUNNING else []


def _wait_for_job(job_id: uuid.UUID, wait_s: int) -> tuple[Job, list[Step]]:
    """Return the job and its known progress, after waiting up to `wait_s` for its end."""
    job = jobs.find(runtime(), caller(), job_id)
    if wait_s:
        uploads.release()  # whatever the job started from is stored by now
        job = wait.wait_for_end(runtime(), caller(), job, wait_s, has_left=has_left(request))
    return job, _steps(job)
