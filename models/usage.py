"""The ledger: megapixel-steps reserved when a job is accepted, and when it ends settled, abandoned or free again.

Settled: of the images that are stored, whatever the job's end: they can be had, so they are paid,
at the price of their own device time. Abandoned: the denoise steps that were done on images which
are not stored, where the tenant took the job back. It costs no money, and counts against quotas all
the same, or canceling at the last step would be a way to use the devices for nothing. Of a job that
failed, expired or lost steps with a worker nothing is abandoned: that is not the tenant's doing,
and the attempts' records tell what it took. Free again: the rest. Quotas count what is reserved,
settled and abandoned.

How far images had come is known in three ways: the steps of those that were rendered, and of those
that a snapshot was kept of, are in their rows when the job is canceled, and are booked with it;
what the worker had done since, it says itself when it has stopped, a step later, and that is booked
then. A worker that dies just then takes along what it had done since it last spoke.

One row per tenant and UTC day, written in the transaction of the job's own transition, so no crash
and no flushed Redis can make it say something else (`models.accepting` reserves). A job is booked
on the day on which it was accepted.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_DOWN, Decimal

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models.tables import UsageDay
from policy.limits import UsageTotals

_SETTLE = text(
    """
    UPDATE usage_ledger SET reserved = reserved - :reserved, settled = settled + :settled, abandoned = abandoned + :abandoned,
        jobs_succeeded = jobs_succeeded + CAST(:succeeded AS integer), cost = cost + :cost
    WHERE tenant_id = :tenant_id AND day = :day
    """
)
_ABANDON = text(
    "UPDATE usage_ledger SET abandoned = abandoned + :amount WHERE tenant_id = :tenant_id AND day = :day"
)
_MICRO = Decimal("0.000001")


@dataclass(frozen=True)
class Shares:
    """What a job counts, in megapixel-steps, divided among its images, or among all their denoise steps.

    Rounded down: the shares together are never more than was reserved.
    """

    megapixel_steps: Decimal
    num_images: int
    num_steps: int

    def of_images(self, stored: int) -> Decimal:
        """Count so many of the images; all of them are exactly what the job counts."""
        return (self.megapixel_steps * stored / self.num_images).quantize(
            _MICRO, rounding=ROUND_DOWN
        )

    def of_steps(self, steps: int) -> Decimal:
        """Count so many denoise steps, of all images together."""
        return (self.megapixel_steps * steps / (self.num_images * self.num_steps)).quantize(
            _MICRO, rounding=ROUND_DOWN
        )


@dataclass(frozen=True, kw_only=True)
class Booking:
    """What a job came to, in megapixel-steps and money."""

    reserved: Decimal  # and so far not free
    settled: Decimal
    abandoned: Decimal
    cost: Decimal
    succeeded: bool


def settle(session: Session, booking: Booking, *, tenant_id: uuid.UUID, day: date | None) -> None:
    """Book what became of a job. Nothing for one of before there was a ledger."""
    if day is not None:
        session.execute(_SETTLE, {"tenant_id": tenant_id, "day": day, **vars(booking)})


def abandon(session: Session, amount: Decimal, *, tenant_id: uuid.UUID, day: date | None) -> None:
    """Book megapixel-steps of a job that was canceled before it was known that they had been done."""
    if day is not None and amount:
        session.execute(_ABANDON, {"tenant_id": tenant_id, "day": day, "amount": amount})


_TOTALS = text(
    """
    WITH clock AS (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now), used AS (
        SELECT sum(reserved + settled + abandoned) AS month,
               sum(reserved + settled + abandoned) FILTER (WHERE day = now::date) AS today
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
    session.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended('usage:' || :tenant_id, 0))"),
        {"tenant_id": str(tenant_id)},
    )


def usage_totals(
    session: Session, *, tenant_id: uuid.UUID, count_jobs_to: int | None
) -> UsageTotals:
    """Add up what the tenant has used, with what this transaction has written.

    count_jobs_to: there is no need to count on from there.
    """
    row = session.execute(_TOTALS, {"tenant_id": tenant_id, "count_to": count_jobs_to}).one()
    return UsageTotals(*row)


def days(session: Session, *, tenant_id: uuid.UUID, since: date, until: date) -> Sequence[UsageDay]:
    """The ledger of the days from `since` to `until`, both included, oldest first; days without a job have no row."""
    own = (UsageDay.tenant_id == tenant_id, UsageDay.day >= since, UsageDay.day <= until)
    return session.scalars(select(UsageDay).where(*own).order_by(UsageDay.day)).all()
