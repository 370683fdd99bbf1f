"""Keep the ledger: megapixel-steps reserved at accept, and settled, abandoned or freed at the end.

Settled: those of the images that are stored, however the job ended. They can be downloaded, so they
are paid, at the price of their own device time. Abandoned: the denoise steps that were done on
images which are not stored, where the tenant canceled the job. They cost no money, but count
against quotas, or canceling at the last step would give device time for nothing. Of a job that
failed, expired or lost steps with a worker nothing is abandoned: that is not the tenant's doing,
and the attempts' records tell what it took. Freed: the rest. Quotas count reserved, settled and
abandoned.

How far images had come is known in three ways. The steps of images that were rendered, and of those
with a snapshot, are in their rows when the job is canceled, and are booked with it. What the worker
had done since then it reports when it has stopped, a step later, and that is booked then. If a
worker dies in between, what it had done since its last report is lost.

There is one row per tenant and UTC day, written in the transaction of the job's own transition, so
no crash and no flushed Redis can make it wrong (`models.accepting` reserves). A job is booked on
the day on which it was accepted.
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
    UPDATE usage_ledger SET
        reserved = reserved - :reserved,
        settled = settled + :settled,
        abandoned = abandoned + :abandoned,
        jobs_succeeded = jobs_succeeded + CAST(:succeeded AS integer),
        cost = cost + :cost
    WHERE tenant_id = :tenant_id AND day = :day
    """
)
_ABANDON = text(
    """
    UPDATE usage_ledger SET abandoned = abandoned + :amount
    WHERE tenant_id = :tenant_id AND day = :day
    """
)
_MICRO = Decimal("0.000001")


@dataclass(frozen=True)
class Shares:
    """A job's megapixel-steps, divided among its images, or among all their denoise steps.

    Rounded down: the shares together are never more than was reserved.
    """

    megapixel_steps: Decimal
    num_images: int
    num_steps: int

    def of_images(self, stored: int) -> Decimal:
        """Count so many of the images; all of them are exactly what the job counts."""
        share = self.megapixel_steps * stored / self.num_images
        return share.quantize(_MICRO, rounding=ROUND_DOWN)

    def of_steps(self, steps: int) -> Decimal:
        """Count so many denoise steps, of all images together."""
        share = self.megapixel_steps * steps / (self.num_images * self.num_steps)
        return share.quantize(_MICRO, rounding=ROUND_DOWN)


@dataclass(frozen=True, kw_only=True)
class Booking:
    """The entries of one job's end, in megapixel-steps and money."""

    reserved: Decimal  # the job's reservation, which ends
    settled: Decimal
    abandoned: Decimal
    cost: Decimal
    succeeded: bool


def settle(session: Session, booking: Booking, *, tenant_id: uuid.UUID, day: date | None) -> None:
    """Book the end of a job. Does nothing for a job that is older than the ledger."""
    if day is not None:
        session.execute(_SETTLE, {"tenant_id": tenant_id, "day": day, **vars(booking)})


def abandon(session: Session, amount: Decimal, *, tenant_id: uuid.UUID, day: date | None) -> None:
    """Book megapixel-steps that became known only after their job was canceled."""
    if day is not None and amount:
        session.execute(_ABANDON, {"tenant_id": tenant_id, "day": day, "amount": amount})


_TOTALS = text(
    """
    WITH clock AS (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now), used AS (
        SELECT sum(reserved + settled + abandoned) AS month,
               sum(reserved + settled + abandoned) FILTER (WHERE day = now::date) AS today
        FROM usage_ledger, clock
        WHERE tenant_id = :tenant_id AND day >= date_trunc('month', now)::date
    )
    SELECT coalesce(today, 0), coalesce(month, 0),
           CASE WHEN CAST(:count_to AS integer) IS NULL THEN 0 ELSE (SELECT count(*) FROM (
               SELECT 1 FROM jobs
               WHERE tenant_id = :tenant_id AND state IN ('queued', 'running', 'storing')
               LIMIT CAST(:count_to AS integer) + 1) active) END,
           extract(epoch FROM date_trunc('day', now) + interval '1 day' - now)::double precision,
           extract(epoch FROM date_trunc('month', now) + interval '1 month' - now)::double precision
    FROM used, clock
    """
)


def lock(session: Session, *, tenant_id: uuid.UUID) -> None:
    """Keep other transactions from writing jobs of the tenant until commit.

    So a count made after it is exact, also when the day changes.
    """
    session.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended('usage:' || :tenant_id, 0))"),
        {"tenant_id": str(tenant_id)},
    )


def usage_totals(
    session: Session, *, tenant_id: uuid.UUID, count_jobs_to: int | None
) -> UsageTotals:
    """Add up what the tenant has used, with what this transaction has written.

    count_jobs_to: the count of active jobs may stop above this number; None: they are not counted.
    """
    row = session.execute(_TOTALS, {"tenant_id": tenant_id, "count_to": count_jobs_to}).one()
    return UsageTotals(*row)


def days(session: Session, *, tenant_id: uuid.UUID, since: date, until: date) -> Sequence[UsageDay]:
    """Read the ledger from `since` to `until`, both included, oldest first.

    Days without a job have no row.
    """
    own = (UsageDay.tenant_id == tenant_id, UsageDay.day >= since, UsageDay.day <= until)
    return session.scalars(select(UsageDay).where(*own).order_by(UsageDay.day)).all()
