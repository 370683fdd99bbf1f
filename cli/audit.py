"""Define `audit`: check that the audit log was not changed after it was written."""

from datetime import UTC, datetime

import click

from cli import screen
from cli.installation import Installation, pass_installation
from cli.sql import ask

_CHAINS = (
    "SELECT chain_id, chain FROM audit_chain_status WHERE %s IS NULL OR %s IN (chain, chain_id)"
)
_BROKEN_EVENTS = "SELECT chain_id, seq, event_id, problem FROM audit_verify_since(%s, %s)"
_COUNT = (
    "SELECT count(*) FROM audit_log "
    "WHERE (%s IS NULL OR chain = %s) AND (%s::timestamptz IS NULL OR at >= %s)"
)


@click.group()
def audit() -> None:
    """Check the audit log."""


@audit.command()
@click.option("--chain", help="One chain: a tenant's name or id, or `system`.  [default: all]")
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d"]),
    help="Check only events from this UTC day on, and their links to earlier ones.",
)
@pass_installation
@click.pass_context
def verify(
    ctx: click.Context, installation: Installation, chain: str | None, since: datetime | None
) -> None:
    """Check every hash and link of the audit log.

    Exit code 1 if a chain is broken; the first broken event is printed. Of a chain with pruned
    months, the rest is checked, and its link to the last event that was removed.
    """
    url = installation.look_up("AUDITOR_DATABASE_URL")
    chains = dict(ask(url, _CHAINS, (chain, chain)).rows)
    if chain and not chains:
        raise click.UsageError(f"there is no chain {chain!r}")
    only = next(iter(chains)) if chain else None
    start = since.replace(tzinfo=UTC) if since else None
    broken = ask(url, _BROKEN_EVENTS, (start, only)).rows
    name = chains[only] if only else None
    ((num_events,),) = ask(url, _COUNT, (name, name, start, start)).rows
    checked = f"{num_events} events in {len(chains)} chain{'' if len(chains) == 1 else 's'} checked"
    if not broken:
        screen.out().print(f"intact: {checked}")
        return
    chain_id, seq, event_id, problem = broken[0]
    where = f"event {seq}" + (f" ({event_id})" if event_id else "")
    first = f"chain {chains.get(chain_id, chain_id)}, {where}: {problem}"
    screen.complain(f"broken: {first} · {len(broken)} findings · {checked}")
    ctx.exit(1)
