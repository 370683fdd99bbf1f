"""Which waiting jobs go to Celery next: pick them in fair order and stamp them announced.

Fair order is `release_tag, id`; who computes the tag decides what is fair. A stamp without a message, or a message
without a stamp, does no harm: the sweeper announces again, and a worker that comes second finds nothing to take.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, or_, select, text, update
from sqlalchemy.orm import Session

from models.states import JobState
from models.tables import Job


@dataclass(frozen=True)
class Announced:
    """A job whose message should be in the broker, or on its way to a worker."""

    job_id: uuid.UUID
    announced_at: datetime


def pick(session: Session, *, pool: str, tier: str, limit_images: int) -> list[uuid.UUID]:
    """Stamp the next waiting jobs of (pool, tier) as announced, as many as fit under `limit_images` in hand; their ids in order.

    A job larger than the whole limit goes alone. Releases of one (pool, tier) take turns, so the limit holds.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"release:{pool}:{tier}"})
    mine = (Job.pool == pool) & (Job.tier == tier)
    in_hand = session.scalar(
        select(func.coalesce(func.sum(Job.num_images), 0)).where(
            mine, or_((Job.state == JobState.QUEUED) & Job.announced_at.is_not(None), Job.state == JobState.RUNNING)
        )
    )
    room = limit_images - int(in_hand or 0)
    if room <= 0:
        return []
    waiting = session.execute(
        select(Job.id, Job.num_images)
        .where(mine, Job.state == JobState.QUEUED, Job.announced_at.is_(None))
        .order_by(Job.release_tag, Job.id)
        .limit(room)
    )
    chosen: list[uuid.UUID] = []
    for job_id, num_images in waiting:
        if num_images > room and (chosen or in_hand):
            break  # it is next: nobody smaller overtakes it
        chosen.append(job_id)
        room -= num_images
    stamped = set(announce(session, chosen, only_waiting=True))
    return [job_id for job_id in chosen if job_id in stamped]


def announce(session: Session, job_ids: Sequence[uuid.UUID], *, only_waiting: bool = False) -> list[uuid.UUID]:
    """Stamp queued jobs as announced now; those that are still queued come back."""
    if not job_ids:
        return []
    statement = update(Job).where(Job.id.in_(job_ids), Job.state == JobState.QUEUED)
    if only_waiting:
        statement = statement.where(Job.announced_at.is_(None))
    return list(session.scalars(statement.values(announced_at=func.clock_timestamp()).returning(Job.id)))


def withdraw(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Take the stamp back: the message could not be published."""
    session.execute(update(Job).where(Job.id.in_(job_ids), Job.state == JobState.QUEUED).values(announced_at=None))


def announced(session: Session, *, pool: str, tier: str, older_than_s: float) -> list[Announced]:
    """Jobs that were announced that long ago and that no worker has taken, oldest announcement first."""
    rows = session.execute(
        select(Job.id, Job.announced_at)
        .where(
            Job.pool == pool,
            Job.tier == tier,
            Job.state == JobState.QUEUED,
            Job.announced_at < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s),
        )
        .order_by(Job.announced_at)
    )
    return [Announced(job_id, at) for job_id, at in rows if at is not None]


def announced_at(session: Session, job_id: uuid.UUID) -> datetime | None:
    return session.scalar(select(Job.announced_at).where(Job.id == job_id))
