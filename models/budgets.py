"""Note, once a month and threshold, that a tenant has spent a part of its monthly budget.

The budget is money; it refuses nothing. Spent is what the ledger says of the UTC month's days.
"""

import uuid
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from models import audit, webhooks
from models.audit_events import EventName
from models.jobs import SWEEPER
from policy.limits import BUDGET_THRESHOLDS
from policy.webhooks import BUDGET_EVENT

# Of each tenant the highest threshold that it has reached and that is not told; those below it are
# told with it.
_REACHED = text(
    """
    WITH month AS (
        SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date AS month
    ), spent AS (
        SELECT t.id, t.monthly_budget AS budget, sum(u.cost) AS spent
        FROM tenants t
        JOIN usage_ledger u ON u.tenant_id = t.id AND u.day >= (SELECT month FROM month)
        WHERE t.monthly_budget > 0
        GROUP BY t.id
    ), told AS (
        INSERT INTO budget_alerts (tenant_id, month, percent)
        SELECT s.id, m.month, p.percent
        FROM spent s, month m, unnest(CAST(:thresholds AS integer[])) AS p (percent)
        WHERE s.spent * 100 >= s.budget * p.percent
        ON CONFLICT DO NOTHING
        RETURNING tenant_id, month, percent
    )
    SELECT told.tenant_id, told.month, max(told.percent) AS percent, s.budget, s.spent
    FROM told JOIN spent s ON s.id = told.tenant_id
    GROUP BY told.tenant_id, told.month, s.budget, s.spent
    ORDER BY told.tenant_id
    """
)
_OVER = text(
    """
    SELECT count(*) FROM tenants t
    WHERE t.monthly_budget > 0 AND t.monthly_budget <= (
        SELECT coalesce(sum(u.cost), 0) FROM usage_ledger u WHERE u.tenant_id = t.id
            AND u.day >= date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date)
    """
)


@dataclass(frozen=True)
class ReachedBudget:
    """A threshold that a tenant has reached. month: its first day."""

    tenant_id: uuid.UUID
    month: date
    percent: int
    budget: Decimal
    spent: Decimal


def note_reached_thresholds(session: Session, *, currency: str) -> list[ReachedBudget]:
    """Write a webhook delivery and an audit event for each threshold that was reached newly."""
    rows = session.execute(_REACHED, {"thresholds": list(BUDGET_THRESHOLDS)})
    reached = [ReachedBudget(*row) for row in rows]
    for one in reached:
        data: dict[str, Any] = {
            "month": f"{one.month:%Y-%m}",
            "percent": one.percent,
            "budget": f"{one.budget:.6f}",
            "spent": f"{one.spent:.6f}",
            "currency": currency,
        }
        webhooks.note_of_tenant(session, one.tenant_id, BUDGET_EVENT, data)
        audit.append(
            session,
            EventName.TENANT_BUDGET_REACHED,
            chain=one.tenant_id,
            actor=SWEEPER,
            **data,
        )
    return reached


def count_over(session: Session) -> int:
    """Count the tenants that have spent this month's budget, or more."""
    return session.scalar(_OVER) or 0
