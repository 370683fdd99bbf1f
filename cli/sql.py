"""Define `sql`: run a statement in the installation's Postgres."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import psycopg2
from sqlalchemy import URL, make_url

from cli import screen
from cli.installation import Installation, pass_installation


class StatementRefused(Exception):
    """Report that Postgres refused a statement; the message is its own, in one line."""


@dataclass(frozen=True)
class QueryResult:
    """Hold columns and rows, or only a status for statements that return nothing."""

    columns: Sequence[str]
    rows: Sequence[tuple[Any, ...]]
    status: str


@click.command()
@click.argument("statement")
@click.option(
    "--owner",
    is_flag=True,
    help="Run as the owner of the tables. By default as the auditor, who can only read the views.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@pass_installation
def sql(installation: Installation, statement: str, owner: bool, as_json: bool) -> None:
    """Run one SQL STATEMENT.

    Views to read: job_history, queue_now, flows_now, fleet_history, dead_letters,
    images_by_tenant_day, usage_by_tenant_day, costs_by_tenant_day, costs_by_pool_day,
    slo_attainment, device_time_by_hour, wasted_time_by_day, stored_files_by_tenant, webhooks_now,
    workers_now, audit_log, audit_chain_status.
    """
    variable = "MIGRATION_DATABASE_URL" if owner else "AUDITOR_DATABASE_URL"
    answer = ask(installation.look_up(variable), statement)
    if as_json:
        screen.print_json([dict(zip(answer.columns, row, strict=True)) for row in answer.rows])
    elif answer.columns:
        numbers = [
            name for name, kinds in _kinds(answer).items() if kinds <= {"int", "float", "Decimal"}
        ]
        screen.out().print(screen.table(answer.columns, answer.rows, numbers=numbers))
        count = f"{len(answer.rows)} row{'' if len(answer.rows) == 1 else 's'}"
        screen.err().print(f"({count})", style="dim")
    else:
        screen.out().print(answer.status)


def ask(database_url: str, statement: str, parameters: Sequence[Any] | None = None) -> QueryResult:
    """Run one statement in its own transaction. Raises StatementRefused, Unreachable."""
    url = make_url(database_url).set(drivername="postgresql")
    connection = _connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            columns = [column.name for column in cursor.description or ()]
            return QueryResult(
                columns, cursor.fetchall() if columns else [], cursor.statusmessage or ""
            )
    except psycopg2.errors.InsufficientPrivilege as error:
        hint = (
            " (the auditor sees views only; --owner runs as the owner)"
            if "auditor" in url.render_as_string()
            else ""
        )
        raise StatementRefused(f"Postgres: {' '.join(str(error).split())}{hint}") from None
    except psycopg2.Error as error:
        raise StatementRefused(f"Postgres: {str(error).strip().partition(chr(10))[0]}") from None
    finally:
        connection.close()


def _connect(url: URL) -> Any:
    try:
        return psycopg2.connect(
            url.render_as_string(hide_password=False),
            connect_timeout=5,
            application_name="darkroom sql",
        )
    except psycopg2.OperationalError as error:
        from darkroom_client import Unreachable

        raise Unreachable(f"Postgres does not answer: {' '.join(str(error).split())}") from None


def _kinds(answer: QueryResult) -> dict[str, set[str]]:
    return {
        name: {type(row[i]).__name__ for row in answer.rows if row[i] is not None}
        for i, name in enumerate(answer.columns)
    }
