"""Delete what a job was about, from the database at once and from everywhere else as soon as can be."""

import uuid
from contextlib import suppress

import structlog

from app.http.context import caller, runtime
from edges import telemetry
from edges.broker import BrokerUnavailable
from edges.snapshots import SnapshotsUnavailable
from models import erasing
from models.database import run_transaction
from models.tables import Job
from policy import queues

log = structlog.get_logger(__name__)


def erase(job_id: uuid.UUID) -> bool:
    """Erase the caller's job, canceled first if it is under way; False if there is none. Harmless when repeated."""
    parts, asking = runtime(), caller()
    own = {"tenant_id": asking.tenant_id, "actor": asking.actor}
    job = run_transaction(parts.database, lambda session: erasing.erase(session, job_id, **own))
    if job is None:
        return False
    parts.statuses.forget(asking.tenant_id, job_id)
    parts.news.tell_cancel(job_id)
    parts.news.tell_ending(job_id)
    _forget_traces(job)
    telemetry.JOBS_ERASED.inc()
    log.info("job_erased", job_id=str(job_id))
    return True


def _forget_traces(job: Job) -> None:
    """Pixels, snapshots and news of the job in Redis, and its objects. What cannot be reached now, the sweeper finds."""
    parts = runtime()
    for image in job.images:
        for attempt in {image.handed_off_attempt, job.attempt} - {None}:
            parts.handoff.drop(job.id, image.index, attempt)
    parts.news.forget(job.id)
    with suppress(SnapshotsUnavailable):
        parts.snapshots.drop([job.id])
    if any(image.artifact is not None for image in job.images):
        with suppress(BrokerUnavailable):
            parts.broker.ask_for(queues.TIDY_STORE, queues.results_queue(parts.fleet, parts.fleet.tiers_by_rank[-1]))
