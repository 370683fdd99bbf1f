"""Wait for a job's end on behalf of a client, with no connection held meanwhile."""

import uuid

from app.auth import caller
from app.gateway import gateway
from app.problems import JobNotFound
from models import jobs
from models.database import transaction
from models.states import FINAL_STATES
from models.tables import Job


def found(job_id: uuid.UUID) -> Job:
    """The caller's job. Raises JobNotFound."""
    with transaction(gateway().database) as session:
        job = jobs.find(session, job_id, tenant_id=caller().tenant_id)
    if job is None:
        raise JobNotFound(f"There is no job {job_id}.")
    return job


def watched(job_id: uuid.UUID, wait_s: float) -> Job:
    """The caller's job, as it is once it has ended, or after `wait_s`. Raises JobNotFound."""
    job = found(job_id)
    if wait_s and job.state not in FINAL_STATES:
        gateway().endings.wait(job_id, wait_s, lambda: _has_ended(job_id))
        job = found(job_id)
    return job


def _has_ended(job_id: uuid.UUID) -> bool:
    with transaction(gateway().database) as session:
        return jobs.state_of(session, job_id) in FINAL_STATES
