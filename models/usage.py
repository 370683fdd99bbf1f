"""The ledger: megapixel-steps reserved when a job is accepted, settled when it succeeds, released when it ends otherwise.

One row per tenant and UTC day, written in the transaction of the job's own transition, so no crash and no flushed Redis can make
it say something else (`models.accepting` reserves). A job is booked on the day on which it was accepted.
"""

import uuid
from datetime import date
from decimal import Decimal

from sqlalchemy import text
from sqlalchemy.orm import Session

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
