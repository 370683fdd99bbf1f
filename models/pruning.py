"""Remove rows that are too old to be kept, as the owner of the tables.

These are jobs with everything that belongs to them, files, ledger entries and months of the audit
log; the application has no right to remove any of them. Rows go in small pieces, each with its
audit event. Objects are marked to be deleted from the store, as where a tenant deletes a job; the
digests of stored images stay in the audit log until their month goes.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import ARRAY, Date, Text, TextClause, Uuid, bindparam, text
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.ids import first_id
from policy.params import PICTURES

ACTOR = "operator"
# Younger jobs are never pruned: an idempotency key may name them.
NEWEST_JOBS = timedelta(days=1)
# Younger days are never pruned: quotas count this month, and the last one may still be billed.
NEWEST_USAGE = timedelta(days=62)
FIRST_ID = uuid.UUID(int=0)

# Every table with a foreign key to `jobs`, in the order in which its rows are deleted: images name
# artifacts. A test compares this with the database.
OF_A_JOB = ("idempotency_keys", "webhook_deliveries", "images", "artifacts", "attempts")
NAME_ANOTHER_JOB = ("requeue_of", "replay_of")  # columns of `jobs`, which are set to NULL


@dataclass(frozen=True)
class PrunableRows:
    """The rows that are older than asked for. size_bytes: of the stored images."""

    jobs: int
    images: int
    size_bytes: int
    files: int
    file_bytes: int


@dataclass(frozen=True)
class PrunedBatch:
    """The jobs of one transaction. last_id: where the next one begins; None: there is none."""

    jobs: int
    last_id: uuid.UUID | None


def _ids(statement: str) -> TextClause:
    return text(statement).bindparams(bindparam("ids", type_=ARRAY(Uuid)))


_IS_OLD = (
    "j.id < :upto AND j.finished_at < :before AND (CAST(:tier AS text) IS NULL OR j.tier = :tier)"
)
_NO_JOB_STARTS_FROM_IT = [
    f"NOT EXISTS (SELECT FROM jobs j WHERE j.{param.name} = f.id)" for param in PICTURES.values()
]
_UNUSED = " AND ".join(["f.created_at < :before", *_NO_JOB_STARTS_FROM_IT])

_COUNT_JOBS = text(
    f"""
    SELECT count(*), coalesce(sum(a.images), 0), coalesce(sum(a.size_bytes), 0)
    FROM jobs j LEFT JOIN LATERAL (
        SELECT count(*) AS images, sum(size_bytes) AS size_bytes FROM artifacts
        WHERE job_id = j.id AND erased_at IS NULL
    ) a ON true WHERE {_IS_OLD}
    """
)
_COUNT_FILES = text(
    f"""
    SELECT count(*), coalesce(sum(f.size_bytes), 0) FROM files f
    WHERE f.erased_at IS NULL AND {_UNUSED}
    """
)
_NEXT_JOBS = text(
    f"""
    SELECT j.id, j.tenant_id FROM jobs j WHERE j.id > :after AND {_IS_OLD}
    ORDER BY j.id LIMIT :limit FOR UPDATE SKIP LOCKED
    """
)
# In order of their keys: a transaction that stores the same objects again locks the same rows.
_GIVE_UP = text(
    """
    INSERT INTO uploads AS u (object_key, started_at)
    SELECT key, to_timestamp(0) FROM unnest(:keys) key ORDER BY key
    ON CONFLICT (object_key) DO UPDATE SET started_at = u.started_at
    """
).bindparams(bindparam("keys", type_=ARRAY(Text)))

_OLD_FILES = text(
    f"""
    SELECT f.id, f.tenant_id, f.object_key, f.content_sha256 FROM files f
    WHERE f.erased_at IS NULL AND {_UNUSED}
    ORDER BY f.tenant_id, f.id LIMIT :limit FOR UPDATE SKIP LOCKED
    """
)
_ERASE_FILES = _ids(
    f"""
    UPDATE files f SET erased_at = clock_timestamp()
    WHERE f.id = ANY(:ids) AND {_UNUSED} RETURNING f.id
    """
)
# The row goes a day after its content: a job that was being accepted with the file has found it
# erased by then.
_FORGET_FILES = text(
    f"""
    DELETE FROM files WHERE id IN (
        SELECT f.id FROM files f
        WHERE f.erased_at < clock_timestamp() - interval '1 day' AND {_UNUSED}
        LIMIT :limit FOR UPDATE SKIP LOCKED)
    """
)
_FORGET_ENDPOINTS = text(
    """
    WITH old AS (
        SELECT e.id FROM webhook_endpoints e WHERE e.deleted_at < :before
        AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.endpoint_id = e.id)
        LIMIT :limit FOR UPDATE SKIP LOCKED
    ), secret AS (DELETE FROM webhook_secrets WHERE endpoint_id IN (SELECT id FROM old))
    DELETE FROM webhook_endpoints WHERE id IN (SELECT id FROM old)
    """
)
_MONTHS = text(
    """
    SELECT to_date(right(inhrelid::regclass::text, 7), 'YYYY_MM') AS month FROM pg_inherits
    WHERE inhparent = 'audit_events'::regclass
          AND inhrelid::regclass::text ~ '^audit_events_\\d{4}_\\d{2}$'
    ORDER BY 1
    """
)


def due(session: Session, *, before: datetime, tier: str | None = None) -> PrunableRows:
    """Count what `prune_jobs` and `prune_files` would remove."""
    _take_time(session)
    jobs, images, size_bytes = session.execute(_COUNT_JOBS, _old(before, tier)).one()
    files, file_bytes = session.execute(_COUNT_FILES, {"before": before}).one()
    return PrunableRows(jobs, int(images), int(size_bytes), files, int(file_bytes))


def prune_jobs(
    session: Session,
    *,
    before: datetime,
    after: uuid.UUID = FIRST_ID,
    limit: int,
    tier: str | None = None,
) -> PrunedBatch:
    """Remove up to `limit` jobs with larger ids than `after` that ended before `before`.

    tier: of this tier alone; None: of all.  Their objects go as soon as the store is tidied. One
    audit event for each tenant says how many jobs went and which was the newest.
    """
    rows = session.execute(_NEXT_JOBS, {**_old(before, tier), "after": after, "limit": limit}).all()
    if not rows:
        return PrunedBatch(0, None)
    ids = [row.id for row in rows]
    _remove_jobs(session, ids)
    for tenant_id in sorted({row.tenant_id for row in rows}, key=str):
        own = [row.id for row in rows if row.tenant_id == tenant_id]
        facts: dict[str, Any] = {
            "jobs": len(own),
            "newest": str(own[-1]),
            "before": before.isoformat(),
        }
        audit.append(session, EventName.TENANT_JOBS_PRUNED, chain=tenant_id, actor=ACTOR, **facts)
    return PrunedBatch(len(ids), ids[-1])


def _remove_jobs(session: Session, ids: Sequence[uuid.UUID]) -> None:
    """Remove these jobs and their rows in other tables, and give their objects up.

    Locks come in the order of `jobs.store`: jobs before the objects that they name.
    """
    for column in NAME_ANOTHER_JOB:
        forget = _ids(f"UPDATE jobs SET {column} = NULL WHERE {column} = ANY(:ids)")
        session.execute(forget, {"ids": ids})
    named = _ids(
        "SELECT DISTINCT object_key FROM artifacts WHERE job_id = ANY(:ids) AND erased_at IS NULL"
    )
    _give_up(session, session.scalars(named, {"ids": ids}).all())
    for table in OF_A_JOB:
        session.execute(_ids(f"DELETE FROM {table} WHERE job_id = ANY(:ids)"), {"ids": ids})
    session.execute(_ids("DELETE FROM jobs WHERE id = ANY(:ids)"), {"ids": ids})


def prune_files(session: Session, *, before: datetime, limit: int) -> int:
    """Erase up to `limit` files brought before `before` from which no job starts; return how many.

    They are erased as DELETE erases them.
    """
    locked = session.execute(_OLD_FILES, {"before": before, "limit": limit}).all()
    # The conditions are checked again under the lock, where no job can begin to name them: one may
    # have been accepted during the first query.
    ids = [row.id for row in locked]
    erased = set(session.scalars(_ERASE_FILES, {"before": before, "ids": ids}))
    rows = [row for row in locked if row.id in erased]
    _give_up(session, [row.object_key for row in rows])
    for row in rows:  # chains in order, as they were read
        facts: dict[str, Any] = {"file_id": str(row.id), "content_sha256": row.content_sha256}
        audit.append(
            session, EventName.FILE_CONTENT_ERASED, chain=row.tenant_id, actor=ACTOR, **facts
        )
    return len(rows)


def forget_files(session: Session, *, before: datetime, limit: int) -> int:
    """Remove up to `limit` rows of files that were erased a day ago or more; return how many.

    Also of those that their tenants erased.
    """
    return _count(session, _FORGET_FILES, before=before, limit=limit)


def prune_endpoints(session: Session, *, before: datetime, limit: int) -> int:
    """Remove up to `limit` webhook endpoints deleted before `before`; return how many.

    Those with deliveries left stay.
    """
    return _count(session, _FORGET_ENDPOINTS, before=before, limit=limit)


def usage_due(session: Session, *, before: date) -> int:
    """Count the days of tenants that `prune_usage` would remove from the ledger."""
    query = text("SELECT count(*) FROM usage_ledger WHERE day < :before")
    return session.scalar(query, {"before": before}) or 0


def prune_usage(session: Session, *, before: date) -> int:
    """Remove the days before `before` from every tenant's ledger; return how many there were."""
    _take_time(session)
    days = _count(session, text("DELETE FROM usage_ledger WHERE day < :before"), before=before)
    if days:
        audit.append(
            session,
            EventName.USAGE_DAYS_PRUNED,
            chain=audit.SYSTEM,
            actor=ACTOR,
            days=days,
            before=before.isoformat(),
        )
    return days


