"""Which waiting jobs go to Celery next: pick them in fair order and stamp them announced.

Fair order is `release_tag, id` (models/flows.py computes the tag). A stamp without a message, or a message without a stamp,
does no harm: the sweeper announces again, and a worker that comes second finds nothing to take.

Room is as many images as the live workers can hold, and a batch more, so that they never run dry. Where more is in hand than they
can hold, a tenant with much less than its fair share there is let out to the front queue, also when all room is taken; a job that
comes back from another worker always is. Workers take from the front queue first, and beyond their slots: their engine parks what is
less urgent. That is how one tenant may use every idle slot without anybody else having to wait for them.

A job whose pictures are not in the hand-off yet stands in no line and takes no room (models/inputs.py): others pass it.
"""

import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Integer, Select, Text, Uuid, all_, bindparam, func, or_, select, text, true, update
from sqlalchemy.orm import Session

from models import flows
from models.database import now_once
from models.states import JobState
from models.tables import Flow, Job

MOST_HEADS = 200  # waiting jobs looked at for the front queue: those furthest behind in fair order
OF_EACH_TENANT = 4


@dataclass(frozen=True)
class Announced:
    """A job whose message should be in the broker, or on its way to a worker."""

    job_id: uuid.UUID
    announced_at: datetime
    is_front: bool


@dataclass(frozen=True)
class Picked:
    """A job that was stamped; `is_front`: for the front queue of its tier."""

    job_id: uuid.UUID
    is_front: bool
    num_images: int


@dataclass(frozen=True)
class Room:
    """How many images of one (pool, tier) may be in the hands of Celery and the workers.

    slots: what the live workers hold of this tier at once.  limit_images: what they may hold, and what may wait for them.
    least_share: images that a tenant may always have there, however many share the tier.  most_of_one: images that a tenant may never
    have more of; None = no cap.
    """

    slots: int
    limit_images: int
    least_share: int = 1
    most_of_one: int | None = None


@dataclass(frozen=True)
class _Waiting:
    job_id: uuid.UUID
    tenant_id: uuid.UUID
    num_images: int
    release_tag: float
    attempt: int


_COLUMNS = (Job.id, Job.tenant_id, Job.num_images, Job.release_tag, Job.attempt)
_IN_HAND = or_((Job.state == JobState.QUEUED) & Job.announced_at.is_not(None), Job.state == JobState.RUNNING)
_IS_WAITING = (Job.state == JobState.QUEUED, Job.announced_at.is_(None), ~Job.lacks_inputs)


def _heads_statement() -> Select[Any]:
    """Made once: to make it costs more than to execute it. Tenants that are `only`, if that is said, and not in `without`."""
    pool, tier, only = bindparam("pool", type_=Text), bindparam("tier", type_=Text), bindparam("only", type_=Uuid)
    without = bindparam("without", type_=ARRAY(Uuid))
    flow = select(Flow.tenant_id).where(Flow.pool == pool, Flow.tier == tier, Flow.queued_jobs > 0, Flow.tenant_id != all_(without))
    tenant = flow.where(or_(only.is_(None), Flow.tenant_id == only)).subquery()
    waiting = select(*_COLUMNS).where(Job.pool == pool, Job.tier == tier, Job.tenant_id == tenant.c.tenant_id, *_IS_WAITING)
    head = waiting.order_by(Job.release_tag, Job.id).limit(bindparam("of_each", type_=Integer)).lateral()
    return select(head).select_from(tenant).join(head, true()).order_by(head.c.release_tag, head.c.id).limit(MOST_HEADS)


_HEADS = _heads_statement()


