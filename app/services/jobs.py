"""Read the caller's jobs."""

import uuid
from collections.abc import Sequence

from app.caller import Caller
from app.problems import Erased, ImageNotFound, ImageNotReady, JobNotFound
from app.runtime import Runtime
from models import jobs, listing
from models.database import transaction
from models.listing import JobFilter, Page
from models.tables import Artifact, Job
from policy.states import ACTIVE_STATES


def find(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> Job:
    """Return the caller's job, with its images. Raises JobNotFound."""
    with transaction(runtime.database) as session:
        job = jobs.find(session, job_id, tenant_id=caller.tenant_id)
    if job is None:
        raise not_found(job_id)
    return job


def find_with_images(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> Job:
    """Return the changing members of the caller's job. Raises JobNotFound."""
    with transaction(runtime.database) as session:
        job = jobs.find_with_images(session, job_id, tenant_id=caller.tenant_id)
    if job is None:
        raise not_found(job_id)
    return job


def state_of(runtime: Runtime, job_id: uuid.UUID) -> str | None:
    """Return the state of a job; the caller must have been found to own it."""
    with transaction(runtime.database) as session:
        return jobs.state_of(session, job_id)


def page(runtime: Runtime, caller: Caller, job_filter: JobFilter, *, limit: int) -> Page:
    """List up to `limit` of the caller's jobs that pass the filter, newest first."""
    with transaction(runtime.database) as session:
        return listing.page(session, job_filter, tenant_id=caller.tenant_id, limit=limit)


def find_many(
    runtime: Runtime, caller: Caller, job_ids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, Job]:
    """Return those of the caller's jobs that exist, by id."""
    with transaction(runtime.database) as session:
        return listing.find_many(session, job_ids, tenant_id=caller.tenant_id)


def stored_image(runtime: Runtime, caller: Caller, job_id: uuid.UUID, index: int) -> Artifact:
    """Return the artifact of an image of the job.

    Raises JobNotFound, ImageNotFound, ImageNotReady, Erased.
    """
    job = find(runtime, caller, job_id)
    image = next((image for image in job.images if image.index == index), None)
    if image is None:
        raise ImageNotFound(f"The images of the job have the indexes 0 to {job.num_images - 1}.")
    if job.erased_at is not None:
        raise Erased("The images of this job were deleted.")
    if image.artifact is None:
        retry_after_s = 1 if job.state in ACTIVE_STATES else None
        detail = f"The job is {job.state}; this image is not stored."
        raise ImageNotReady(detail, retry_after_s=retry_after_s, state=job.state)
    return image.artifact


def not_found(job_id: uuid.UUID) -> JobNotFound:
    """Make the problem of a job that does not exist or is another tenant's."""
    return JobNotFound(f"There is no job {job_id}.")
