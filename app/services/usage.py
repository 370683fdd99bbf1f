"""Read what tenants have used: their ledgers, and a caller's current use."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from app.caller import Caller
from app.runtime import Runtime
from app.services import tenants
from models import files, usage
from models.database import transaction
from models.tables import UsageDay
from policy.limits import UsageTotals

COUNT_JOBS_TO = 100_000  # unfinished jobs; the count of more than that is this number plus one


@dataclass(frozen=True, kw_only=True)
class OwnUsage:
    """A caller's ledger, its unfinished jobs and its stored files."""

    days: Sequence[UsageDay]
    totals: UsageTotals
    num_stored_files: int
    stored_bytes: int


def own(runtime: Runtime, caller: Caller, *, since: date, until: date) -> OwnUsage:
    """Read the caller's ledger from `since` to `until`, and its current use."""
    with transaction(runtime.database) as session:
        days = usage.days(session, tenant_id=caller.tenant_id, since=since, until=until)
        totals = usage.usage_totals(
            session,
            tenant_id=caller.tenant_id,
            count_jobs_to=COUNT_JOBS_TO,
        )
        num_stored_files, stored_bytes = files.stored(session, tenant_id=caller.tenant_id)
    return OwnUsage(
        days=days,
        totals=totals,
        num_stored_files=num_stored_files,
        stored_bytes=stored_bytes,
    )


def days_of(
    runtime: Runtime,
    tenant_id: UUID,
    *,
    since: date,
    until: date,
) -> Sequence[UsageDay]:
    """Read any tenant's ledger from `since` to `until`. Raises TenantNotFound."""
    with transaction(runtime.database) as session:
        tenants.find_in(session, tenant_id)
        return usage.days(session, tenant_id=tenant_id, since=since, until=until)
