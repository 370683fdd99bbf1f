"""tenants: who may have keys."""

import click
from sqlalchemy.exc import IntegrityError

from cli import screen
from cli.installation import Installation, pass_installation
from models import tenants as records


@click.group()
def tenants() -> None:
    """List and create tenants."""


@tenants.command("list")
@pass_installation
def list_tenants(installation: Installation) -> None:
    """Every tenant, oldest first."""
    with installation.transaction() as session:
        found = records.all_of_them(session)
    rows = [(tenant.id, tenant.name, tenant.weight, tenant.created_at) for tenant in found]
    screen.out().print(screen.table(["tenant", "name", "weight", "created (UTC)"], rows, numbers=["weight"]))


@tenants.command("weigh")
@click.argument("name")
@click.argument("weight", type=click.FloatRange(min=0, min_open=True))
@pass_installation
@click.pass_context
def weigh_tenant(ctx: click.Context, installation: Installation, name: str, weight: float) -> None:
    """Give a tenant another WEIGHT: twice another's means twice its device time while both have jobs waiting in one tier."""
    with installation.transaction() as session:
        tenant = records.by_name(session, name)
        if tenant is not None:
            records.weigh(session, tenant, weight=weight)
    if tenant is None:
        screen.complain(f"There is no tenant {name!r}.")
        ctx.exit(4)
    screen.out().print(f"tenant {name} weighs {weight:g}; its jobs accepted from now on count by that")


@tenants.command("create")
@click.argument("name")
@click.option(
    "--weight", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Its share, against the others'."
)
@pass_installation
@click.pass_context
def create_tenant(ctx: click.Context, installation: Installation, name: str, weight: float) -> None:
    """Create a tenant; it needs a key next."""
    try:
        with installation.transaction() as session:
            tenant = records.create(session, name=name, weight=weight)
    except IntegrityError:
        screen.complain(f"There is a tenant {name!r} already.")
        ctx.exit(4)
    screen.out().print(f"tenant {tenant.id} ({tenant.name}); a key: darkroom keys issue --tenant {tenant.name}", soft_wrap=True)
