"""Define `bill`: write what tenants are charged as a file that billing tools read.

The columns are those of FOCUS 1.2, the FinOps Open Cost and Usage Specification
(https://focus.finops.org/focus-specification/v1-2), data set "Cost and Usage".
"""

import csv
import json
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import click

from cli import screen
from cli.installation import Installation, pass_installation
from cli.sql import ask
from cli.tenants import named

_CHARGES = """
SELECT c.day, c.tenant, c.tier, c.model, c.currency, c.images, c.gpu_seconds, c.cost,
       u.chain_id AS tenant_id
FROM images_by_tenant_day c JOIN audit_chain_status u ON u.chain = c.tenant
WHERE c.day >= %s AND c.day < %s AND (%s IS NULL OR c.tenant = %s)
ORDER BY c.day, c.tenant, c.tier, c.model, c.currency
"""
_PROVIDER = "Darkroom"
# In the order of the specification; those that are always null included.
COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceId",
    "InvoiceIssuerName",
    "ListCost",
    "PricingCategory",
    "PricingCurrency",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "Tags",
)


def _month(_ctx: click.Context, _param: click.Parameter, value: str | None) -> date:
    if value is None:
        return datetime.now(UTC).date().replace(day=1)
    try:
        return datetime.strptime(value, "%Y-%m").date()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a month such as 2026-11") from None


@click.command()
@click.option(
    "--month", metavar="YYYY-MM", callback=_month, help="A UTC month. [default: this one]"
)
@click.option("--tenant", "tenant_name", help="One tenant only. [default: all]")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@pass_installation
def bill(installation: Installation, month: date, tenant_name: str | None, file: Path) -> None:
    """Write what tenants are charged for a month to FILE, as CSV; `-` is standard output.

    One row per UTC day, tenant, tier and model, in the columns of FOCUS 1.2, which billing tools
    read. Images count on the day on which they were stored.
    """
    if tenant_name is not None:
        with installation.transaction() as session:
            named(session, tenant_name)  # or a name that is misspelt would owe nothing
    end = (month + timedelta(days=31)).replace(day=1)
    url = installation.look_up("AUDITOR_DATABASE_URL")
    answer = ask(url, _CHARGES, (month, end, tenant_name, tenant_name))
    charges = (dict(zip(answer.columns, row, strict=True)) for row in answer.rows)
    rows = [_focus(charge, month, end) for charge in charges]
    if str(file) == "-":
        _write(rows, sys.stdout)
    else:
        with file.open("w", newline="") as stream:
            _write(rows, stream)
    screen.err().print(f"{len(rows)} rows for {month:%Y-%m}", style="dim")


def _write(rows: list[dict[str, Any]], stream: IO[str]) -> None:
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _focus(charge: dict[str, Any], month: date, end: date) -> dict[str, Any]:
    """Return one charge in the columns of FOCUS; None is null."""
    cost = charge["cost"]
    hours = charge["gpu_seconds"] / 3600
    what = {"model": charge["model"], "tier": charge["tier"]}
    named = {
        "BilledCost": cost,
        "BillingAccountId": charge["tenant_id"],
        "BillingAccountName": charge["tenant"],
        "BillingAccountType": "Tenant",
        "BillingCurrency": charge["currency"],
        "BillingPeriodEnd": _instant(end),
        "BillingPeriodStart": _instant(month),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"Images of {charge['model']} in tier {charge['tier']}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _instant(charge["day"] + timedelta(days=1)),
        "ChargePeriodStart": _instant(charge["day"]),
        "ConsumedQuantity": charge["images"],
        "ConsumedUnit": "Images",
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceIssuerName": _PROVIDER,
        "ListCost": cost,
        "PricingCategory": "Standard",
        "PricingCurrency": charge["currency"],
        "PricingQuantity": f"{hours:.9f}",
        "PricingUnit": "Hours",
        "ProviderName": _PROVIDER,
        "PublisherName": _PROVIDER,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Image generation",
        "ServiceSubcategory": "Generative AI",
        "Tags": json.dumps(what, sort_keys=True),
    }
    return dict.fromkeys(COLUMNS) | named


def _instant(day: date) -> str:
    return f"{day:%Y-%m-%d}T00:00:00Z"
