"""List a tenant's jobs, newest first, a page at a time, whatever else the table holds.

Whatever the planner estimates of states and tenants among the newest jobs, only the indexes that
begin with the tenant have the order asked for. With `tenant_id = … ORDER BY id` it may read the
primary key backwards, past a million newer jobs of other tenants; `= ANY` of one tenant and a range
of one state are no constants to it, and so part of the order.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ARRAY, Select, Uuid, any_, literal, select, text, tuple_
from sqlalchemy.orm import Session

from models.jobs import with_images_and_attempts
from models.tables import Job

MOST_PROBES = 10_000  # of an index, for one page of jobs with certain metadata: about 0.1 s
_FIRST_ID = uuid.UUID(int=0)
_LAST_ID = uuid.UUID(int=2**128 - 1)


@dataclass(frozen=True)
class JobFilter:
    """A filter of jobs. Ids are times: `since` <= id < `before`.  metadata: required entries."""

    since: uuid.UUID = _FIRST_ID
    before: uuid.UUID = _LAST_ID
    state: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Jobs, newest first.

    more_before: there may be more, below this id; None: there are no others, or as many were found
    as were asked for.
    """

    jobs: Sequence[Job]
    more_before: uuid.UUID | None = None


_WITH_LABELS = text(
    """
    SELECT job_id, is_found
    FROM jobs_with_labels(:tenant_id, :labels, :state, :since, :before, :limit, :probes)
    """
)


def page(session: Session, job_filter: JobFilter, *, tenant_id: uuid.UUID, limit: int) -> Page:
    """List up to `limit` of the tenant's jobs, newest first.

    Jobs that have several entries of metadata, or one and a state, may be rare where each condition
    is frequent. Such a page may hold fewer jobs, or none, and an id from where to go on: no list is
    read for longer than MOST_PROBES.
    """
    if job_filter.metadata:
        return _page_with_labels(session, job_filter, tenant_id, limit)
    ordered = _ordered(select(Job), tenant_id, job_filter)
    return Page(session.scalars(ordered.limit(limit).options(*with_images_and_attempts())).all())


def _page_with_labels(
    session: Session, job_filter: JobFilter, tenant_id: uuid.UUID, limit: int
) -> Page:
    asked = {
        "tenant_id": tenant_id,
        "state": job_filter.state,
        "since": job_filter.since,
        "before": job_filter.before,
        "labels": json.dumps(dict(job_filter.metadata)),
        "limit": limit,
        "probes": MOST_PROBES,
    }
    rows = session.execute(_WITH_LABELS, asked).all()
    ids = [job_id for job_id, is_found in rows if is_found]
    query = (
        select(Job)
        .where(Job.id == any_(literal(ids, ARRAY(Uuid))))
        .options(*with_images_and_attempts())
    )
    more_before = None
    if rows and not rows[-1].is_found:
        place, is_out = rows[-1]
        more_before = place if is_out is False else uuid.UUID(int=place.int + 1)
    return Page(sorted(session.scalars(query), key=lambda job: job.id, reverse=True), more_before)


def _ordered(query: Select[Any], tenant_id: uuid.UUID, job_filter: JobFilter) -> Select[Any]:
    query = query.where(Job.tenant_id == any_(literal([tenant_id], ARRAY(Uuid))))
    if job_filter.state is None:
        query = query.where(Job.id >= job_filter.since, Job.id < job_filter.before)
        return query.order_by(Job.tenant_id.desc(), Job.id.desc())
    place = tuple_(Job.state, Job.id)
    query = query.where(
        place >= tuple_(job_filter.state, job_filter.since),
        place < tuple_(job_filter.state, job_filter.before),
    )
    return query.order_by(Job.tenant_id.desc(), Job.state.desc(), Job.id.desc())


def find_many(
    session: Session, job_ids: Sequence[uuid.UUID], *, tenant_id: uuid.UUID
) -> dict[uuid.UUID, Job]:
    """Find the tenant's jobs of these ids, without images, attempts and artifacts; by id."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.id.in_(job_ids))
    return {job.id: job for job in session.scalars(query)}
