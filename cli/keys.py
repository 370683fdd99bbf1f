"""Define `keys`: manage the API keys of tenants."""

import uuid
from datetime import UTC, datetime, timedelta

import click

from cli import screen
from cli.installation import Installation, pass_installation
from cli.tenants import named
from models import api_keys
from models.tables import ApiKey
from policy.limits import DEFAULT_SCOPES, KEY_GRACE_S, SCOPES

_TENANT = click.option(
    "--tenant", "tenant_name", default="demo", show_default=True, help="Whose keys."
)


@click.group()
def keys() -> None:
    """List, issue, rotate and revoke API keys."""


@keys.command("list")
@_TENANT
@pass_installation
def list_keys(installation: Installation, tenant_name: str) -> None:
    """List a tenant's keys, including revoked ones. Their secret part is never shown again."""
    with installation.transaction() as session:
        found = api_keys.of_tenant(session, named(session, tenant_name).id)
    columns = ["id", "key", "name", "scopes", "created (UTC)", "used", "expires", "revoked"]
    screen.out().print(screen.table(columns, [_row(key) for key in found]))


def _row(key: ApiKey) -> tuple[object, ...]:
    return (
        key.id,
        f"dr_{key.kid}_…",
        key.name,
        " ".join(key.scopes),
        key.created_at,
        key.last_used_at,
        key.expires_at,
        key.revoked_at,
    )


@keys.command()
@_TENANT
@click.option("--name", default="cli", show_default=True, help="What the key is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=DEFAULT_SCOPES,
    show_default=True,
    help="What the key may do; repeat for several.",
)
@click.option(
    "--expires-in-days",
    type=click.FloatRange(min=0, min_open=True),
    help="The key is refused after so many days.",
)
@pass_installation
def issue(
    installation: Installation,
    tenant_name: str,
    name: str,
    scopes: tuple[str, ...],
    expires_in_days: float | None,
) -> None:
    """Issue a key and print it, this once only.

    The scope `admin` is for operators: it covers all tenants.
    """
    pepper = installation.look_up("API_KEY_PEPPER")
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    with installation.transaction() as session:
        row, key = api_keys.issue(
            session,
            tenant_id=named(session, tenant_name).id,
            name=name,
            scopes=sorted(set(scopes)),
            expires_at=expires_at,
            pepper=pepper,
        )
    click.echo(key)
    screen.err().print(f"id {row.id}; the key is not stored in plain text", style="dim")


@keys.command()
@click.argument("key_id", type=click.UUID)
@click.option(
    "--grace-hours",
    type=click.FloatRange(min=0),
    default=KEY_GRACE_S / 3600,
    show_default=True,
    help="For so many hours the old key still works.",
)
@pass_installation
def rotate(installation: Installation, key_id: uuid.UUID, grace_hours: float) -> None:
    """Print a new key with the name and scopes of KEY_ID. The old key still works for a while."""
    pepper = installation.look_up("API_KEY_PEPPER")
    with installation.transaction() as session:
        rotated = api_keys.rotate(session, key_id, pepper=pepper, grace_s=grace_hours * 3600)
    if rotated is None:
        raise click.UsageError(f"there is no valid key with the id {key_id}")
    row, key = rotated
    click.echo(key)
    screen.err().print(f"id {row.id}; the old key is refused in {grace_hours:g} h", style="dim")


@keys.command()
@click.argument("key_id", type=click.UUID)
@pass_installation
def revoke(installation: Installation, key_id: uuid.UUID) -> None:
    """Revoke the key with the id KEY_ID. It is refused at once."""
    with installation.transaction() as session:
        row = api_keys.revoke(session, key_id)
    if row is None:
        raise click.UsageError(f"there is no valid key with the id {key_id}")
    screen.out().print(f"key dr_{row.kid}_… is revoked")
