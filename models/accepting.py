"""Accept jobs: one statement writes any number of them, with images, places in fair order, ledger entries and audit events.

One statement, because this is the way in: what it costs is what everybody pays, and every further round trip is paid with the tenant's
place in line locked. Locks are taken in one order, here and wherever jobs end: flows, ledger, audit chain.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from models.ids import new_id
from models.tables import Job

_COLUMNS = [column.name for column in Job.__table__.columns]
WISH = tuple(_COLUMNS[_COLUMNS.index("pool") : _COLUMNS.index("bucket_rows") + 1])  # every resolved parameter: a job is replayable


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be accepted.

    params: every resolved parameter, by the names of the columns from `pool` to `bucket_rows`.  predicted_s: device seconds of all its
    images.  eta_raw_s: the first guess of its end, kept to learn from.  megapixel_steps: what it counts against quotas.  labels: the
    tenant's own metadata.  announced: it goes to Celery as soon as this is committed.
    """

    params: Mapping[str, Any]
    start_within_s: float
    run_within_s: float | None = None
    predicted_s: float = 0.0
    eta_raw_s: float | None = None
    megapixel_steps: Decimal = Decimal(0)
    labels: Mapping[str, str] | None = None
    requeue_of: uuid.UUID | None = None
    replay_of: uuid.UUID | None = None
    announced: bool = False


@dataclass(frozen=True)
class AcceptedRow:
    """What the database made of a job."""

    id: uuid.UUID
    accepted_at: datetime
    start_by: datetime
    release_tag: float
    usage_day: date


# Of the columns beside the wish: name -> how it is read from the JSON.
_OWN = {
    "run_within_s": "double precision",
    "predicted_s": "double precision",
    "eta_raw_s": "double precision",
    "megapixel_steps": "numeric(18, 6)",
    "metadata": "jsonb",
    "requeue_of": "uuid",
    "replay_of": "uuid",
}
_TYPES = {name: Job.__table__.c[name].type.compile(dialect=postgresql.dialect()) for name in WISH} | _OWN  # type: ignore[no-untyped-call]
_NAMES = ", ".join(_TYPES)

# `asked` numbers the jobs; `placed` adds up their cost in virtual seconds within each flow, so that each starts where the one before it
# ends (models/flows.py). The ledger reads `flow` and the jobs read both: that is the order of the locks. Whatever nobody reads runs last.
_ACCEPT = text(
    f"""
    WITH asked AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS asked (
            place integer, id uuid, event_id uuid, facts jsonb, start_within_s double precision, announced boolean,
            {", ".join(f"{name} {kind}" for name, kind in _TYPES.items())})
    ), placed AS MATERIALIZED (
        SELECT asked.*, predicted_s / weight AS own_s, sum(predicted_s / weight) OVER (PARTITION BY pool, tier ORDER BY place) AS upto_s
        FROM asked, (SELECT weight FROM tenants WHERE id = :tenant_id) tenant
    ), whole AS MATERIALIZED (
        SELECT pool, tier, max(upto_s) AS cost_s, coalesce(
                   (SELECT virtual_s FROM fair_clocks c WHERE c.pool = placed.pool AND c.tier = placed.tier),
                   extract(epoch FROM clock_timestamp())::double precision) AS clock_s
        FROM placed GROUP BY pool, tier
    ), flow AS (
        INSERT INTO flows AS f (pool, tier, tenant_id, finish_tag)
            SELECT pool, tier, :tenant_id, clock_s + cost_s FROM whole ORDER BY pool, tier
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            finish_tag = greatest(
                excluded.finish_tag, f.finish_tag + (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)))
        RETURNING f.pool, f.tier, f.finish_tag - (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)) AS start_tag
    ), ledger AS (
        INSERT INTO usage_ledger AS u (tenant_id, day, reserved, jobs_accepted)
            SELECT :tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date, sum(megapixel_steps), count(*)
            FROM placed JOIN flow USING (pool, tier)
        ON CONFLICT (tenant_id, day) DO UPDATE SET
            reserved = u.reserved + excluded.reserved, jobs_accepted = u.jobs_accepted + excluded.jobs_accepted
        RETURNING day
    ), job AS (
        INSERT INTO jobs (id, tenant_id, api_key_id, currency, start_by, release_tag, usage_day, announced_at, {_NAMES})
            SELECT id, :tenant_id, CAST(:api_key_id AS uuid), :currency, clock_timestamp() + make_interval(secs => start_within_s),
                   start_tag + upto_s - own_s, day, CASE WHEN announced THEN clock_timestamp() END, {_NAMES}
            FROM placed JOIN flow USING (pool, tier) CROSS JOIN ledger ORDER BY place
        RETURNING id, accepted_at, start_by, release_tag, usage_day, seed, num_images, pool, tier, announced_at
    ), image AS (
        INSERT INTO images (job_id, index, seed) SELECT id, index, seed + index FROM job, generate_series(0, num_images - 1) index
    ), clock AS (
        INSERT INTO fair_clocks AS c (pool, tier, virtual_s)
            SELECT pool, tier, max(release_tag) FROM job WHERE announced_at IS NOT NULL GROUP BY pool, tier
        ON CONFLICT (pool, tier) DO UPDATE SET virtual_s = greatest(c.virtual_s, excluded.virtual_s)
    ), event AS (
        INSERT INTO audit_events (id, chain_id, seq, event, actor, job_id, facts, prev_hash, hash)
            SELECT event_id, CAST(:tenant_id AS text), 0, 'job:request:accepted', :actor, id, facts, '', ''
            FROM placed JOIN job USING (id) ORDER BY place
    )
    SELECT id, accepted_at, start_by, release_tag, usage_day FROM job
    """
)


def accept(
    session: Session, new_jobs: Sequence[NewJob], *, tenant_id: uuid.UUID, api_key_id: uuid.UUID | None, currency: str, actor: str
) -> list[AcceptedRow]:
    """Write the tenant's jobs, complete and replayable, in the order of their places in line; what the database made of each.

    Locks the tenant's flows, its ledger of the day and its audit chain until commit.
    """
    rows = [_row(place, job) for place, job in enumerate(new_jobs)]
    given = {"jobs": json.dumps(rows), "tenant_id": tenant_id, "api_key_id": api_key_id, "currency": currency, "actor": actor}
    made = {row.id: AcceptedRow(*row) for row in session.execute(_ACCEPT, given)}
    return [made[uuid.UUID(row["id"])] for row in rows]


def _row(place: int, job: NewJob) -> dict[str, Any]:
    wish = {name: _plain(job.params[name]) for name in WISH if name in job.params}
    facts = {name: wish[name] for name in ("pool", "tier", "model", "model_version", "num_images")} | {"seed": str(wish["seed"])}
    origin = {name: str(value) for name, value in (("requeue_of", job.requeue_of), ("replay_of", job.replay_of)) if value is not None}
    own: dict[str, Any] = {"run_within_s": job.run_within_s, "predicted_s": job.predicted_s, "eta_raw_s": job.eta_raw_s}
    own |= {"megapixel_steps": str(job.megapixel_steps), "metadata": dict(job.labels) if job.labels else None, **origin}
    ours = {"place": place, "id": str(new_id()), "event_id": str(new_id()), "facts": facts | origin}
    return {**ours, "start_within_s": job.start_within_s, "announced": job.announced, **wish, **own}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, uuid.UUID) else value