def pick(session: Session, *, pool: str, tier: str, room: Room, tenant_id: uuid.UUID | None = None) -> list[Picked]:
    """Stamp the next waiting jobs of (pool, tier) as announced, as far as there is room; in the order in which to publish them.

    tenant_id: look for this tenant's jobs only when the room is full; at accept nobody else's can have become due.
    A job larger than the whole limit goes alone. Releases of one (pool, tier) take turns, so the limits hold.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"release:{pool}:{tier}"})
    in_hand, running = _in_hand(session, pool, tier)
    chosen: dict[uuid.UUID, Picked] = {}
    newest_tag: float | None = None

    def choose(job: _Waiting, *, is_front: bool) -> None:
        chosen[job.job_id] = Picked(job.job_id, is_front, job.num_images)
        in_hand[job.tenant_id] += job.num_images

    def is_capped(job: _Waiting) -> bool:
        return room.most_of_one is not None and in_hand[job.tenant_id] + job.num_images > max(room.most_of_one, job.num_images)

    def is_due(job: _Waiting, sharing: int) -> bool:
        """Must nobody else's work in hand keep it waiting? It was in hand before, or its tenant is behind."""
        return job.attempt > 0 or is_behind(job.tenant_id, job.num_images, in_hand, running, room, sharing)

    line = _in_order(session, pool, tier, room, in_hand)
    for job in line:
        if is_capped(job):
            continue
        if in_hand.total() and in_hand.total() + job.num_images > room.limit_images:
            break  # it is next: nobody smaller overtakes it
        sharing = len(in_hand.keys() | {job.tenant_id})
        choose(job, is_front=job.attempt > 0 or (in_hand.total() >= room.slots and is_due(job, sharing)))
        newest_tag = job.release_tag
    if len(chosen) < len(line) or in_hand.total() >= room.limit_images:
        heads = _heads(session, pool, tier, only=tenant_id)
        sharing = len(in_hand.keys() | {job.tenant_id for job in heads}) or 1
        for job in heads:
            fits = in_hand.total() + job.num_images <= 2 * room.limit_images
            if fits and job.job_id not in chosen and not is_capped(job) and is_due(job, sharing):
                choose(job, is_front=True)  # out of turn: virtual time stays, or who comes next would start behind all that still wait
    if not chosen:
        return []
    stamped = _stamp(session, list(chosen.values()))
    if newest_tag is not None:
        flows.advance(session, pool=pool, tier=tier, start_tag=newest_tag)
    return [job for job in chosen.values() if job.job_id in stamped]


