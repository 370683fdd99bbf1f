"""Serve /v1/key and /v1/usage: who the caller is, what it may use and what it has used."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from flask import Blueprint, Request, request
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.auth import require_key
from app.http.context import caller, runtime
from app.problems import InvalidQuery
from app.schemas import account as schemas
from app.services import usage
from models.tables import UsageDay
from policy.limits import Limits

bp = Blueprint("account", __name__, url_prefix="/v1")
bp.before_request(require_key)

MOST_DAYS = 366


@bp.get("/key")
def show_key() -> ResponseReturnValue:
    """Show the key of this request: its id, its tenant, its scopes, and the tenant's limits."""
    asking = caller()
    shown = schemas.OwnKey(
        id=asking.api_key_id,
        tenant_id=asking.tenant_id,
        actor=asking.actor,
        scopes=sorted(asking.scopes),
        limits=limits_view(asking.limits),
    )
    return answer(shown)


@bp.get("/usage")
def show_usage() -> ResponseReturnValue:
    """Show the tenant's ledger by UTC days, its limits, and what it has used of them.

    `from` and `to` are included; by default they are the first day of this month and today.
    """
    since, until = read_days(request)
    used = usage.own(runtime(), caller(), since=since, until=until)
    files = schemas.StoredFiles(count=used.num_stored_files, size_bytes=used.stored_bytes)
    shown = schemas.OwnUsage(
        **usage_view(used.days, since, until),
        limits=limits_view(caller().limits),
        used_megapixel_steps=schemas.UsedNow(
            today=float(used.totals.used_today),
            this_month=float(used.totals.used_this_month),
            active_jobs=used.totals.active_jobs,
        ),
        stored_files=files,
    )
    return answer(shown)


def read_days(asked: Request) -> tuple[date, date]:
    """Read `from` and `to`; the default is this month up to today. Raises InvalidQuery."""
    today = datetime.now(UTC).date()
    since = _day(asked, "from", today.replace(day=1))
    until = _day(asked, "to", today)
    if not 0 <= (until - since).days <= MOST_DAYS:
        raise InvalidQuery(
            f"`to` must not be before `from`, nor more than {MOST_DAYS} days after it.",
            parameter="to",
        )
    return since, until


def usage_view(rows: Sequence[UsageDay], since: date, until: date) -> dict[str, Any]:
    """Return the members of `schemas.Usage` for these days of a ledger."""
    days = [
        schemas.UsageDay(
            day=row.day,
            jobs_accepted=row.jobs_accepted,
            jobs_succeeded=row.jobs_succeeded,
            reserved_megapixel_steps=float(row.reserved),
            settled_megapixel_steps=float(row.settled),
            abandoned_megapixel_steps=float(row.abandoned),
            cost=str(row.cost),
        )
        for row in rows
    ]
    return {"since": since, "until": until, "currency": runtime().fleet.currency, "data": days}


def limits_view(limits: Limits) -> schemas.Limits:
    """Show a tenant's limits; null means no limit."""
    return schemas.Limits(**{name: _plain(value) for name, value in vars(limits).items()})


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def _day(asked: Request, name: str, default: date) -> date:
    text = asked.args.get(name)
    if text is None:
        return default
    try:
        if len(text) == 10:
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InvalidQuery(
        f"`{name}` must be a day such as 2026-11-26.", parameter=name, accepted="YYYY-MM-DD"
    )
