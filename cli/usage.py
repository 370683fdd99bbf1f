"""Define `usage`: show what a tenant used, from the ledger."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from cli import screen
from cli.installation import Installation, pass_installation
from cli.tenants import named
from models import usage as ledger
from models.tables import UsageDay

_SUMMED = ("jobs_accepted", "jobs_succeeded", "reserved", "settled", "abandoned", "cost")
_COLUMNS = (
    "day (UTC)",
    "accepted",
    "succeeded",
    "reserved Mpx-steps",
    "settled Mpx-steps",
    "abandoned Mpx-steps",
    "cost",
)


@click.command()
@click.option("--tenant", "tenant_name", default="demo", show_default=True, help="Whose.")
@click.option(
    "--days",
    "num_days",
    type=click.IntRange(1, 366),
    default=30,
    show_default=True,
    help="How many days, today included.",
)
@pass_installation
def usage(installation: Installation, tenant_name: str, num_days: int) -> None:
    """Show what a tenant used, by UTC days. Days without jobs are left out.

    A job counts on the day on which it was accepted. Megapixel-steps are reserved while a job has
    not ended, settled for its stored images, and abandoned if they were done for a job that was
    canceled. Quotas count all three; the cost counts stored images.
    """
    today = datetime.now(UTC).date()
    with installation.transaction() as session:
        tenant_id = named(session, tenant_name).id
        days = ledger.days(
            session, tenant_id=tenant_id, since=today - timedelta(days=num_days - 1), until=today
        )
    currency = installation.load_fleet().currency
    rows = [*(_line(str(day.day), [day], currency) for day in days), _line("total", days, currency)]
    screen.out().print(screen.table(_COLUMNS, rows, numbers=_COLUMNS[1:]))


def _line(label: str, days: Sequence[UsageDay], currency: str) -> tuple[Any, ...]:
    accepted, succeeded, reserved, settled, abandoned, cost = (
        sum(getattr(day, column) for day in days) for column in _SUMMED
    )
    return (
        label,
        accepted,
        succeeded,
        f"{reserved:.6f}",
        f"{settled:.6f}",
        f"{abandoned:.6f}",
        f"{cost:.6f} {currency}",
    )
