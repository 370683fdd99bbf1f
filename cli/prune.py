"""Define `prune`: remove data whose retention time is over.

It works as the owner of the tables, because no other role may delete.
"""

import gzip
import hashlib
import re
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from sqlalchemy.exc import OperationalError

from cli import screen
from cli.installation import Installation, pass_installation
from models import pruning
from models.database import make_engine, transaction

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

PIECE = 200  # jobs per transaction: their tenants accept no job meanwhile
TRIES = 60  # for a lock that another session holds
PAUSE_S = 2.0  # between two tries, in which the others go on

T = TypeVar("T")


class Age(click.ParamType[timedelta]):
    """Parse a number of days, as `90d`, into a timedelta."""

    name = "DAYS"

    def __init__(self, at_least: timedelta) -> None:
        self._at_least = at_least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        found = re.fullmatch(r"(\d{1,5})d", str(value))
        if not found or timedelta(days=int(found[1])) < self._at_least:
            self.fail(
                f"{value!r} is not a number of days, {self._at_least.days}d or more.", param, ctx
            )
        return timedelta(days=int(found[1]))


@click.command()
@click.option(
    "--older-than",
    type=Age(pruning.NEWEST_JOBS),
    help="Remove jobs that ended so long ago, and old files that no other job starts from.",
)
@click.option("--tier", help="Remove only jobs of this tier, and no files.")
@click.option(
    "--usage-older-than",
    type=Age(pruning.NEWEST_USAGE),
    help="Remove days of the ledger, from which invoices are made.",
)
@click.option(
    "--audit-older-than",
    type=Age(timedelta(days=1)),
    help="Remove months of the audit log that ended so long ago.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="First write the removed months of the audit log to files in this folder.",
)
@click.option(
    "--yes", is_flag=True, help="Remove the data. Without --yes, only show what would be removed."
)
@pass_installation
def prune(
    installation: Installation,
    older_than: timedelta | None,
    tier: str | None,
    usage_older_than: timedelta | None,
    audit_older_than: timedelta | None,
    export: Path | None,
    yes: bool,
) -> None:
    """Remove old jobs, files, ledger entries and audit events for good.

    The stack may keep running. Objects leave the store within minutes. The rest of the audit log
    can still be verified.
    """
    if not any((older_than, usage_older_than, audit_older_than)):
        raise click.UsageError(
            "say how old: --older-than 90d, --usage-older-than 800d, --audit-older-than 400d"
        )
    database = make_engine(installation.look_up("MIGRATION_DATABASE_URL"), pool_size=1)
    now = datetime.now(UTC)
    rows: list[tuple[str, Any]] = []
    try:
        if older_than:
            rows += _jobs(database, now - older_than, tier, yes)
        if usage_older_than:
            rows += _usage(database, (now - usage_older_than).date(), yes)
        if audit_older_than:
            rows += _audit(database, (now - audit_older_than).date(), export, yes)
    finally:
        database.dispose()
    screen.out().print(
        screen.table(
            ["what", "removed" if yes else "would be removed"],
            rows,
            numbers=["removed", "would be removed"],
        )
    )
    if not yes:
        screen.err().print("nothing was removed; add --yes to remove it", style="dim")


def _jobs(
    database: "Engine", before: datetime, tier: str | None, yes: bool
) -> list[tuple[str, Any]]:
    with transaction(database) as session:
        due = pruning.due(session, before=before, tier=tier)
    rows: list[tuple[str, Any]] = [
        ("jobs", due.jobs),
        ("their images", due.images),
        ("bytes of images", due.size_bytes),
    ]
    rows += [("files", due.files), ("bytes of files", due.file_bytes)] if tier is None else []
    if not yes:
        return rows
    rows[0] = ("jobs", _remove_jobs(database, before, tier))
    if tier is None:
        rows[3] = ("files", _remove_files(database, before))
    return rows


def _remove_jobs(database: "Engine", before: datetime, tier: str | None) -> int:
    """Remove the jobs that ended before; return how many: not those that somebody is just using."""
    removed = 0
    after = pruning.FIRST_ID
    while True:
        piece = _patiently(
            database,
            partial(pruning.prune_jobs, before=before, after=after, limit=PIECE, tier=tier),
        )
        removed += piece.jobs
        if piece.last_id is None:
            return removed
        after = piece.last_id


def _remove_files(database: "Engine", before: datetime) -> int:
    """Erase old files; forget erased files and deleted endpoints. Return how many were erased."""
    removed = _all(database, partial(pruning.prune_files, before=before, limit=PIECE))
    _all(database, partial(pruning.forget_files, before=before, limit=PIECE))
    _all(database, partial(pruning.prune_endpoints, before=before, limit=PIECE))
    return removed


def _usage(database: "Engine", before: date, yes: bool) -> list[tuple[str, Any]]:
    if yes:
        return [
            (
                "days of tenants in the ledger",
                _patiently(database, partial(pruning.prune_usage, before=before)),
            )
        ]
    with transaction(database) as session:
        return [("days of tenants in the ledger", pruning.usage_due(session, before=before))]


def _audit(
    database: "Engine", before: date, export: Path | None, yes: bool
) -> list[tuple[str, Any]]:
    rows = []
    with transaction(database) as session:
        months = pruning.audit_months(session, before=before)
    for month in months:
        if yes:
            sha256 = _export(database, month, export) if export else None
            events = _patiently(
                database, partial(pruning.prune_audit_month, month=month, sha256=sha256)
            )
        else:
            with transaction(database) as session:
                events = pruning.audit_events(session, month)
        rows.append((f"audit events of {month:%Y-%m}", events))
    return rows or [("months of the audit log", 0)]


def _export(database: "Engine", month: date, folder: Path) -> str:
    """Write a month's events as JSON lines, by chain and number; return the file's SHA-256.

    An incomplete file has another name.
    """
    path = folder / f"audit-{month:%Y-%m}.jsonl.gz"
    unfinished = folder / f"audit-{month:%Y-%m}.jsonl.gz.unfinished"
    events = f"SELECT to_jsonb(e) FROM {pruning.partition_of(month)} e ORDER BY chain_id, seq"
    # CSV with a delimiter and a quote that occur in no JSON: Postgres' text format would double
    # every backslash.
    query = f"COPY ({events}) TO STDOUT WITH (FORMAT csv, DELIMITER E'\\x02', QUOTE E'\\x01')"
    connection = database.raw_connection()
    try:
        with closing(connection.cursor()) as cursor, gzip.open(unfinished, "wb") as file:
            cursor.execute("SET LOCAL statement_timeout = 0")
            cursor.copy_expert(query, file)
    finally:
        connection.close()
    with unfinished.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    unfinished.replace(path)
    return digest


def _all(database: "Engine", act: "Callable[[Session], int]") -> int:
    """Call `act` until it finds nothing more; return the sum of its results."""
    done = 0
    while some := _patiently(database, act):
        done += some
    return done


def _patiently(database: "Engine", act: "Callable[[Session], T]") -> T:
    """Call `act` in its own transaction; try again later while another session holds a lock."""
    for tried in range(1, TRIES + 1):
        try:
            with transaction(database) as session:
                return act(session)
        except OperationalError as error:
            if getattr(error.orig, "pgcode", None) not in ("55P03", "40P01") or tried == TRIES:
                raise
            time.sleep(PAUSE_S)
    raise AssertionError("unreachable")
