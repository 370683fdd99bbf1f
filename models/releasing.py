"""Stamp the jobs that are announced next: the rows that the rule in `policy.release` decides on.

Fair order is `release_tag, id` (models/flows.py computes the tag). A stamp without a message, or a
message without a stamp, does no harm: the sweeper announces the job again, and a worker that comes
second cannot take it.

A job whose pictures are not in the hand-off yet is not in line and takes no room: others pass it
(models/inputs.py).
"""

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Select,
    Text,
    Uuid,
    all_,
    bindparam,
    func,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.orm import Session

from models import flows
from models.database import statement_time
from models.tables import Flow, Job
from policy.release import (
    Outstanding,
    PickedJob,
    ReleaseLimits,
    Selection,
    WaitingJob,
    exceeds_cap,
    may_go_at_once,
)
from policy.states import JobState

MOST_HEADS = 200  # waiting jobs looked at for the front queue: those furthest behind in fair order
OF_EACH_TENANT = 4


@dataclass(frozen=True)
class Announced:
    """A job whose message should be in the broker, or on its way to a worker."""

    job_id: uuid.UUID
    announced_at: datetime
    is_front: bool


_COLUMNS = (Job.id, Job.tenant_id, Job.num_images, Job.release_tag, Job.attempt)
_IS_OUTSTANDING = or_(
    (Job.state == JobState.QUEUED) & Job.announced_at.is_not(None), Job.state == JobState.RUNNING
)
_CHECKPOINT = Job.model + "@" + Job.model_version  # policy.catalog.checkpoint_name
_IS_WAITING = (Job.state == JobState.QUEUED, Job.announced_at.is_(None), ~Job.lacks_inputs)


def _heads_statement() -> Select[Any]:
    """Make the query of each tenant's first waiting jobs.

    It is made once, for making it costs more than running it. Of the tenant `only`, if that is
    given; of none in `without`, and of no checkpoint in `lacking`.
    """
    pool = bindparam("pool", type_=Text)
    tier = bindparam("tier", type_=Text)
    only = bindparam("only", type_=Uuid)
    without = bindparam("without", type_=ARRAY(Uuid))
    lacking = bindparam("lacking", type_=ARRAY(Text))
    flow = select(Flow.tenant_id).where(
        Flow.pool == pool, Flow.tier == tier, Flow.queued_jobs > 0, Flow.tenant_id != all_(without)
    )
    tenant = flow.where(or_(only.is_(None), Flow.tenant_id == only)).subquery()
    waiting = select(*_COLUMNS).where(
        Job.pool == pool,
        Job.tier == tier,
        Job.tenant_id == tenant.c.tenant_id,
        all_(lacking) != _CHECKPOINT,
        *_IS_WAITING,
    )
    head = (
        waiting.order_by(Job.release_tag, Job.id)
        .limit(bindparam("of_each", type_=Integer))
        .lateral()
    )
    return (
        select(head)
        .select_from(tenant)
        .join(head, true())
        .order_by(head.c.release_tag, head.c.id)
        .limit(MOST_HEADS)
    )


_HEADS = _heads_statement()


def pick(
    session: Session,
    *,
    pool: str,
    tier: str,
    limits: ReleaseLimits,
    tenant_id: uuid.UUID | None = None,
    lacking: Collection[str] = (),
) -> list[PickedJob]:
    """Stamp the next waiting jobs of (pool, tier) as announced, as far as the limits allow.

    Returns them in the order in which to publish them. Releases of one (pool, tier) take turns, so
    the limits hold.

    tenant_id: when the limit is reached, look for this tenant's jobs only; at accept nobody else's
    can have become due.  lacking: checkpoints that no live worker serves; their jobs wait, and
    take no room from others.
    """
    session.execute(
        text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": _lock_name(pool, tier)}
    )
    outstanding = outstanding_in(session, pool=pool, tier=tier)
    selection = Selection(outstanding, limits)
    line = _in_order(session, pool, tier, limits, outstanding, lacking=list(lacking))
    selection.take_in_order(line)
    if selection.leaves_out_some_of(line):
        heads = _heads(session, pool, tier, only=tenant_id, lacking=list(lacking))
        selection.take_those_behind(heads)
    if not selection.picked:
        return []
    stamped = _stamp(session, list(selection.picked.values()))
    if selection.newest_tag is not None:
        flows.advance(session, pool=pool, tier=tier, start_tag=selection.newest_tag)
    return [job for job in selection.picked.values() if job.job_id in stamped]


def may_pass_at_once(
    session: Session,
    *,
    pool: str,
    tier: str,
    limits: ReleaseLimits,
    tenant_id: uuid.UUID,
    num_images: int,
) -> bool:
    """Check whether a job that is about to be accepted may be announced as it is written.

    It may if nobody waits before it and the limits allow; then no release runs until commit. False
    also when another release is at work right now.
    """
    if not session.scalar(
        text("SELECT pg_try_advisory_xact_lock(hashtext(:name))"), {"name": _lock_name(pool, tier)}
    ):
        return False
    outstanding = outstanding_in(session, pool=pool, tier=tier)
    if not may_go_at_once(outstanding, limits, tenant_id=tenant_id, num_images=num_images):
        return False
    waiting = select(Job.id).where(Job.pool == pool, Job.tier == tier, *_IS_WAITING).limit(1)
    return session.scalar(waiting) is None


def _lock_name(pool: str, tier: str) -> str:
    return f"release:{pool}:{tier}"


def outstanding_in(session: Session, *, pool: str, tier: str) -> Outstanding:
    """Count what of (pool, tier) is outstanding: rows that the limits bound."""
    return _outstanding(session, Job.pool == pool, Job.tier == tier).get(tier, Outstanding())


