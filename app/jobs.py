"""/v1/jobs: accept, show, list, cancel, and the way to the images."""

import base64
import binascii
import uuid
from typing import Any

from flask import Blueprint, jsonify, redirect, request, url_for
from flask.typing import ResponseReturnValue

from app import accepting, inputs
from app.auth import caller, require_key
from app.body import read_job, read_wait_s, wish_of
from app.gateway import gateway
from app.idempotency import REPLAYED, read_once
from app.problems import ImageNotFound, ImageNotReady, InvalidQuery, JobAlreadyFinished, JobNotFound
from app.views import job_view
from edges.encoding import FORMATS
from edges.progress import Step
from models import jobs
from models.database import transaction
from models.states import ACTIVE_STATES, FINAL_STATES, JobState
from models.tables import Job

bp = Blueprint("jobs", __name__, url_prefix="/v1/jobs")
bp.before_request(require_key)

MAX_PAGE = 100


@bp.post("")
def create_job() -> ResponseReturnValue:
    """Accept an image request: 202 and the job, or a problem. With `Prefer: wait=N`, answer when it ended or after N seconds."""
    parts = gateway()
    wait_s = read_wait_s(request, parts.settings.max_wait_s)
    body = read_job(request)
    once = read_once(request, body.model_dump(exclude_defaults=True))
    accepted = accepting.answered(once) if once else None
    if accepted is None:
        resolved = accepting.resolve(wish_of(body, inputs.pictures(body.pictures)))
        accepted = accepting.accept(resolved, metadata=body.metadata, start_within_s=body.start_deadline_s, once=once)
    job = accepted.job
    headers = {"Location": url_for(".show_job", job_id=job.id), "Retry-After": "1"}
    if not accepted.is_new:
        headers[REPLAYED] = "true"
    if wait_s:
        headers["Preference-Applied"] = f"wait={wait_s}"
        return jsonify(_view(*_watched(job.id, wait_s))), 202, headers
    return jsonify(job_view(job, place=accepted.place) if accepted.is_new else _view(job, [])), 202, headers


@bp.get("/<uuid:job_id>")
def show_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """The job as it is now; with `Prefer: wait=N`, when it ended or after N seconds (at most 60)."""
    wait_s = read_wait_s(request, gateway().settings.max_wait_s)
    headers = {"Preference-Applied": f"wait={wait_s}"} if wait_s else {}
    return jsonify(_view(*_watched(job_id, wait_s))), 200, headers


@bp.get("")
def list_jobs() -> ResponseReturnValue:
    """The tenant's jobs, newest first: `limit` (1 to 100), `cursor`, `state`."""
    limit = _read_limit(request.args.get("limit", "20"))
    state = request.args.get("state")
    if state is not None and state not in list(JobState):
        raise InvalidQuery(f"state {state[:32]!r} is not a job state.", parameter="state", accepted=[s.value for s in JobState])
    before = _read_cursor(request.args.get("cursor"))
    with transaction(gateway().database) as session:
        rows = jobs.page(session, tenant_id=caller().tenant_id, limit=limit + 1, before=before, state=state)
        page = [job_view(job) for job in rows[:limit]]
    has_more = len(rows) > limit
    next_cursor = _cursor(rows[limit - 1].id) if has_more else None
    headers = {"Link": f'<{url_for(".list_jobs", **request.args.to_dict() | {"cursor": next_cursor})}>; rel="next"'} if has_more else {}
    return jsonify(object="list", data=page, has_more=has_more, next_cursor=next_cursor), 200, headers


@bp.post("/<uuid:job_id>/cancel")
def cancel_job(job_id: uuid.UUID) -> ResponseReturnValue:
    """Take the job back. Harmless when repeated; 409 if it ended otherwise."""
    parts = gateway()
    try:
        with transaction(parts.database) as session:
            job = jobs.cancel(session, job_id, tenant_id=caller().tenant_id, actor=caller().actor)
            view = job_view(job) if job else None
    except jobs.JobAlreadyFinished as error:
        raise JobAlreadyFinished(f"The job is {error.state} and stays so.", state=error.state) from None
    if job is None:
        raise _not_found(job_id)
    parts.news.tell_cancel(job_id)
    parts.news.tell_ending(job_id)
    return jsonify(view)


@bp.get("/<uuid:job_id>/images/<int:index>")
def show_image(job_id: uuid.UUID, index: int) -> ResponseReturnValue:
    """302 to a presigned URL of the stored image."""
    job = _found(job_id)
    image = next((image for image in job.images if image.index == index), None)
    if image is None:
        raise ImageNotFound(f"The job has images 0 to {job.num_images - 1}.")
    if image.artifact is None:
        waiting_helps = job.state in ACTIVE_STATES
        raise ImageNotReady(
            f"The job is {job.state}; this image is not stored.", retry_after_s=1 if waiting_helps else None, state=job.state
        )
    filename = f"{job.id}-{index}.{FORMATS[job.output_format].extension}"
    url = gateway().store.presigned_url(image.artifact.object_key, content_type=image.artifact.content_type, filename=filename)
    response = redirect(url, 302)
    response.headers["Cache-Control"] = "no-store"
    return response


def _view(job: Job, steps: list[Step]) -> dict[str, Any]:
    is_waited_for = job.state in (JobState.QUEUED, JobState.RUNNING)
    return job_view(job, steps, gateway().lookout.place_of(job, sum(step.step for step in steps)) if is_waited_for else None)


def _watched(job_id: uuid.UUID, wait_s: int) -> tuple[Job, list[Step]]:
    """The job, after waiting up to `wait_s` for its end, and what is known of its progress. No connection is held meanwhile."""
    parts, tenant_id = gateway(), caller().tenant_id
    job = _found(job_id)
    if wait_s and job.state not in FINAL_STATES:
        parts.endings.wait(job_id, wait_s, lambda: _has_ended(job_id))
        with transaction(parts.database) as session:
            job = jobs.find(session, job_id, tenant_id=tenant_id) or job
    steps = parts.news.steps(job_id) if job.state == JobState.RUNNING else []
    return job, steps


def _has_ended(job_id: uuid.UUID) -> bool:
    with transaction(gateway().database) as session:
        return jobs.state_of(session, job_id) in FINAL_STATES


def _found(job_id: uuid.UUID) -> Job:
    with transaction(gateway().database) as session:
        job = jobs.find(session, job_id, tenant_id=caller().tenant_id)
    if job is None:
        raise _not_found(job_id)
    return job


def _not_found(job_id: uuid.UUID) -> JobNotFound:
    return JobNotFound(f"There is no job {job_id}.")


def _read_limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidQuery(f"limit must be a whole number from 1 to {MAX_PAGE}.", parameter="limit", accepted={"min": 1, "max": MAX_PAGE})
    return int(text)


def _cursor(job_id: uuid.UUID) -> str:
    return base64.urlsafe_b64encode(job_id.bytes).decode().rstrip("=")


def _read_cursor(text: str | None) -> uuid.UUID | None:
    if text is None:
        return None
    try:
        return uuid.UUID(bytes=base64.b64decode(text + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidQuery("cursor must be a next_cursor of an earlier answer.", parameter="cursor") from None