def is_behind(
    tenant_id: uuid.UUID, num_images: int, in_hand: Counter[uuid.UUID], running: Counter[uuid.UUID], room: Room, sharing: int
) -> bool:
    """Has the tenant, with so many images more, at most half of its fair share in hand while somebody runs more than his part?

    Half: two who both always have work would else meet at the front, where there is nothing to gain for either. Runs: somebody whose jobs
    only stand in line is in nobody's way, and would never get out of it if each newcomer passed him at the front.
    in_hand, running: images by tenant.  sharing: how many tenants have any in hand or waiting.
    """
    held, share = in_hand[tenant_id], max(room.least_share, room.limit_images // sharing)
    part = max(room.least_share, running.total() // sharing)
    return (held == 0 or 2 * (held + num_images) <= share) and max(running.values(), default=0) > part


def may_pass_at_once(session: Session, *, pool: str, tier: str, room: Room, tenant_id: uuid.UUID, num_images: int) -> bool:
    """Is there room for a job that is about to be accepted, with nobody waiting before it? Then no other release runs until commit.

    False also when another one is running right now.
    """
    if not session.scalar(text("SELECT pg_try_advisory_xact_lock(hashtext(:name))"), {"name": f"release:{pool}:{tier}"}):
        return False
    in_hand, _ = _in_hand(session, pool, tier)
    if in_hand.total() and in_hand.total() + num_images > room.slots:  # beyond the slots it may have to go to the front
        return False
    if room.most_of_one is not None and in_hand[tenant_id] + num_images > max(room.most_of_one, num_images):
        return False
    return session.scalar(select(Job.id).where(Job.pool == pool, Job.tier == tier, *_IS_WAITING).limit(1)) is None


@dataclass
class Hands:
    """What of one tier is in the hands of Celery and the workers.

    images, running: images by tenant, and those of them that run.  running_s: predicted device seconds of these.  announced_jobs: the rest.
    """

    images: Counter[uuid.UUID] = field(default_factory=Counter)
    running: Counter[uuid.UUID] = field(default_factory=Counter)
    running_s: float = 0.0
    announced_jobs: int = 0


def hands(session: Session, *, pool: str) -> dict[str, Hands]:
    """What is in hand, by tier."""
    columns = (Job.tier, Job.tenant_id, Job.state, func.sum(Job.num_images), func.sum(Job.predicted_s), func.count())
    query = select(*columns).where(Job.pool == pool, _IN_HAND).group_by(Job.tier, Job.tenant_id, Job.state)
    found: defaultdict[str, Hands] = defaultdict(Hands)
    for tier, tenant_id, state, images, cost_s, jobs in session.execute(query):
        here = found[tier]
        here.images[tenant_id] += int(images)
        if state == JobState.RUNNING:
            here.running[tenant_id] += int(images)
            here.running_s += float(cost_s)
        else:
            here.announced_jobs += jobs
    return found


def _in_hand(session: Session, pool: str, tier: str) -> tuple[Counter[uuid.UUID], Counter[uuid.UUID]]:
    """Images announced or running, and those running, by tenant: rows that the limits bound."""
    runs = func.coalesce(func.sum(Job.num_images).filter(Job.state == JobState.RUNNING), 0)
    query = select(Job.tenant_id, func.sum(Job.num_images), runs).where(Job.pool == pool, Job.tier == tier, _IN_HAND)
    in_hand, running = Counter[uuid.UUID](), Counter[uuid.UUID]()
    for tenant_id, images, of_them_running in session.execute(query.group_by(Job.tenant_id)):
        in_hand[tenant_id], running[tenant_id] = int(images), int(of_them_running)
    return in_hand, running


def _in_order(session: Session, pool: str, tier: str, room: Room, in_hand: Counter[uuid.UUID]) -> list[_Waiting]:
    """The first waiting jobs in fair order, as many as there may be room for, tenants at their cap left out."""
    limit = room.limit_images - in_hand.total()
    if limit <= 0:
        return []
    if room.most_of_one is not None:  # by their heads, past the capped: a backlog may be a million rows long
        capped = [tenant for tenant, images in in_hand.items() if images >= room.most_of_one]
        return _heads(session, pool, tier, of_each=min(limit, room.most_of_one), without=capped)
    query = select(*_COLUMNS).where(Job.pool == pool, Job.tier == tier, *_IS_WAITING).order_by(Job.release_tag, Job.id).limit(limit)
    return [_Waiting(*row) for row in session.execute(query)]


def _heads(
    session: Session,
    pool: str,
    tier: str,
    *,
    of_each: int = OF_EACH_TENANT,
    only: uuid.UUID | None = None,
    without: Sequence[uuid.UUID] = (),
) -> list[_Waiting]:
    """The first waiting jobs of each tenant, in fair order: one probe of an index a tenant, whatever the length of its backlog."""
    asked = {"pool": pool, "tier": tier, "of_each": of_each, "only": only, "without": list(without)}
    return [_Waiting(*row) for row in session.execute(_HEADS, asked)]


def _stamp(session: Session, chosen: Sequence[Picked]) -> set[uuid.UUID]:
    fronts = [job.job_id for job in chosen if job.is_front]
    statement = update(Job).where(Job.id.in_(_in_turn([job.job_id for job in chosen], *_IS_WAITING)))
    stamped = statement.values(announced_at=func.clock_timestamp(), is_front=Job.id.in_(fronts)).returning(Job.id)
    return set(session.scalars(stamped.execution_options(synchronize_session=False)))


def announce_again(session: Session, job_ids: Sequence[uuid.UUID]) -> list[Picked]:
    """Stamp jobs anew whose message was lost; those that are still queued come back."""
    if not job_ids:
        return []
    queued = _in_turn(job_ids, Job.state == JobState.QUEUED)
    statement = update(Job).where(Job.id.in_(queued)).values(announced_at=func.clock_timestamp())
    columns = (Job.id, Job.is_front, Job.num_images)
    rows = session.execute(statement.returning(*columns).execution_options(synchronize_session=False))
    return [Picked(*row) for row in rows]


def withdraw(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Take the stamp back: the message could not be published."""
    queued = _in_turn(job_ids, Job.state == JobState.QUEUED)
    statement = update(Job).where(Job.id.in_(queued)).values(announced_at=None, is_front=False)
    session.execute(statement.execution_options(synchronize_session=False))


def _in_turn(job_ids: Sequence[uuid.UUID], *conditions: ColumnElement[bool]) -> Select[Any]:
    """Select those of the jobs that are so, locking them by ascending id: an UPDATE of a list locks them in any order."""
    return select(Job.id).where(Job.id.in_(job_ids), *conditions).order_by(Job.id).with_for_update(key_share=True)


def announced(session: Session, *, pool: str, tier: str, older_than_s: float) -> list[Announced]:
    """Jobs that were announced that long ago and that no worker has taken, oldest announcement first."""
    rows = session.execute(
        select(Job.id, Job.announced_at, Job.is_front)
        .where(
            Job.pool == pool,
            Job.tier == tier,
            Job.state == JobState.QUEUED,
            Job.announced_at < now_once() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s),
        )
        .order_by(Job.announced_at)
    )
    return [Announced(job_id, at, is_front) for job_id, at, is_front in rows if at is not None]


def announced_at(session: Session, job_id: uuid.UUID) -> datetime | None:
    return session.scalar(select(Job.announced_at).where(Job.id == job_id))
