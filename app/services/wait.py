"""Wait for a job's end on behalf of a client, with no connection to the database held meanwhile.

A client that waits keeps a thread, so a process lets so many wait and no more, and a tenant its share of them
(app/live/capacity.py). It is let
go when it has left, and when its key is revoked.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from flask import request

from app.http import uploads
from app.http.auth import check_key
from app.http.context import caller, runtime
from app.problems import JobNotFound, WaitsExhausted
from edges import telemetry
from models import jobs
from models.database import transaction
from models.tables import Job
from policy.states import FINAL_STATES


def found(job_id: uuid.UUID) -> Job:
    """The caller's job. Raises JobNotFound."""
    with transaction(runtime().database) as session:
        job = jobs.find(session, job_id, tenant_id=caller().tenant_id)
    if job is None:
        raise JobNotFound(f"There is no job {job_id}.")
    return job


@contextmanager
def admitted(wait_s: int) -> Iterator[int]:
    """How long the caller may wait: `wait_s`, or 0 where as many wait as may."""
    holding = runtime().waits.take(caller().tenant_id) if wait_s else None
    if wait_s and holding is None:
        telemetry.SHED.labels("waits_exhausted").inc()
    try:
        yield wait_s if holding is not None else 0
    finally:
        if holding is not None:
            holding.release()


@contextmanager
def required() -> Iterator[None]:
    """Let the caller wait within. Raises WaitsExhausted where as many wait as may."""
    with admitted(1) as may_wait:
        if not may_wait:
            detail = "As many image calls wait here as may, or as many of your tenant. No job was made: ask again, or POST /v1/jobs."
            raise WaitsExhausted(detail, retry_after_s=2)
        yield


def watched(job_id: uuid.UUID, wait_s: float) -> Job:
    """The caller's job, as it is once it has ended, or after `wait_s`. Raises JobNotFound; Unauthenticated when the key ends meanwhile."""
    job = found(job_id)
    if wait_s and job.state not in FINAL_STATES:
        uploads.release()  # whatever the job started from is stored by now
        runtime().endings.wait(job_id, wait_s, lambda: _has_ended(job_id), _is_in_vain)
        check_key()
        job = found(job_id)
    return job


def _is_in_vain() -> bool:
    """Whether nobody is to hear the answer: the key is not live any more, or the client has left."""
    has_left = getattr(request.environ.get("gunicorn.socket"), "has_left", None)  # deploy/connections.py
    return not runtime().keyring.is_live(caller().kid) or (has_left is not None and has_left())


def _has_ended(job_id: uuid.UUID) -> bool:
    with transaction(runtime().database) as session:
        return jobs.state_of(session, job_id) in FINAL_STATES
