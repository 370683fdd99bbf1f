"""End a job on its tenant's behalf: take it back, or delete what it was about."""

import uuid
from contextlib import suppress

import structlog
from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import JobAlreadyFinished
from app.runtime import Runtime
from app.services.jobs import not_found
from app.services.tidying import ask_to_tidy
from edges import telemetry
from edges.snapshots import SnapshotsUnavailable
from models import erasing, jobs
from models.database import run_transaction
from models.tables import Job

log = structlog.get_logger(__name__)


def cancel(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> Job:
    """Take the caller's job back; harmless when repeated. Raises JobNotFound; JobAlreadyFinished if it ended otherwise."""

    def end(session: Session) -> Job | None:
        return jobs.cancel(session, job_id, tenant_id=caller.tenant_id, actor=caller.actor)

    try:
        job = run_transaction(runtime.database, end)
    except jobs.JobAlreadyFinished as error:
        raise JobAlreadyFinished(f"The job is {error.state} and stays so.", state=error.state) from None
    if job is None:
        raise not_found(job_id)
    _tell(runtime, job)
    return job


def erase(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> None:
    """Delete what the caller's job was about: prompts, metadata, images. That it was there, and what it cost, stays.

    It is canceled first if it is under way. Gone from the database at once, and from everywhere else as soon as can be.
    Harmless when repeated. Raises JobNotFound.
    """

    def end(session: Session) -> Job | None:
        return erasing.erase(session, job_id, tenant_id=caller.tenant_id, actor=caller.actor)

    job = run_transaction(runtime.database, end)
    if job is None:
        raise not_found(job_id)
    _tell(runtime, job)
    _forget_traces(runtime, job)
    telemetry.JOBS_ERASED.inc()
    log.info("job_erased", job_id=str(job_id))


def _tell(runtime: Runtime, job: Job) -> None:
    """Tell the worker that may render the job, and whoever waits for its end."""
    runtime.statuses.forget(job.tenant_id, job.id)
    runtime.news.tell_cancel(job.id)
    runtime.news.tell_ending(job.id)


def _forget_traces(runtime: Runtime, job: Job) -> None:
    """Delete pixels, snapshots and news of the job in Redis, and its objects. What cannot be reached now, the sweeper finds."""
    for image in job.images:
        for attempt in {image.handed_off_attempt or job.attempt, job.attempt}:
            runtime.handoff.drop(job.id, image.index, attempt)
    runtime.news.forget(job.id)
    with suppress(SnapshotsUnavailable):
        runtime.snapshots.drop([job.id])
    if any(image.artifact is not None for image in job.images):
        ask_to_tidy(runtime)
