"""How violations are told: a table of checks, and the history of every job that broke one."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.lib.integrity.checks import Check
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.records import job_history

_TOLD = 10  # violations of a check that are printed
_JOBS_TOLD = 4  # jobs whose history is


def show_checks(probe: StackProbe, title: str, checks: Sequence[Check]) -> None:
    """Print the table, and below it what is needed to look into each violation."""
    console = Console()
    table = Table("check", "looked at", "wrong", title=title)
    table.columns[2].justify = "right"
    for check in checks:
        wrong = f"[red]{len(check.violations)}[/red]" if check.violations else "0"
        table.add_row(check.name, check.looked_at, wrong)
    console.print(table)
    for check in checks:
        for violation in check.violations[:_TOLD]:
            console.print(
                f"{check.name}: {violation.job_id or ''} {violation.what}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    broken = dict.fromkeys(
        violation.job_id
        for check in checks
        for violation in check.violations[:_TOLD]
        if violation.job_id is not None
    )
    for job_id in list(broken)[:_JOBS_TOLD]:
        console.print(
            f"job {job_id}",
            *job_history(probe, job_id),
            sep="\n  ",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
