"""Decide what an error means for a job: fail now, give back without counting, or count a try.

`OutOfDeviceMemory` is tried again, at last alone on the device. An error that no retry helps fails
the job at once. An outage or the worker's own fault does not count as a try; an unplanned error
does, and so does a lost device, from the second one of a job on. A job that only a newer revision
of the fleet offers waits until the worker follows that.
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
    DeviceLost,
    EngineDied,
    EngineError,
    EngineStopped,
    ImageNotFinite,
    OutOfDeviceMemory,
    UnknownCheckpoint,
    UnsupportedRequest,
)
from models import leases, revisions
from models.leases import Lease, LeaseLost
from models.tables import Job
from policy.current import CurrentFleet
from policy.failures import FailureCode, is_our_fault
from policy.revisions import Fate, decide
from tasks.health import Health
from tasks.held import HeldLease
from tasks.inputs import InputGone, InputsMissing
from tasks.lacking import LackingModels
from tasks.revisions import EngineRevisions

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
    engine_revisions: EngineRevisions
    lacking: LackingModels
    max_attempts: int

    def decide(self, held: HeldLease, error: BaseException) -> None:
        """Write down what becomes of the job; nothing if the lease was lost."""
        telemetry.RENDER_ERRORS.labels(type(error).__name__).inc()
        is_by_revisions = isinstance(error, UnknownCheckpoint | UnsupportedRequest)
        if not is_by_revisions:
            _log(held, error)
        if isinstance(error, EngineStopped):
            self.health.give_up(str(error))  # a worker without its device thread is of no use
        is_ours = is_unplanned(error) and self.health.is_at_fault(str(held.lease.job_id))
        write = partial(self._write, held=held, error=error, is_ours=is_ours)
        with suppress(LeaseLost):
            job = persist(lambda: self.ended.run_ending(self.database, write), DATABASE_AWAY)
            if is_by_revisions and job is not None:
                _log_decision(held, error, job)

    def _write(
        self, session: Session, *, held: HeldLease, error: BaseException, is_ours: bool
    ) -> Job:
        lease = held.lease
        if isinstance(error, UnknownCheckpoint | UnsupportedRequest):
            job = self._by_revisions(session, lease, error)
            if job is not None:
                return job
        code = failure_code(error, is_exclusive=held.is_exclusive)
        if code is not None:
            return leases.fail(session, lease, code=code, detail=str(error))
        if isinstance(error, DeviceLost):
            return leases.return_of_lost_device(
                session, lease, detail=str(error)[:500], max_attempts=self.max_attempts
            )
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

    def _by_revisions(
        self,
        session: Session,
        lease: Lease,
        error: UnknownCheckpoint | UnsupportedRequest,
    ) -> Job | None:
        """Decide by the fleet in force what becomes of a job that the engine does not know.

        The job, the engine, and the fleet that the worker knows may be of three revisions. None if
        the request is at fault by itself.
        """
        job = lease.job
        newest = max(job.fleet_revision or 0, revisions.newest_number(session))
        if self.engine_revisions.is_unheard_of(newest):
            return self._set_aside(session, lease)
        decision = decide(revisions.kind_of(session, job), self.current.fleet)
        if decision.code is not None:
            return leases.fail(session, lease, code=decision.code, detail=decision.detail)
        if self.engine_revisions.is_behind and decision.fate is Fate.STAYS:
            return self._set_aside(session, lease)
        if isinstance(error, UnsupportedRequest) and decision.fate is Fate.STAYS:
            return None
        pool = decision.pool if decision.fate is Fate.MOVES else None
        reason = "another worker serves its model"
        return leases.give_back(session, lease, reason=reason, pool=pool)

    def _set_aside(self, session: Session, lease: Lease) -> Job:
        """Have the job wait for a worker that goes by a newer revision, which may be this one."""
        self.lacking.set_aside(lease.job_id)
        return leases.give_back(session, lease, reason="a newer revision of the fleet has it")


def _log(held: HeldLease, error: BaseException) -> None:
    """Log the error; with a traceback unless the request itself is at fault."""
    code = failure_code(error, is_exclusive=held.is_exclusive)
    if code is not None and not is_our_fault(code):
        log.info("render_refused", attempt=held.lease.attempt, code=code, detail=str(error)[:300])
    else:
        log.warning("render_failed", attempt=held.lease.attempt, exc_info=error)


def _log_decision(held: HeldLease, error: BaseException, job: Job) -> None:
    """Log what became of a job that the engine does not know: only the fleet in force told."""
    attempt, detail = held.lease.attempt, str(error)[:300]
    if job.failure_code is None:
        log.info("render_handed_over", attempt=attempt, pool=job.pool, detail=detail)
    else:
        log.info("render_refused", attempt=attempt, code=job.failure_code, detail=detail)


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
