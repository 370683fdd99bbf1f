"""What the sweeper looks for: rows whose time has come. Each list is read through a partial index, so it costs what has changed."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from models import jobs
from models.database import now_once
from models.states import ACTIVE_STATES, JobState
from models.tables import Image, Job


@dataclass(frozen=True)
class Unstored:
    """A storing job past its deadline and the pixels it waits for: attempt by image index."""

    job_id: uuid.UUID
    tier: str
    attempt_of: dict[int, int]


def expired_leases(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    query = select(Job.id).where(Job.state == JobState.RUNNING, Job.lease_expires_at < now_once())
    return list(session.scalars(query.order_by(Job.lease_expires_at).limit(limit)))


def missed_starts(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    query = select(Job.id).where(Job.state == JobState.QUEUED, Job.attempt == 0, Job.start_by < now_once())
    return list(session.scalars(query.order_by(Job.start_by).limit(limit)))


def overruns(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    """Jobs that wait again after an earlier attempt and are past their run deadline; running ones are their engine's."""
    query = select(Job.id).where(Job.state == JobState.QUEUED, Job.run_by < now_once())
    return list(session.scalars(query.order_by(Job.run_by).limit(limit)))


def overdue_stores(session: Session, *, limit: int = 500) -> list[Unstored]:
    query = select(Job.id, Job.tier).where(Job.state == JobState.STORING, Job.store_by < now_once())
    overdue = session.execute(query.order_by(Job.store_by).limit(limit)).all()
    return [Unstored(job_id, tier, jobs.handed_off(session, job_id)) for job_id, tier in overdue]


def postpone_store(session: Session, job_id: uuid.UUID, *, store_within_s: float) -> None:
    """Give a storing job, announced again, another deadline."""
    job = session.get(Job, job_id, with_for_update=True, options=jobs.WITHOUT_WORDS)
    if job is not None and job.state == JobState.STORING:
        job.store_by = func.clock_timestamp() + timedelta(seconds=store_within_s)


def awaited_pixels(session: Session, job_ids: Sequence[uuid.UUID]) -> set[tuple[uuid.UUID, int, int]]:
    """(job, index, attempt) of every image of these jobs whose pixels somebody may still read, or is just putting away."""
    active = select(Image.job_id, Image.index, Image.handed_off_attempt, Job.attempt, Job.state)
    query = active.join(Job, Job.id == Image.job_id).where(Image.job_id.in_(job_ids), Job.state.in_(ACTIVE_STATES))
    awaited = set()
    for job_id, index, handed_off_attempt, attempt, state in session.execute(query):
        if handed_off_attempt is not None:
            awaited.add((job_id, index, handed_off_attempt))
        if state == JobState.RUNNING:
            awaited.add((job_id, index, attempt))
    return awaited


def finished_of(session: Session, job_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Those of these jobs that are in a final state, or that nobody knows."""
    active = set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.state.in_(ACTIVE_STATES))))
    return set(job_ids) - active


def not_running_of(session: Session, job_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Those of these jobs that no worker renders, or that nobody knows."""
    return set(job_ids) - set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.state == JobState.RUNNING)))


def ensure_audit_partitions(session: Session) -> None:
    """Make this month's and the next two months' partitions of the audit log, if they are missing."""
    session.execute(text("SELECT audit_ensure_partitions(2)"))
