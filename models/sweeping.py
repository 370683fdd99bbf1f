"""Find the rows that the sweeper acts on: those whose time has come.

Each list is read through a partial index, so it costs as much as has changed.
"""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from models import inputs, jobs
from models.database import statement_time
from models.ids import first_id
from models.tables import Image, Job
from policy.states import ACTIVE_STATES, JobState

AUDIT_MONTHS_AHEAD = 12
LONGEST_STORE_WAIT = 6  # times `store_within_s`: between two tries to have a job stored


@dataclass(frozen=True)
class OverdueStore:
    """A storing job past its deadline and the pixels it waits for: attempt by image index."""

    job_id: uuid.UUID
    tier: str
    attempt_of: dict[int, int]


def expired_leases(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    query = select(Job.id).where(
        Job.state == JobState.RUNNING, Job.lease_expires_at < statement_time()
    )
    return list(session.scalars(query.order_by(Job.lease_expires_at).limit(limit)))


def missed_starts(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    # The first condition is there for its index; the second one implies it.
    is_late = (Job.start_by < statement_time(), inputs.start_deadline() < statement_time())
    query = select(Job.id).where(Job.state == JobState.QUEUED, Job.attempt == 0, *is_late)
    return list(session.scalars(query.order_by(Job.start_by).limit(limit)))


def overruns(session: Session, *, limit: int = 500) -> list[uuid.UUID]:
    """List jobs that wait again after an earlier attempt and are past their run deadline.

    Running ones are stopped by their engine.
    """
    query = select(Job.id).where(Job.state == JobState.QUEUED, Job.run_by < statement_time())
    return list(session.scalars(query.order_by(Job.run_by).limit(limit)))


def overdue_stores(session: Session, *, limit: int = 500) -> list[OverdueStore]:
    query = select(Job.id, Job.tier).where(
        Job.state == JobState.STORING, Job.store_by < statement_time()
    )
    overdue = session.execute(query.order_by(Job.store_by).limit(limit)).all()
    return [
        OverdueStore(job_id, tier, jobs.handed_off(session, job_id)) for job_id, tier in overdue
    ]


def storing_by_tier(session: Session) -> Counter[str]:
    """Count the jobs that wait to be stored, or are being stored, by tier."""
    query = select(Job.tier, func.count()).where(Job.state == JobState.STORING).group_by(Job.tier)
    return Counter({tier: int(count) for tier, count in session.execute(query)})


def postpone_store(session: Session, job_id: uuid.UUID, *, store_within_s: float) -> None:
    """Give a storing job another deadline: as far off as it has waited by now.

    From 1 to LONGEST_STORE_WAIT times `store_within_s`.
    """
    job = session.get(Job, job_id, with_for_update=True, options=jobs.WITHOUT_TEXTS)
    if job is not None and job.state == JobState.STORING:
        shortest = timedelta(seconds=store_within_s)
        longest = timedelta(seconds=LONGEST_STORE_WAIT * store_within_s)
        waited = func.clock_timestamp() - func.coalesce(Job.rendered_at, func.clock_timestamp())
        job.store_by = func.clock_timestamp() + func.least(func.greatest(waited, shortest), longest)


def hasten_stores(session: Session) -> None:
    """Make every storing job overdue: storing works again."""
    waiting = (
        select(Job.id)
        .where(Job.state == JobState.STORING, Job.store_by > statement_time())
        .with_for_update(skip_locked=True)
    )
    statement = update(Job).where(Job.id.in_(waiting)).values(store_by=func.clock_timestamp())
    session.execute(statement.execution_options(synchronize_session=False))


def prolong_deadlines(session: Session, *, lasted_s: float) -> int:
    """Move deadlines of waiting jobs to at least `lasted_s` from now; return how many jobs changed.

    For that long no worker could be given a job. It moves start and run deadlines. Jobs whose
    deadline had passed before that are left alone. Harmless when repeated.
    """
    lasted = timedelta(seconds=lasted_s)
    prolonged = _prolong(session, Job.start_by, Job.attempt == 0, lasted)
    return prolonged + _prolong(session, Job.run_by, Job.attempt > 0, lasted)


def _prolong(
    session: Session,
    deadline: InstrumentedAttribute[Any],
    is_waiting: ColumnElement[bool],
    lasted: timedelta,
) -> int:
    near = select(Job.id).where(
        Job.state == JobState.QUEUED,
        is_waiting,
        deadline > statement_time() - lasted,
        deadline < statement_time() + lasted,
    )
    # Locked rows are just being given to a worker, or ended: they are not waited for.
    statement = (
        update(Job)
        .where(Job.id.in_(near.with_for_update(skip_locked=True)))
        .values({deadline: statement_time() + lasted})
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    return len(session.execute(statement).all())


def awaited_pixels(
    session: Session, job_ids: Sequence[uuid.UUID]
) -> set[tuple[uuid.UUID, int, int]]:
    """List (job, index, attempt) of the images of these jobs whose pixels are still needed.

    A task may still read them, or a worker is just handing them off.
    """
    active = select(Image.job_id, Image.index, Image.handed_off_attempt, Job.attempt, Job.state)
    query = active.join(Job, Job.id == Image.job_id).where(
        Image.job_id.in_(job_ids), Job.state.in_(ACTIVE_STATES)
    )
    awaited = set()
    for job_id, index, handed_off_attempt, attempt, state in session.execute(query):
        if handed_off_attempt is not None:
            awaited.add((job_id, index, handed_off_attempt))
        if state == JobState.RUNNING:
            awaited.add((job_id, index, attempt))
    return awaited


def finished_of(session: Session, job_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Return those of these jobs that are in a final state, or unknown."""
    active = select(Job.id).where(Job.id.in_(job_ids), Job.state.in_(ACTIVE_STATES))
    return set(job_ids) - set(session.scalars(active))


def rendered_of(session: Session, job_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Return those of these jobs that no worker renders or will render, or that are unknown."""
    to_render = select(Job.id).where(
        Job.id.in_(job_ids), Job.state.in_((JobState.QUEUED, JobState.RUNNING))
    )
    return set(job_ids) - set(session.scalars(to_render))


@dataclass(frozen=True)
class OldJob:
    """A job of long ago. is_due: it ended long enough ago, and its content is not erased."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    tier: str
    is_due: bool
    is_erased: bool


def aged(session: Session, *, older_than: timedelta, after: uuid.UUID, limit: int) -> list[OldJob]:
    """List up to `limit` jobs above id `after` accepted before `older_than` ago, oldest first."""
    now = session.scalar(select(statement_time()))
    assert now is not None
    columns = (Job.id, Job.tenant_id, Job.tier, Job.finished_at, Job.erased_at)
    query = (
        select(*columns)
        .where(Job.id > after, Job.id < first_id(now - older_than))
        .order_by(Job.id)
        .limit(limit)
    )
    found = []
    for job_id, tenant_id, tier, finished_at, erased_at in session.execute(query):
        is_due = erased_at is None and finished_at is not None and finished_at < now - older_than
        found.append(OldJob(job_id, tenant_id, tier, is_due, is_erased=erased_at is not None))
    return found


def ensure_audit_partitions(session: Session) -> int:
    """Make the audit log's missing partitions for this month and a year ahead.

    Returns how many months ahead there are. They are fewer than AUDIT_MONTHS_AHEAD while the log is
    being read, for readers are not blocked: try again later.
    """
    session.execute(text("SELECT audit_ensure_partitions(:months)"), {"months": AUDIT_MONTHS_AHEAD})
    return session.scalar(text("SELECT audit_partitions_ahead()")) or 0
