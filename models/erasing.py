"""Erase the content of a job that its tenant has deleted.

It is gone from every row; the job's history and the digests of its images stay. Objects are marked
here to be deleted from the store; pixels and snapshots in Redis are the caller's, after the commit.
"""

import uuid

from sqlalchemy import func
from sqlalchemy.orm import Session

from models import audit, jobs, uploads
from models.audit_events import EventName
from models.tables import Job
from policy.states import ACTIVE_STATES


def erase(session: Session, job_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str) -> Job | None:
    """Empty the job of prompts, metadata and images, canceled first if it is active.

    None if the tenant has no such job. Harmless when repeated.
    """
    job = jobs.lock(session, job_id, tenant_id=tenant_id, options=jobs.WITHOUT_TEXTS)
    if job is None or job.erased_at is not None:
        return job
    artifacts = [image.artifact for image in job.images if image.artifact is not None]
    for artifact in artifacts:
        artifact.erased_at = func.clock_timestamp()
    session.flush()
    for object_key in sorted({artifact.object_key for artifact in artifacts}):
        # Before the flow is locked, in the order in which `jobs.store` takes these locks.
        uploads.give_up(session, object_key)
    if job.state in ACTIVE_STATES:
        jobs.cancel_locked(session, job, actor=actor)
    job.prompt = ""
    job.negative_prompt = ""
    job.tenant_metadata = None
    job.erased_at = func.clock_timestamp()
    audit.append(
        session,
        EventName.JOB_CONTENT_ERASED,
        chain=tenant_id,
        actor=actor,
        job_id=job.id,
        images=len(artifacts),
    )
    session.refresh(job, ["erased_at"])
    return job