def outstanding_by_tier(session: Session, *, pool: str) -> Mapping[str, Outstanding]:
    """Count what of the pool is outstanding, by tier; tiers without anything are left out."""
    return _outstanding(session, Job.pool == pool)


def _outstanding(session: Session, *conditions: ColumnElement[bool]) -> dict[str, Outstanding]:
    runs = Job.state == JobState.RUNNING
    query = select(
        Job.tier,
        Job.tenant_id,
        func.sum(Job.num_images),
        func.coalesce(func.sum(Job.num_images).filter(runs), 0),
        func.coalesce(func.sum(Job.predicted_s).filter(runs), 0.0),
        func.count().filter(~runs),
    )
    by_tier: defaultdict[str, Outstanding] = defaultdict(Outstanding)
    rows = session.execute(
        query.where(*conditions, _IS_OUTSTANDING).group_by(Job.tier, Job.tenant_id)
    )
    for tier, tenant_id, images, running, running_s, announced_jobs in rows:
        here = by_tier[tier]
        here.images[tenant_id] = int(images)
        if running:
            here.running[tenant_id] = int(running)
        here.running_s += float(running_s)
        here.announced_jobs += announced_jobs
    return dict(by_tier)


def _in_order(
    session: Session,
    pool: str,
    tier: str,
    limits: ReleaseLimits,
    outstanding: Outstanding,
    *,
    lacking: Sequence[str],
) -> list[WaitingJob]:
    """Read the first waiting jobs in fair order, as many as there may be room for.

    Tenants at their cap are left out.
    """
    room = limits.limit_images - outstanding.total_images
    if room <= 0:
        return []
    # With a cap, read each tenant's first jobs: a capped tenant's backlog may be a million rows.
    if limits.max_per_tenant is not None:
        capped = [
            tenant
            for tenant, held in outstanding.images.items()
            if exceeds_cap(limits, held=held, num_images=1)
        ]
        of_each = min(room, limits.max_per_tenant)
        return _heads(session, pool, tier, of_each=of_each, without=capped, lacking=lacking)
    waiting = select(*_COLUMNS).where(Job.pool == pool, Job.tier == tier, *_IS_WAITING)
    if lacking:
        waiting = waiting.where(_CHECKPOINT.not_in(lacking))
    query = waiting.order_by(Job.release_tag, Job.id).limit(room)
    return [WaitingJob(*row) for row in session.execute(query)]


def _heads(
    session: Session,
    pool: str,
    tier: str,
    *,
    of_each: int = OF_EACH_TENANT,
    only: uuid.UUID | None = None,
    without: Sequence[uuid.UUID] = (),
    lacking: Sequence[str] = (),
) -> list[WaitingJob]:
    """Read the first waiting jobs of each tenant, in fair order.

    One probe of an index a tenant, whatever the length of its backlog.
    """
    asked = {
        "pool": pool,
        "tier": tier,
        "of_each": of_each,
        "only": only,
        "without": list(without),
        "lacking": list(lacking),
    }
    return [WaitingJob(*row) for row in session.execute(_HEADS, asked)]


def _stamp(session: Session, chosen: Sequence[PickedJob]) -> set[uuid.UUID]:
    fronts = [job.job_id for job in chosen if job.is_front]
    statement = update(Job).where(
        Job.id.in_(_in_turn([job.job_id for job in chosen], *_IS_WAITING))
    )
    stamped = statement.values(
        announced_at=func.clock_timestamp(), is_front=Job.id.in_(fronts)
    ).returning(Job.id)
    return set(session.scalars(stamped.execution_options(synchronize_session=False)))


def announce_again(session: Session, job_ids: Sequence[uuid.UUID]) -> list[PickedJob]:
    """Stamp jobs anew whose message was lost; return those that are still queued."""
    if not job_ids:
        return []
    queued = _in_turn(job_ids, Job.state == JobState.QUEUED)
    statement = update(Job).where(Job.id.in_(queued)).values(announced_at=func.clock_timestamp())
    columns = (Job.id, Job.is_front, Job.num_images)
    rows = session.execute(
        statement.returning(*columns).execution_options(synchronize_session=False)
    )
    return [PickedJob(*row) for row in rows]


def withdraw(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Take the stamps back: the messages could not be published."""
    queued = _in_turn(job_ids, Job.state == JobState.QUEUED)
    statement = update(Job).where(Job.id.in_(queued)).values(announced_at=None, is_front=False)
    session.execute(statement.execution_options(synchronize_session=False))


def _in_turn(job_ids: Sequence[uuid.UUID], *conditions: ColumnElement[bool]) -> Select[Any]:
    """Select those of the jobs that meet the conditions, and lock them by ascending id.

    An UPDATE of a list of ids would lock them in any order.
    """
    return (
        select(Job.id)
        .where(Job.id.in_(job_ids), *conditions)
        .order_by(Job.id)
        .with_for_update(key_share=True)
    )


def announced(session: Session, *, pool: str, tier: str, older_than_s: float) -> list[Announced]:
    """List jobs announced that long ago that no worker has taken, oldest announcement first."""
    rows = session.execute(
        select(Job.id, Job.announced_at, Job.is_front)
        .where(
            Job.pool == pool,
            Job.tier == tier,
            Job.state == JobState.QUEUED,
            Job.announced_at
            < statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s),
        )
        .order_by(Job.announced_at)
    )
    return [Announced(job_id, at, is_front) for job_id, at, is_front in rows if at is not None]


def announced_at(session: Session, job_id: uuid.UUID) -> datetime | None:
    return session.scalar(select(Job.announced_at).where(Job.id == job_id))
