"""How rows look to a client. Every resolved parameter of a job is echoed, so an answer is enough to ask for the image again."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flask import url_for

from app.outlook import QueuePlace
from edges.progress import Step
from models.states import FINAL_STATES, ImageState, JobState
from models.tables import Image, Job


def job_view(job: Job, steps: Sequence[Step] = (), place: QueuePlace | None = None) -> dict[str, Any]:
    """A job with its images; `steps` is what is known of a running one, `place` where an unfinished one stands."""
    return {
        "id": str(job.id),
        "object": "job",
        "state": job.state,
        "tier": job.tier,
        "model": job.model,
        "model_version": job.model_version,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "size": f"{job.width_px}x{job.height_px}",
        "steps": job.num_steps,
        "guidance": job.guidance,
        "sampler": job.sampler,
        "seed": job.seed,
        "n": job.num_images,
        "output_format": job.output_format,
        "init_image": _id(job.init_file_id),
        "mask": _id(job.mask_file_id),
        "control_image": _id(job.control_file_id),
        "strength": job.strength,
        "adapters": job.adapters or [],
        "precision": job.precision,
        "determinism": job.determinism,
        "bucket_rows": job.bucket_rows,
        "metadata": job.labels or {},
        "replay_of": _id(job.replay_of),
        "megapixel_steps": float(job.megapixel_steps),
        "attempt": job.attempt,
        "failure": {"code": job.failure_code, "detail": _failure_detail(job)} if job.failure_code else None,
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
        "urls": {
            "self": url_for("jobs.show_job", job_id=job.id),
            "cancel": url_for("jobs.cancel_job", job_id=job.id),
            "events": url_for("events.follow_job", job_id=job.id),
        },
    }


def _image_view(job: Job, image: Image) -> dict[str, Any]:
    view: dict[str, Any] = {"index": image.index, "seed": image.seed, "state": image.state}
    names = ("pixels_sha256", "content_sha256", "content_type", "size_bytes", "width_px", "height_px")
    view["url"] = image_url(job.id, image.index) if image.artifact else None
    return view | {name: getattr(image.artifact, name) if image.artifact else None for name in names}


def image_url(job_id: UUID, index: int) -> str:
    return url_for("jobs.show_image", job_id=job_id, index=index)


def _progress(job: Job, steps: Sequence[Step]) -> dict[str, int] | None:
    """Steps of all images added up: what is done, of what is to do."""
    if job.state == JobState.QUEUED or (job.state in FINAL_STATES and job.state != JobState.SUCCEEDED):
        return None
    done = {image.index: job.num_steps for image in job.images if image.state != ImageState.PENDING}
    for step in steps:
        done.setdefault(step.index, min(step.step, job.num_steps))
    stored = sum(image.state == ImageState.STORED for image in job.images)
    return {"step": sum(done.values()), "num_steps": job.num_steps * job.num_images, "images_done": stored}


def queue_view(place: QueuePlace | None) -> dict[str, Any] | None:
    """Jobs of the tier that go before it (None once it runs), and seconds until its images are stored: the median, and nine in ten."""
    if place is None:
        return None
    return {"jobs_ahead": place.jobs_ahead, "eta_p50_s": round(place.eta.p50_s, 2), "eta_p90_s": round(place.eta.p90_s, 2)}


def _failure_detail(job: Job) -> str | None:
    """What the tenant may know: our own faults keep their insides in the attempts table."""
    return job.failure_detail if job.failure_code in ("unsupported", "not_finite", "out_of_memory", "run_deadline") else None


def _cost(job: Job) -> dict[str, Any] | None:
    if job.cost is None:
        return None
    return {"gpu_seconds": round(job.device_seconds, 6), "amount": str(job.cost), "currency": job.currency}


def _id(value: UUID | None) -> str | None:
    return str(value) if value else None


def _instant(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return round((end - start).total_seconds(), 4) if start and end else None
