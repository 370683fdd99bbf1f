"""Show rows to a client; a job with every parameter that is needed to make its image again."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from flask import url_for

from app.documents import ImageDocument, JobDocument
from app.live.forecast import QueuePlace
from app.schemas import jobs as schemas
from edges.progress import Step
from models.tables import Image, Job
from policy.failures import told_detail
from policy.params import Resolved, members_of, size_of
from policy.states import FINAL_STATES, ImageState, JobState
from policy.steps import image_steps


def job_view(
    job: Job | JobDocument, steps: Sequence[Step] = (), place: QueuePlace | None = None
) -> schemas.Job:
    """Show a job with its images.

    steps: the progress of a running job. place: the queue position of an unfinished job.
    """
    texts = {"prompt": None, "negative_prompt": None} if job.erased_at else {}
    return schemas.Job(
        **params_view(job) | texts,
        id=job.id,
        state=job.state,
        metadata=dict(job.tenant_metadata or {}),
        replay_of=job.replay_of,
        megapixel_steps=float(job.megapixel_steps),
        attempt=job.attempt,
        failure=_failure(job),
        warnings=_warnings(job),
        prompt_tokens=job.prompt_tokens,
        truncated_tokens=job.truncated_tokens,
        created_at=job.accepted_at,
        start_by=job.start_by,
        started_at=job.started_at,
        rendered_at=job.rendered_at,
        finished_at=job.finished_at,
        run_by=job.run_by,
        erased_at=job.erased_at,
        progress=_progress(job, steps),
        queue=queue_view(place),
        timing=_timing(job),
        cost=_cost(job),
        images=[_image_view(job, image) for image in job.images],
        urls=urls_view(job.id),
    )


def status_view(
    job: Job,
    steps: Sequence[Step] = (),
    place: QueuePlace | None = None,
) -> schemas.JobStatus:
    """Show the members of a job that change while a client waits; arguments as for `job_view`."""
    return schemas.JobStatus(
        id=job.id,
        state=job.state,
        attempt=job.attempt,
        progress=_progress(job, steps),
        queue=queue_view(place),
        images_done=sum(image.state == ImageState.STORED for image in job.images),
        n=job.num_images,
        failure=_failure(job),
        warnings=_warnings(job),
        erased_at=job.erased_at,
        urls=urls_view(job.id),
    )


def urls_view(job_id: UUID) -> schemas.JobUrls:
    """Return the URLs of a job, of its status, and of the actions on it."""
    own = url_for("jobs.show_job", job_id=job_id)
    return schemas.JobUrls(
        self=own,
        status=f"{own}/status",
        cancel=f"{own}/cancel",
        replay=f"{own}/replay",
        events=f"{own}/events",
    )


def params_view(of: Job | JobDocument | Resolved) -> dict[str, Any]:
    """Return every parameter of a job, or of an estimated one."""
    return {**members_of(of), "size": size_of(of)}


def _image_view(job: Job | JobDocument, image: Image | ImageDocument) -> schemas.Image:
    artifact = image.artifact
    is_there = artifact is not None and artifact.erased_at is None
    return schemas.Image(
        index=image.index,
        seed=image.seed,
        state=image.state,
        url=image_url(job.id, image.index) if is_there else None,
        pixels_sha256=artifact.pixels_sha256 if artifact else None,
        content_sha256=artifact.content_sha256 if artifact else None,
        content_type=artifact.content_type if artifact else None,
        size_bytes=artifact.size_bytes if artifact else None,
        width_px=artifact.width_px if artifact else None,
        height_px=artifact.height_px if artifact else None,
    )


def image_url(job_id: UUID, index: int) -> str:
    return url_for("jobs.show_image", job_id=job_id, index=index)


def _progress(job: Job | JobDocument, steps: Sequence[Step]) -> schemas.Progress | None:
    """Sum up the steps of all images: those done, and those to do.

    Steps that an initial picture makes unnecessary count as neither.
    """
    has_come_to_nothing = job.state in FINAL_STATES and job.state != JobState.SUCCEEDED
    if job.state == JobState.QUEUED or has_come_to_nothing:
        return None
    done = dict.fromkeys(range(job.num_images), 0)
    to_do = dict.fromkeys(done, image_steps(job))
    for step in steps:
        to_do[step.index] = step.num_steps
        done[step.index] = min(step.step, step.num_steps)
    for image in job.images:
        if image.state != ImageState.PENDING:
            to_do[image.index] = done[image.index] = image.steps_done
    return schemas.Progress(
        step=sum(done.values()),
        num_steps=sum(to_do.values()),
        images_done=sum(image.state == ImageState.STORED for image in job.images),
    )


def queue_view(place: QueuePlace | None) -> schemas.QueuePlace | None:
    """Show a job's queue position; None for a job without one."""
    if place is None:
        return None
    return schemas.QueuePlace(
        jobs_ahead=place.jobs_ahead,
        eta_p50_s=round(place.eta.p50_s, 2),
        eta_p90_s=round(place.eta.p90_s, 2),
    )


def _failure(job: Job | JobDocument) -> schemas.Failure | None:
    """Show the failure without internal details: those stay in the attempts table."""
    if job.failure_code is None:
        return None
    detail = told_detail(job.failure_code, job.failure_detail)
    return schemas.Failure(code=job.failure_code, detail=detail)


def _warnings(job: Job | JobDocument) -> list[schemas.JobWarning]:
    return cast("list[schemas.JobWarning]", job.warnings or [])


def _cost(job: Job | JobDocument) -> schemas.Cost | None:
    if job.cost is None:
        return None
    return schemas.Cost(
        gpu_seconds=round(job.device_seconds, 6),
        amount=str(job.cost),
        currency=job.currency,
    )


def _timing(job: Job | JobDocument) -> schemas.Timing:
    return schemas.Timing(
        queue_s=_seconds(job.accepted_at, job.started_at),
        render_s=_seconds(job.started_at, job.rendered_at),
        store_s=_seconds(job.rendered_at, job.finished_at),
        total_s=_seconds(job.accepted_at, job.finished_at),
    )


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return round((end - start).total_seconds(), 4) if start and end else None
