"""Hold a job as answers show it, whether it was just accepted or was read from its row.

A job that was just written is not read back: loading its rows through the ORM would cost more than
the rest of the answer.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import Any

from models.accepting import AcceptedRow, NewJob
from models.tables import Artifact, Job
from policy.params import Resolved
from policy.states import ImageState, JobState


@dataclass(frozen=True, kw_only=True)
class ImageDocument:
    """One image of a job, with its stored artifact if there is one."""

    index: int
    seed: int
    state: str = ImageState.PENDING
    steps_done: int = 0
    artifact: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class JobDocument(Resolved):
    """A job with every parameter, its state and its images; the names are those of the columns.

    predicted_s, device_seconds: of all its images.  tenant_metadata: the tenant's own.
    """

    id: uuid.UUID
    tenant_id: uuid.UUID
    state: str = JobState.QUEUED
    attempt: int = 0
    tenant_metadata: Mapping[str, str] | None
    replay_of: uuid.UUID | None
    megapixel_steps: Decimal
    steps_per_image: int | None
    predicted_s: float
    release_tag: float
    warnings: Sequence[Mapping[str, Any]] | None
    accepted_at: datetime
    start_by: datetime
    started_at: datetime | None = None
    rendered_at: datetime | None = None
    finished_at: datetime | None = None
    run_by: datetime | None = None
    erased_at: datetime | None = None
    failure_code: str | None = None
    failure_detail: str | None = None
    prompt_tokens: int | None = None
    truncated_tokens: int | None = None
    device_seconds: float = 0.0
    cost: Decimal | None = None
    currency: str
    images: Sequence[ImageDocument]


_COLUMNS = tuple(field.name for field in fields(JobDocument) if field.name != "images")
_IMAGE_COLUMNS = tuple(field.name for field in fields(ImageDocument))


def of_row(job: Job) -> JobDocument:
    """Convert a row that was read with its images and their artifacts."""
    read: dict[str, Any] = {name: getattr(job, name) for name in _COLUMNS}
    images = [
        ImageDocument(**{name: getattr(image, name) for name in _IMAGE_COLUMNS})
        for image in job.images
    ]
    return JobDocument(**read, images=images)


def of_accepted(
    new: NewJob, row: AcceptedRow, *, tenant_id: uuid.UUID, currency: str
) -> JobDocument:
    """Build the document of a job that was just inserted, equal to what its row holds."""
    params = new.params
    return JobDocument(
        **vars(params),
        id=row.id,
        tenant_id=tenant_id,
        tenant_metadata=dict(new.tenant_metadata) if new.tenant_metadata else None,
        replay_of=new.replay_of,
        megapixel_steps=new.megapixel_steps,
        steps_per_image=new.steps_per_image,
        predicted_s=new.predicted_s,
        release_tag=row.release_tag,
        warnings=list(new.warnings) or None,
        accepted_at=row.accepted_at,
        start_by=row.start_by,
        currency=currency,
        images=[
            ImageDocument(index=index, seed=params.seed + index)
            for index in range(params.num_images)
        ],
    )
