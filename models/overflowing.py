"""Move jobs that waited too long for their pool to another one that has idle room.

Where they may go is said by `policy.routing.overflow`. A job that is moved goes before nobody: it
takes room that no job of the other pool waits for. Its share of device time was charged where it
was accepted, so its tenant's flow in the other pool is not charged again.
"""

import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Float,
    Integer,
    Select,
    Text,
    Uuid,
    all_,
    any_,
    bindparam,
    func,
    or_,
    select,
    true,
)
from sqlalchemy.orm import Session

from models import jobs, releasing
from models.database import statement_time
from models.tables import FairClock, Flow, Job, Tenant
from policy.release import LateJob
from policy.routing import Overflow
from policy.states import JobState

MOST_LATE = 200  # waiting jobs that one look finds: those furthest behind in fair order
_CHECKPOINT = Job.model + "@" + Job.model_version  # policy.fleet.checkpoint_name
_SINCE = func.coalesce(Job.pool_since, Job.accepted_at)
_COLUMNS = (Job.id, Job.tenant_id, Job.num_images, Job.release_tag)


def _waits_since() -> ColumnElement[Any]:
    after_s = bindparam("after_s", type_=Float)
    return statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, after_s)


def _may_move() -> tuple[ColumnElement[bool], ...]:
    """Make the conditions of a job that the other pool could take.

    One that was begun stays near its snapshots.
    """
    return (
        Job.pool == bindparam("pool", type_=Text),
        Job.tier == bindparam("tier", type_=Text),
        Job.state == JobState.QUEUED,
        ~Job.lacks_inputs,
        Job.attempt == 0,
        Job.num_images <= bindparam("room", type_=Integer),
        any_(bindparam("checkpoints", type_=ARRAY(Text))) == _CHECKPOINT,
    )


def _is_for(tenant_id: Any) -> ColumnElement[bool]:
    """Tell whether the other pool is for this tenant: for those that are named, or for all."""
    names = bindparam("tenants", type_=ARRAY(Text))
    named = select(Tenant.id).where(Tenant.name == any_(names))
    return or_(func.cardinality(names) == 0, tenant_id.in_(named))


def _waiting_statement() -> Select[Any]:
    """Make the query of each tenant's first waiting jobs, of those that waited too long.

    The first of a tenant have waited longest. So whatever the length of a backlog, one probe of an
    index a tenant is enough.
    """
    without = bindparam("without", type_=ARRAY(Uuid))
    tenant = (
        select(Flow.tenant_id)
        .where(
            Flow.pool == bindparam("pool", type_=Text),
            Flow.tier == bindparam("tier", type_=Text),
            Flow.queued_jobs > 0,
            Flow.tenant_id != all_(without),
            _is_for(Flow.tenant_id),
        )
        .subquery()
    )
    head = (
        select(*_COLUMNS, _SINCE.label("since"))
        .where(*_may_move(), Job.tenant_id == tenant.c.tenant_id, Job.announced_at.is_(None))
        .order_by(Job.release_tag, Job.id)
        .limit(bindparam("room", type_=Integer))
        .lateral()
    )
    return (
        select(head.c.id, head.c.tenant_id, head.c.num_images, head.c.release_tag)
        .select_from(tenant)
        .join(head, true())
        .where(head.c.since < _waits_since())
        .order_by(head.c.release_tag, head.c.id)
        .limit(MOST_LATE)
    )


def _announced_statement() -> Select[Any, Any, Any, Any]:
    """Make the query of announced jobs that waited too long; there are few, by the limits."""
    conditions = (*_may_move(), Job.announced_at.is_not(None), _waits_since() > _SINCE)
    return select(*_COLUMNS).where(*conditions, _is_for(Job.tenant_id)).limit(MOST_LATE)


# Made once, for making them costs more than running them.
_WAITING = _waiting_statement()
_ANNOUNCED = _announced_statement()


def idle_images(session: Session, *, pool: str, slots: int) -> int:
    """Count the images for which the pool has room; 0 if any of its own jobs waits.

    slots: how many it may hold.
    """
    outstanding = releasing.outstanding_by_tier(session, pool=pool).values()
    queued = session.scalar(
        select(func.coalesce(func.sum(Flow.queued_jobs), 0)).where(Flow.pool == pool)
    )
    if int(queued or 0) > sum(tier.announced_jobs for tier in outstanding):
        return 0
    return max(0, slots - sum(tier.total_images for tier in outstanding))


def late_jobs(
    session: Session,
    *,
    pool: str,
    tier: str,
    way: Overflow,
    room: int,
    without: Collection[uuid.UUID] = (),
    also_announced: bool = False,
) -> list[LateJob]:
    """List queued jobs of (pool, tier) that waited in this pool too long, in fair order.

    room: images for which the other pool has room; larger jobs are left out.  without: tenants
    whose waiting jobs stay.  also_announced: of a pool without workers, which takes none of its
    messages; elsewhere one that is announced is next anyway.
    """
    asked = {
        "pool": pool,
        "tier": tier,
        "room": room,
        "after_s": way.after_s,
        "checkpoints": sorted(way.checkpoints),
        "tenants": list(way.tenants),
    }
    waiting = session.execute(_WAITING, asked | {"without": list(without)})
    late = [LateJob(*row) for row in waiting]
    if also_announced:
        announced = session.execute(_ANNOUNCED, asked)
        late += [replace(LateJob(*row), is_announced=True) for row in announced]
    return sorted(late, key=lambda job: (job.release_tag, job.job_id))


def move(session: Session, job_id: uuid.UUID, *, way: Overflow, actor: str) -> Job | None:
    """Have a job that is still queued wait in the other pool; None if it is not."""
    job = session.get(Job, job_id, with_for_update=True, options=jobs.WITHOUT_TEXTS)
    if job is None or job.state != JobState.QUEUED or job.pool == way.pool:
        return None
    clock = session.get(FairClock, (way.pool, job.tier))
    tag = job.release_tag if clock is None else clock.virtual_s
    left = job.pool
    jobs.enter_pool(session, job, way.pool, release_tag=tag)
    jobs.note_pool_change(session, job, left=left, actor=actor)
    return job