def audit_months(session: Session, *, before: date) -> list[date]:
    """List the months of the audit log that ended before `before`, oldest first, by first days.

    The default partition is none of them.
    """
    months = session.scalars(_MONTHS.columns(month=Date)).all()
    return [month for month in months if _next_month(month) <= before]


def audit_events(session: Session, month: date) -> int:
    """Count the events of the month."""
    _take_time(session)
    return session.scalar(text(f"SELECT count(*) FROM {partition_of(month)}")) or 0


def prune_audit_month(session: Session, month: date, *, sha256: str | None = None) -> int:
    """Remove a month of the audit log; return how many events it had.

    The rest can still be verified. sha256: of the file that the month was exported to before.
    Fails with LockNotAvailable while the log is being read; try again.
    """
    _take_time(session)
    query = text("SELECT audit_prune_month(:month, :actor, CAST(:facts AS jsonb))")
    facts = json.dumps({"exported_sha256": sha256} if sha256 else {})
    return session.scalar(query, {"month": month, "actor": ACTOR, "facts": facts}) or 0


def partition_of(month: date) -> str:
    """Name the table that holds a month of the audit log."""
    return f"audit_events_{month:%Y_%m}"


def _take_time(session: Session) -> None:
    """Let a statement that reads a whole table run for as long as it takes."""
    session.execute(text("SET LOCAL statement_timeout = 0"))


def _next_month(month: date) -> date:
    return (month.replace(day=1) + timedelta(days=32)).replace(day=1)


def _old(before: datetime, tier: str | None) -> dict[str, Any]:
    return {"before": before, "upto": first_id(before), "tier": tier}


def _give_up(session: Session, object_keys: Sequence[str]) -> None:
    if object_keys:
        session.execute(_GIVE_UP, {"keys": sorted(set(object_keys))})


def _count(session: Session, statement: TextClause, **values: Any) -> int:
    # This is a CursorResult, which `execute` is not typed to return.
    return session.execute(statement, values).rowcount  # type: ignore[attr-defined,no-any-return]
