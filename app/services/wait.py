"""Wait for a job's end on behalf of a client, without holding a database connection.

A waiting client occupies a thread. So a process has a limited number of places, shared among
tenants (app/live/capacity.py). The wait ends early when the client has left, or when its key is
revoked.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.caller import Caller
from app.live.keyring import NO_LIVE_KEY
from app.problems import Unauthenticated, WaitsExhausted
from app.runtime import Runtime
from app.services import jobs
from edges import telemetry
from models.tables import Job
from policy.states import FINAL_STATES


@contextmanager
def waiting_place(runtime: Runtime, caller: Caller, wait_s: int) -> Iterator[int]:
    """Reserve a place to wait; yield `wait_s`, or 0 if no place is free."""
    holding = runtime.waits.take(caller.tenant_id) if wait_s else None
    if wait_s and holding is None:
        telemetry.SHED.labels("waits_exhausted").inc()
    try:
        yield wait_s if holding is not None else 0
    finally:
        if holding is not None:
            holding.release()


@contextmanager
def require_waiting_place(runtime: Runtime, caller: Caller) -> Iterator[None]:
    """Reserve a place to wait. Raises WaitsExhausted if none is free."""
    with waiting_place(runtime, caller, 1) as may_wait:
        if not may_wait:
            detail = (
                "Too many image calls are waiting, in this process or for your tenant. No job was"
                " created: send the request again, or use POST /v1/jobs."
            )
            raise WaitsExhausted(detail, retry_after_s=2)
        yield


def wait_for_end(
    runtime: Runtime, caller: Caller, job: Job, wait_s: float, *, has_left: Callable[[], bool]
) -> Job:
    """Return the caller's job once it has ended, or as it is after `wait_s`.

    has_left: tells whether the client has gone, so that nobody needs the answer. Raises
    JobNotFound; Unauthenticated when the key is revoked or expires meanwhile.
    """
    if not wait_s or job.state in FINAL_STATES:
        return job

    def is_in_vain() -> bool:
        return not runtime.keyring.is_live(caller.kid) or has_left()

    runtime.endings.wait(job.id, wait_s, lambda: _has_ended(runtime, job.id), is_in_vain)
    if not runtime.keyring.is_live(caller.kid):
        raise Unauthenticated(NO_LIVE_KEY)
    return jobs.find(runtime, caller, job.id)


def _has_ended(runtime: Runtime, job_id: uuid.UUID) -> bool:
    return jobs.state_of(runtime, job_id) in FINAL_STATES
