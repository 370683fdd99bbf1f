"""Keep fair order within one (pool, tier): start-time fair queuing over the tenants' flows.

A job's start tag is max(virtual time, its tenant's finish tag). Its finish tag is that plus
predicted cost / weight, and the tenant's next job starts there. Jobs are released in the order of
start tags, and virtual time is the start tag of the one released last in that order. So a tenant
that had no jobs for a while starts level with the others, whatever it did not use; and of two that
always have work each gets device time in proportion to its weight (Goyal, Vin, Cheng 1996). Tags
are device seconds; they begin at the wall clock only so that jobs without a tag of their own sort
among them.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.tables import FairClock, Flow, Tenant


@dataclass(frozen=True)
class FlowBacklog:
    """A flow's waiting jobs; `queued_s` is device seconds."""

    tier: str
    tenant_id: uuid.UUID
    weight: float
    queued_jobs: int
    queued_s: float
    finish_tag: float


_SETTLE = text(
    """
    UPDATE flows SET finish_tag = finish_tag
        + CAST(:difference_s AS double precision)
        / (SELECT weight FROM tenants WHERE id = :tenant_id)
    WHERE pool = :pool AND tier = :tier AND tenant_id = :tenant_id
    """
)


def settle(
    session: Session, *, pool: str, tier: str, tenant_id: uuid.UUID, difference_s: float
) -> None:
    """Charge the flow what a job took instead of what was predicted.

    Its later jobs move by `difference_s`, actual - predicted.
    """
    if difference_s:
        flow = {"pool": pool, "tier": tier, "tenant_id": tenant_id}
        session.execute(_SETTLE, flow | {"difference_s": difference_s})


_LINE_UP = text(
    """
    UPDATE flows f SET finish_tag = greatest(f.finish_tag, c.now_s) + :cost_s / t.weight
    FROM tenants t, LATERAL (SELECT coalesce(
        (SELECT virtual_s FROM fair_clocks k WHERE k.pool = :pool AND k.tier = :tier),
        extract(epoch FROM clock_timestamp())::double precision) AS now_s) c
    WHERE f.pool = :pool AND f.tier = :tier AND f.tenant_id = :tenant_id AND t.id = f.tenant_id
    RETURNING f.finish_tag - :cost_s / t.weight
    """
)


def line_up(
    session: Session, *, pool: str, tier: str, tenant_id: uuid.UUID, cost_s: float
) -> float:
    """Give a job the last place of its tenant's line in a flow that exists; return its start tag.

    cost_s: the device seconds that it is expected to take.
    """
    flow = {"pool": pool, "tier": tier, "tenant_id": tenant_id}
    return float(session.execute(_LINE_UP, flow | {"cost_s": cost_s}).scalar_one())


def with_queued_jobs(session: Session) -> set[tuple[str, str]]:
    """List the pools and tiers in which jobs are queued."""
    query = select(Flow.pool, Flow.tier).where(Flow.queued_jobs > 0).distinct()
    return {(pool, tier) for pool, tier in session.execute(query)}


def advance(session: Session, *, pool: str, tier: str, start_tag: float) -> None:
    """Let virtual time be at least the start tag of a job that was released. It never goes back."""
    statement = insert(FairClock).values(pool=pool, tier=tier, virtual_s=start_tag)
    later = {"virtual_s": func.greatest(FairClock.virtual_s, start_tag)}
    session.execute(
        statement.on_conflict_do_update(index_elements=[FairClock.pool, FairClock.tier], set_=later)
    )


def backlogs(session: Session, *, pool: str) -> list[FlowBacklog]:
    """Read every flow of the pool that has something queued."""
    query = (
        select(
            Flow.tier,
            Flow.tenant_id,
            Tenant.weight,
            Flow.queued_jobs,
            Flow.queued_s,
            Flow.finish_tag,
        )
        .join(Tenant, Tenant.id == Flow.tenant_id)
        .where(Flow.pool == pool, Flow.queued_jobs > 0)
    )
    return [FlowBacklog(*row) for row in session.execute(query)]


def clocks(session: Session, *, pool: str) -> Mapping[str, float]:
    """Read virtual time by tier, of the tiers in which anything was ever released."""
    rows = session.execute(
        select(FairClock.tier, FairClock.virtual_s).where(FairClock.pool == pool)
    )
    return {tier: virtual_s for tier, virtual_s in rows}  # noqa: C416 - rows are not pairs to mypy
