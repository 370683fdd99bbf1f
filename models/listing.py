"""A tenant's jobs, newest first, a page at a time, whatever else the table holds.

Whatever the planner believes of how states and tenants lie among the newest jobs, only the tenant's own indexes have the order asked for.
With `tenant_id = … ORDER BY id` it may read the primary key backwards, past a million newer jobs that are not asked for; `= ANY` of one and
a range of one state are no constants to it, and so part of the order.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Select, Uuid, any_, literal, select, tuple_
from sqlalchemy.orm import Session

from models.jobs import whole
from models.tables import Job

RECENT = 2_000  # of the tenant's jobs, looked through one by one before the index of metadata is asked
_FIRST_ID, _LAST_ID = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)


@dataclass(frozen=True)
class Sought:
    """Which jobs. Ids are times: `since` <= id < `before`. labels: metadata that they have, among other."""

    since: uuid.UUID = _FIRST_ID
    before: uuid.UUID = _LAST_ID
    state: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def page(session: Session, sought: Sought, *, tenant_id: uuid.UUID, limit: int) -> Sequence[Job]:
    """Up to `limit` of the tenant's jobs, newest first."""
    if not sought.labels:
        return session.scalars(_ordered(select(Job), tenant_id, sought).limit(limit).options(*whole())).all()
    ids = _recent(session, sought, tenant_id, limit)
    if len(ids) < limit:
        ids = _by_labels(session, sought, tenant_id, limit)
    query = select(Job).where(Job.id == any_(literal(ids, ARRAY(Uuid)))).options(*whole())
    return sorted(session.scalars(query), key=lambda job: job.id, reverse=True)


def _ordered(query: Select[Any], tenant_id: uuid.UUID, sought: Sought) -> Select[Any]:
    query = query.where(Job.tenant_id == any_(literal([tenant_id], ARRAY(Uuid))))
    if sought.state is None:
        return query.where(Job.id >= sought.since, Job.id < sought.before).order_by(Job.tenant_id.desc(), Job.id.desc())
    place = tuple_(Job.state, Job.id)
    query = query.where(place >= tuple_(sought.state, sought.since), place < tuple_(sought.state, sought.before))
    return query.order_by(Job.tenant_id.desc(), Job.state.desc(), Job.id.desc())


def _recent(session: Session, sought: Sought, tenant_id: uuid.UUID, limit: int) -> list[uuid.UUID]:
    """Those that are among the newest: what most of a tenant's jobs have in common is found here, at once."""
    newest = _ordered(select(Job.id, Job.labels.label("said")), tenant_id, sought).limit(RECENT).subquery()
    query = select(newest.c.id).where(newest.c.said.contains(dict(sought.labels))).order_by(newest.c.id.desc()).limit(limit)
    return list(session.scalars(query))


def _by_labels(session: Session, sought: Sought, tenant_id: uuid.UUID, limit: int) -> list[uuid.UUID]:
    """All that have the metadata, by its own index, and only then in order: read in order, a rare one is looked for in every job."""
    is_it: list[ColumnElement[bool]] = [Job.labels.contains(dict(sought.labels)), Job.tenant_id == tenant_id]
    is_it += [Job.id >= sought.since, Job.id < sought.before]
    if sought.state is not None:
        is_it.append(Job.state == sought.state)
    found = select(Job.id).where(*is_it).cte("found").prefix_with("MATERIALIZED")
    return list(session.scalars(select(found.c.id).order_by(found.c.id.desc()).limit(limit)))


def some(session: Session, job_ids: Sequence[uuid.UUID], *, tenant_id: uuid.UUID) -> dict[uuid.UUID, Job]:
    """The tenant's jobs of these ids, without images, attempts and artifacts."""
    return {job.id: job for job in session.scalars(select(Job).where(Job.tenant_id == tenant_id, Job.id.in_(job_ids)))}
