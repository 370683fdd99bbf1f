"""How rows look to a client. Every resolved parameter of a job is echoed, so an answer is enough to ask for the image again."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flask import url_for

from app.documents import ImageDocument, JobDocument
from app.forecast import QueuePlace
from edges.progress import Step
from models.tables import Image, Job
from policy.failures import told_detail
from policy.params import Resolved, members_of, size_of
from policy.states import FINAL_STATES, ImageState, JobState
from policy.steps import image_steps


def job_view(job: Job | JobDocument, steps: Sequence[Step] = (), place: QueuePlace | None = None) -> dict[str, Any]:
    """A job with its images; `steps` is what is known of a running one, `place` where an unfinished one stands."""
    return {
        "id": str(job.id),
        "object": "job",
        "state": job.state,
        **params_view(job),
        **({"prompt": None, "negative_prompt": None} if job.erased_at else {}),
        "metadata": job.tenant_metadata or {},
        "replay_of": _id(job.replay_of),
        "megapixel_steps": float(job.megapixel_steps),
        "attempt": job.attempt,
        "failure": _failure(job),
        "warnings": job.warnings or [],
        "created_at": _instant(job.accepted_at),
        "start_by": _instant(job.start_by),
        "started_at": _instant(job.started_at),
        "rendered_at": _instant(job.rendered_at),
        "finished_at": _instant(job.finished_at),
        "run_by": _instant(job.run_by),
        "erased_at": _instant(job.erased_at),
        "progress": _progress(job, steps),
        "queue": queue_view(place),
        "timing": {
            "queue_s": _seconds(job.accepted_at, job.started_at),
            "render_s": _seconds(job.started_at, job.rendered_at),
            "store_s": _seconds(job.rendered_at, job.finished_at),
            "total_s": _seconds(job.accepted_at, job.finished_at),
        },
        "cost": _cost(job),
        "images": [_image_view(job, image) for image in job.images],
        "urls": urls_view(job.id),
    }


def status_view(job: Job, steps: Sequence[Step] = (), place: QueuePlace | None = None) -> dict[str, Any]:
    """The little that changes while one waits for a job."""
    return {
        "id": str(job.id),
        "object": "job.status",
        "state": job.state,
        "attempt": job.attempt,
        "progress": _progress(job, steps),
        "queue": queue_view(place),
        "images_done": sum(image.state == ImageState.STORED for image in job.images),
        "n": job.num_images,
        "failure": _failure(job),
        "warnings": job.warnings or [],
        "erased_at": _instant(job.erased_at),
        "urls": urls_view(job.id),
    }


def urls_view(job_id: UUID) -> dict[str, str]:
    """Where a job, what changes of it, and what can be done with it are found."""
    own = url_for("jobs.show_job", job_id=job_id)
    return {"self": own} | {name: f"{own}/{name}" for name in ("status", "cancel", "replay", "events")}


def params_view(of: Job | JobDocument | Resolved) -> dict[str, Any]:
    """Every parameter of a job, or of one that might be."""
    return {**members_of(of), "size": size_of(of)}


def _image_view(job: Job | JobDocument, image: Image | ImageDocument) -> dict[str, Any]:
    view: dict[str, Any] = {"index": image.index, "seed": image.seed, "state": image.state}
    names = ("pixels_sha256", "content_sha256", "content_type", "size_bytes", "width_px", "height_px")
    is_there = image.artifact is not None and image.artifact.erased_at is None
    view["url"] = image_url(job.id, image.index) if is_there else None
    return view | {name: getattr(image.artifact, name) if image.artifact else None for name in names}


def image_url(job_id: UUID, index: int) -> str:
    return url_for("jobs.show_image", job_id=job_id, index=index)


def _progress(job: Job | JobDocument, steps: Sequence[Step]) -> dict[str, int] | None:
    """Steps of all images added up: what is done, of what is to do; what a picture that they start from makes needless is neither."""
    if job.state == JobState.QUEUED or (job.state in FINAL_STATES and job.state != JobState.SUCCEEDED):
        return None
    done = dict.fromkeys(range(job.num_images), 0)
    to_do = dict.fromkeys(done, image_steps(job))
    for step in steps:
        to_do[step.index], done[step.index] = step.num_steps, min(step.step, step.num_steps)
    for image in job.images:
        if image.state != ImageState.PENDING:
            to_do[image.index] = done[image.index] = image.steps_done
    stored = sum(image.state == ImageState.STORED for image in job.images)
    return {"step": sum(done.values()), "num_steps": sum(to_do.values()), "images_done": stored}


def queue_view(place: QueuePlace | None) -> dict[str, Any] | None:
    """Jobs of the tier that go before it (None once it runs), and seconds until its images are stored: the median, and nine in ten."""
    if place is None:
        return None
    return {"jobs_ahead": place.jobs_ahead, "eta_p50_s": round(place.eta.p50_s, 2), "eta_p90_s": round(place.eta.p90_s, 2)}


def _failure(job: Job | JobDocument) -> dict[str, Any] | None:
    """What the tenant may know: our own faults keep their insides in the attempts table."""
    if job.failure_code is None:
        return None
    return {"code": job.failure_code, "detail": told_detail(job.failure_code, job.failure_detail)}


def _cost(job: Job | JobDocument) -> dict[str, Any] | None:
    if job.cost is None:
        return None
    return {"gpu_seconds": round(job.device_seconds, 6), "amount": str(job.cost), "currency": job.currency}


def _id(value: UUID | None) -> str | None:
    return str(value) if value else None


def _instant(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return round((end - start).total_seconds(), 4) if start and end else None
