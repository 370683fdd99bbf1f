"""Cancel a job or erase it, for its tenant."""

import uuid

import structlog
from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import JobAlreadyFinished
from app.runtime import Runtime
from app.services.jobs import not_found
from app.services.tidying import ask_to_tidy
from edges import telemetry
from models import erasing, jobs
from models.database import run_transaction
from models.tables import Job

log = structlog.get_logger(__name__)


def cancel(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> Job:
    """Cancel the caller's job; harmless when repeated.

    Raises JobNotFound, and JobAlreadyFinished if it has ended otherwise.
    """

    def end(session: Session) -> Job | None:
        return jobs.cancel(session, job_id, tenant_id=caller.tenant_id, actor=caller.actor)

    try:
        job = run_transaction(runtime.database, end)
    except jobs.JobAlreadyFinished as error:
        detail = f"The job has already ended: it is {error.state}."
        raise JobAlreadyFinished(detail, state=error.state) from None
    if job is None:
        raise not_found(job_id)
    runtime.statuses.forget(job.tenant_id, job.id)
    runtime.ended.notify_ended(job)
    return job


def erase(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> None:
    """Delete prompts, metadata and images of the caller's job; harmless when repeated.

    The fact that the job existed, and what it cost, are kept. An unfinished job is canceled first.
    The data leaves the database at once, and all other places as soon as possible. Raises
    JobNotFound.
    """

    def end(session: Session) -> Job | None:
        return erasing.erase(session, job_id, tenant_id=caller.tenant_id, actor=caller.actor)

    job = run_transaction(runtime.database, end)
    if job is None:
        raise not_found(job_id)
    runtime.statuses.forget(job.tenant_id, job.id)
    runtime.ended.notify_erased(job)
    if any(image.artifact is not None for image in job.images):
        ask_to_tidy(runtime)
    telemetry.JOBS_ERASED.inc()
    log.info("job_erased", job_id=str(job_id))
