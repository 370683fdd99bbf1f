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
    screen.out().print(screen.table(["tenant", "name", "created (UTC)"], [(tenant.id, tenant.name, tenant.created_at) for tenant in found]))


@tenants.command("create")
@click.argument("name")
@pass_installation
@click.pass_context
def create_tenant(ctx: click.Context, installation: Installation, name: str) -> None:
    """Create a tenant; it needs a key next."""
    try:
        with installation.transaction() as session:
            tenant = records.create(session, name=name)
    except IntegrityError:
        screen.complain(f"There is a tenant {name!r} already.")
        ctx.exit(4)
    screen.out().print(f"tenant {tenant.id} ({tenant.name}); a key: darkroom keys issue --tenant {tenant.name}", soft_wrap=True)
