"""Decide what an error means for a job: fail now, give back without counting, or count a try.

`OutOfDeviceMemory` is tried again, at last alone on the device. An error that no retry helps fails
the job at once. An outage or the worker's own fault does not count as a try; an unplanned error
does.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from dispatch.endings import EndedJobs
from edges import telemetry
from edges.handoff import HandoffUnavailable
from engine.errors import (
    DeadlinePassed,
    EngineDied,
    EngineError,
    EngineStopped,
    ImageNotFinite,
    OutOfDeviceMemory,
    UnknownCheckpoint,
    UnsupportedRequest,
)
from models import jobs, leases, revisions
from models.leases import Lease, LeaseLost
from models.tables import Job
from policy.current import CurrentFleet
from policy.failures import FailureCode, is_our_fault
from policy.revisions import Fate, fate
from tasks.health import Health
from tasks.held import HeldLease
from tasks.inputs import InputGone, InputsMissing

log = structlog.get_logger(__name__)

PATIENCE_S = (0.2, 0.5, 1, 2, 4)  # waits between tries to write what was rendered or decided
# As long as a failover may take; to render again costs more than to wait.
PIXELS_PATIENCE_S = (*PATIENCE_S, 5, 5, 5, 5)
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
AWAY = (HandoffUnavailable, InputsMissing, *DATABASE_AWAY)  # a part of Darkroom, for now
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Decide for one worker, and write each decision down."""

    database: Database
    ended: EndedJobs
    health: Health
    current: CurrentFleet
    max_attempts: int

    def decide(self, held: HeldLease, error: BaseException) -> None:
        """Write down what becomes of the job; nothing if the lease was lost."""
        telemetry.RENDER_ERRORS.labels(type(error).__name__).inc()
        _log(held, error)
        if isinstance(error, EngineStopped):
            self.health.give_up(str(error))  # a worker without its device thread is of no use
        is_ours = is_unplanned(error) and self.health.is_at_fault(str(held.lease.job_id))
        write = partial(self._write, held=held, error=error, is_ours=is_ours)
        with suppress(LeaseLost):
            persist(lambda: self.ended.run_ending(self.database, write), DATABASE_AWAY)

    def _write(
        self, session: Session, *, held: HeldLease, error: BaseException, is_ours: bool
    ) -> Job:
        lease = held.lease
        if isinstance(error, UnknownCheckpoint) and (job := self._hand_over(session, lease)):
            return job
        code = failure_code(error, is_exclusive=held.is_exclusive)
        if code is not None:
            return leases.fail(session, lease, code=code, detail=_detail(lease.job, error))
        was_stopped = isinstance(error, EngineStopped) and not isinstance(error, EngineDied)
        if is_ours or was_stopped or isinstance(error, AWAY):
            return leases.give_back(
                session,
                lease,
                reason=type(error).__name__,
                lacks_inputs=isinstance(error, InputsMissing),
            )
        is_named = isinstance(error, EngineError)
        detail = str(error) if is_named else f"{type(error).__name__}: {error}"
        return leases.count_error(
            session, lease, detail=detail[:500], max_attempts=self.max_attempts
        )

    def _hand_over(self, session: Session, lease: Lease) -> Job | None:
        """Give the job to those that serve its model now; None if nobody does.

        The worker's engine and the fleet may be of two revisions.
        """
        job = lease.job
        kind = revisions.kind_of(session, job)
        decided, pool = fate(kind, self.current.fleet)
        if decided is Fate.FAILS and not self._is_behind(session):
            return None
        returned = leases.give_back(session, lease, reason="another worker serves its model")
        if decided is Fate.MOVES:
            jobs.move(session, job.id, pool)
        return returned

    def _is_behind(self, session: Session) -> bool:
        """Tell whether a newer revision than this worker's is in force: it may serve the model."""
        return revisions.newest_number(session) > self.current.number


def _log(held: HeldLease, error: BaseException) -> None:
    """Log the error; with a traceback unless the request itself is at fault."""
    code = failure_code(error, is_exclusive=held.is_exclusive)
    if code is not None and not is_our_fault(code):
        log.info("render_refused", attempt=held.lease.attempt, code=code, detail=str(error)[:300])
    else:
        log.warning("render_failed", attempt=held.lease.attempt, exc_info=error)


def failure_code(error: BaseException, *, is_exclusive: bool) -> FailureCode | None:
    """Return why no retry would help; None if one may. is_exclusive: alone on the device."""
    match error:
        case UnsupportedRequest():
            return FailureCode.UNSUPPORTED
        case UnknownCheckpoint():
            return FailureCode.MODEL_GONE
        case InputGone():
            return FailureCode.INPUT_GONE
        case ImageNotFinite():
            return FailureCode.NOT_FINITE
        case DeadlinePassed():
            return FailureCode.RUN_DEADLINE
        case OutOfDeviceMemory() if is_exclusive:
            return FailureCode.OUT_OF_MEMORY
    return None


def _detail(job: Job, error: BaseException) -> str:
    """Say why no retry helps; nothing of other models, which the tenant may not know of."""
    if isinstance(error, UnknownCheckpoint):
        return f"version {job.model_version} of model {job.model} is not offered any more"
    return str(error)


def is_unplanned(error: BaseException) -> bool:
    """Tell whether the error is none of those that the code foresees."""
    return type(error) is EngineError or not isinstance(error, (EngineError, InputGone, *AWAY))


def _never() -> bool:
    return False


def persist(
    act: Callable[[], Result],
    passing: type[Exception] | tuple[type[Exception], ...],
    *,
    patience_s: Sequence[float] | None = None,
    is_vain: Callable[[], bool] = _never,
) -> Result:
    """Call `act`; when it raises `passing`, wait and call it again, unless `is_vain()`.

    patience_s: the waits, by default PATIENCE_S; after the last one an error is raised.
    """
    for wait_s in PATIENCE_S if patience_s is None else patience_s:
        try:
            return act()
        except passing as error:
            if is_vain():
                raise
            log.warning("write_tried_again", reason=type(error).__name__)
            time.sleep(wait_s)
    return act()
