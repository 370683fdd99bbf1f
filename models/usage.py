"""The ledger: megapixel-steps reserved when a job is accepted, settled when it succeeds, released when it ends otherwise.

One row per tenant and UTC day, written in the transaction of the job's own transition, so no crash and no flushed Redis can make
it say something else (`models.accepting` reserves). A job is booked on the day on which it was accepted.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models.tables import UsageDay

_SETTLE = text(
    """
    UPDATE usage_ledger SET reserved = reserved - :amount, settled = settled + CASE WHEN :succeeded THEN :amount ELSE 0 END,
        jobs_succeeded = jobs_succeeded + CASE WHEN :succeeded THEN 1 ELSE 0 END, cost = cost + :cost
    WHERE tenant_id = :tenant_id AND day = :day
    """
)


def settle(session: Session, *, tenant_id: uuid.UUID, day: date | None, amount: Decimal, succeeded: bool, cost: Decimal) -> None:
    """What was reserved is used (`succeeded`), or free again. Nothing for a job of before there was a ledger."""
    if day is not None:
        row = {"tenant_id": tenant_id, "day": day, "amount": amount, "succeeded": succeeded, "cost": cost}
        session.execute(_SETTLE, row)


@dataclass(frozen=True)
class Stand:
    """What a tenant has used, in megapixel-steps reserved and settled, and has under way; seconds until the UTC day and month end."""

    used_today: Decimal
    used_this_month: Decimal
    active_jobs: int
    day_ends_in_s: float
    month_ends_in_s: float


_STAND = text(
    """
    WITH clock AS (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now), used AS (
        SELECT sum(reserved + settled) AS month, sum(reserved + settled) FILTER (WHERE day = now::date) AS today
        FROM usage_ledger, clock WHERE tenant_id = :tenant_id AND day >= date_trunc('month', now)::date
    )
    SELECT coalesce(today, 0), coalesce(month, 0),
           CASE WHEN CAST(:count_to AS integer) IS NULL THEN 0 ELSE (SELECT count(*) FROM (
               SELECT 1 FROM jobs WHERE tenant_id = :tenant_id AND state IN ('queued', 'running', 'storing')
               LIMIT CAST(:count_to AS integer) + 1) active) END,
           extract(epoch FROM date_trunc('day', now) + interval '1 day' - now)::double precision,
           extract(epoch FROM date_trunc('month', now) + interval '1 month' - now)::double precision
    FROM used, clock
    """
)


def lock(session: Session, *, tenant_id: uuid.UUID) -> None:
    """Let nobody else write jobs of the tenant until commit: what is counted then is exact, also while the day turns."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('usage:' || :tenant_id, 0))"), {"tenant_id": str(tenant_id)})


def stand(session: Session, *, tenant_id: uuid.UUID, count_jobs_to: int | None) -> Stand:
    """Where the tenant stands, with what this transaction has written. count_jobs_to: there is no need to count on from there."""
    row = session.execute(_STAND, {"tenant_id": tenant_id, "count_to": count_jobs_to}).one()
    return Stand(*row)


def days(session: Session, *, tenant_id: uuid.UUID, since: date, until: date) -> Sequence[UsageDay]:
    """The ledger of the days from `since` to `until`, both included, oldest first; days without a job have no row."""
    own = (UsageDay.tenant_id == tenant_id, UsageDay.day >= since, UsageDay.day <= until)
    return session.scalars(select(UsageDay).where(*own).order_by(UsageDay.day)).all()
