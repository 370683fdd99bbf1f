"""Define `tenants`: create tenants, and limit what each may use."""

from collections.abc import Mapping
from typing import Any

import click
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cli import screen
from cli.installation import Installation, pass_installation
from models import files, usage
from models import tenants as records
from models.tables import Tenant
from policy.limits import KINDS, LIMITS, MAX_WEIGHT, MIN_WEIGHT, OFFERED, InvalidLimits

_YES_OR_NO = {"true": True, "false": False, "none": False}  # as null is over HTTP


def named(session: Session, name: str) -> Tenant:
    """Return the tenant that an option names. Raises click.UsageError."""
    tenant = records.by_name(session, name)
    if tenant is None:
        raise click.UsageError(f"there is no tenant {name!r}; `darkroom tenants list` shows them")
    return tenant


@click.group()
def tenants() -> None:
    """List and create tenants, and limit what each may use."""


@tenants.command("list")
@pass_installation
def list_tenants(installation: Installation) -> None:
    """List every tenant, oldest first."""
    with installation.transaction() as session:
        found = records.list_all(session)
    rows = [(tenant.id, tenant.name, tenant.weight, tenant.created_at) for tenant in found]
    screen.out().print(
        screen.table(["tenant", "name", "weight", "created (UTC)"], rows, numbers=["weight"])
    )


@tenants.command("weigh")
@click.argument("name")
@click.argument("weight", type=click.FloatRange(MIN_WEIGHT, MAX_WEIGHT))
@pass_installation
@click.pass_context
def weigh_tenant(ctx: click.Context, installation: Installation, name: str, weight: float) -> None:
    """Set the WEIGHT of a tenant, its share of device time.

    With twice the weight of another tenant, it gets twice the device time while both have jobs
    waiting in the same tier.
    """
    with installation.transaction() as session:
        tenant = records.by_name(session, name)
        if tenant is not None:
            records.set_weight(session, tenant, weight=weight)
    if tenant is None:
        screen.complain(f"There is no tenant {name!r}.")
        ctx.exit(4)
    screen.out().print(
        f"tenant {name} has weight {weight:g}; it applies to jobs accepted from now on"
    )


@tenants.command("show")
@click.argument("name")
@pass_installation
@click.pass_context
def show_tenant(ctx: click.Context, installation: Installation, name: str) -> None:
    """Show a tenant's limits, and what it has used today and this month (UTC)."""
    with installation.transaction() as session:
        tenant = records.by_name(session, name)
        used = _usage_rows(session, tenant) if tenant is not None else []
    if tenant is None:
        screen.complain(f"There is no tenant {name!r}.")
        ctx.exit(4)
    limits = [(limit, _told(getattr(tenant, limit))) for limit in LIMITS]
    screen.out().print(screen.table(["limit", name], [*limits, *used]))


def _usage_rows(session: Session, tenant: Tenant) -> list[tuple[str, Any]]:
    totals = usage.usage_totals(session, tenant_id=tenant.id, count_jobs_to=1_000_000)
    count, size_bytes = files.stored(session, tenant_id=tenant.id)
    return [
        ("megapixel-steps used today", totals.used_today),
        ("and this month", totals.used_this_month),
        ("jobs under way", totals.active_jobs),
        ("pictures stored", count),
        ("and their bytes", size_bytes),
    ]


@tenants.command("limit")
@click.argument("name")
@click.argument("limits", nargs=-1, required=True)
@pass_installation
@click.pass_context
def limit_tenant(
    ctx: click.Context, installation: Installation, name: str, limits: tuple[str, ...]
) -> None:
    """Set LIMITS of a tenant, each as limit=value; `none` removes one.

    They apply within a second. Examples:

    requests_per_minute=600  megapixel_steps_per_minute=50 burst_megapixel_steps=200
    (these two together)
    max_concurrent_jobs=20  daily_megapixel_steps=5000  monthly_megapixel_steps=100000
    monthly_budget=500
    allowed_tiers=fast,batch  allowed_models=pocket  max_stored_bytes=5000000000  url_inputs=true
    """
    changes = dict(_change(installation, limit) for limit in limits)
    try:
        with installation.transaction() as session:
            tenant = records.by_name(session, name)
            if tenant is not None:
                records.limit(session, tenant, changes=changes)
    except InvalidLimits as error:
        raise click.UsageError(error.detail) from None
    if tenant is None:
        screen.complain(f"There is no tenant {name!r}.")
        ctx.exit(4)
    screen.out().print(
        f"tenant {name}: "
        + ", ".join(f"{limit} = {_told(value)}" for limit, value in changes.items()),
        soft_wrap=True,
    )


def _change(installation: Installation, text: str) -> tuple[str, Any]:
    name, separator, said = text.partition("=")
    if not separator or name not in LIMITS:
        raise click.UsageError(f"{text!r} is not limit=value; limits: {', '.join(LIMITS)}")
    word = said.strip().lower()
    if KINDS[name] is bool:
        if word not in _YES_OR_NO:
            raise _refused(name, said, "true or false")
        return name, _YES_OR_NO[word]
    if word == "none":
        return name, None
    return name, _names(installation, name, said) if name in OFFERED else _number(name, said)


def _names(installation: Installation, limit: str, said: str) -> list[str]:
    offered = tuple(getattr(installation.load_fleet(), OFFERED[limit].section))
    names = [name.strip() for name in said.split(",")]
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise _refused(
            limit,
            ",".join(unknown),
            f"one or more of {', '.join(offered)}, with commas between them, or none",
        )
    return names


def _number(limit: str, said: str) -> int | float:
    from pydantic import ValidationError

    # The bounds are the same as over HTTP. Import here: it loads the gateway.
    from app.http.admin import TenantChange

    try:
        number: int | float = getattr(
            TenantChange.model_validate({limit: said}, strict=False), limit
        )
    except ValidationError:
        raise _refused(
            limit, said, _bounds(TenantChange.model_json_schema()["properties"][limit]["anyOf"][0])
        ) from None
    return number


def _bounds(schema: Mapping[str, Any]) -> str:
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    least = (
        f"above {schema['exclusiveMinimum']}"
        if "exclusiveMinimum" in schema
        else f"from {schema['minimum']}"
    )
    return f"{kind} {least}, at most {schema['maximum']:.0f}, or none"


def _refused(limit: str, said: str, accepted: str) -> click.UsageError:
    return click.UsageError(f"{limit} takes {accepted}; not {said!r}")


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


@tenants.command("create")
@click.argument("name")
@click.option(
    "--weight",
    type=click.FloatRange(MIN_WEIGHT, MAX_WEIGHT),
    default=1.0,
    show_default=True,
    help="Its share of device time, relative to other tenants.",
)
@pass_installation
@click.pass_context
def create_tenant(ctx: click.Context, installation: Installation, name: str, weight: float) -> None:
    """Create a tenant. Issue a key for it next."""
    try:
        with installation.transaction() as session:
            tenant = records.create(session, name=name, weight=weight)
    except IntegrityError:
        screen.complain(f"A tenant named {name!r} exists already.")
        ctx.exit(4)
    screen.out().print(
        f"tenant {tenant.id} ({tenant.name}); next: darkroom keys issue --tenant {tenant.name}",
        soft_wrap=True,
    )
