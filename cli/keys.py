"""keys: API keys of tenants."""

import uuid

import click
from sqlalchemy.orm import Session

from cli import screen
from cli.installation import Installation, pass_installation
from models import api_keys, tenants
from models.tables import Tenant

_TENANT = click.option("--tenant", "tenant_name", default="demo", show_default=True, help="Whose keys.")


@click.group()
def keys() -> None:
    """List, issue and revoke API keys."""


@keys.command("list")
@_TENANT
@pass_installation
def list_keys(installation: Installation, tenant_name: str) -> None:
    """The tenant's keys, revoked ones included; the keys themselves nobody can show again."""
    with installation.transaction() as session:
        found = api_keys.of_tenant(session, _tenant(session, tenant_name).id)
    rows = [(key.id, f"dr_{key.kid}_…", key.name, key.created_at, key.expires_at, key.revoked_at) for key in found]
    screen.out().print(screen.table(["id", "key", "name", "created (UTC)", "expires", "revoked"], rows))


@keys.command()
@_TENANT
@click.option("--name", default="cli", show_default=True, help="What the key is for.")
@pass_installation
def issue(installation: Installation, tenant_name: str, name: str) -> None:
    """Print a new key. It is shown this once."""
    pepper = installation.look_up("API_KEY_PEPPER")
    with installation.transaction() as session:
        row, key = api_keys.issue(session, tenant_id=_tenant(session, tenant_name).id, name=name, pepper=pepper)
    click.echo(key)
    screen.err().print(f"id {row.id}; kept nowhere in plain text", style="dim")


@keys.command()
@click.argument("key_id", type=click.UUID)
@pass_installation
def revoke(installation: Installation, key_id: uuid.UUID) -> None:
    """Refuse the key with the id KEY_ID from now on."""
    with installation.transaction() as session:
        row = api_keys.revoke(session, key_id)
    if row is None:
        raise click.UsageError(f"there is no live key with the id {key_id}")
    screen.out().print(f"key dr_{row.kid}_… is revoked")


def _tenant(session: Session, name: str) -> Tenant:
    tenant = tenants.by_name(session, name)
    if tenant is None:
        raise click.UsageError(f"there is no tenant {name!r}; `darkroom tenants list` shows them")
    return tenant
