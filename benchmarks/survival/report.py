"""How it is told: a table of checks, the story of every job that broke one, and quantiles in a cell."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.serving.cells import percentile
from benchmarks.survival.checks import Check
from benchmarks.survival.ledger import story
from benchmarks.survival.rig import Rig

_TOLD, _JOBS_TOLD = 10, 4  # breaches of a check that are printed, and jobs whose story is


def show_checks(rig: Rig, title: str, checks: Sequence[Check]) -> None:
    """The table, and below it what is needed to look into each breach."""
    console, table = Console(), Table("check", "looked at", "wrong", title=title)
    table.columns[2].justify = "right"
    for check in checks:
        table.add_row(check.name, check.looked_at, f"[red]{len(check.wrong)}[/red]" if check.wrong else "0")
    console.print(table)
    for check in checks:
        for wrong in check.wrong[:_TOLD]:
            console.print(f"{check.name}: {wrong.job_id or ''} {wrong.what}", markup=False, highlight=False, soft_wrap=True)
    broken = dict.fromkeys(wrong.job_id for check in checks for wrong in check.wrong[:_TOLD] if wrong.job_id is not None)
    for job_id in list(broken)[:_JOBS_TOLD]:
        console.print(f"job {job_id}", *story(rig, job_id), sep="\n  ", markup=False, highlight=False, soft_wrap=True)


def show_figures(title: str, figures: Mapping[str, object], caption: str = "") -> None:
    table = Table("figure", "value", title=title, caption=caption)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _cell(value))
    Console().print(table)


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and the largest of the values; empty without values."""
    if not values:
        return {}
    return {
        "p50": round(percentile(values, 0.5), 2),
        "p95": round(percentile(values, 0.95), 2),
        "max": round(values[-1], 2),
        "of": len(values),
    }


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return "not recorded" if value is None else str(value)
