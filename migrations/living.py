"""Bring functions, views and triggers to what their files in models/sql say.

These are not migrated: the file is the whole truth, and an object that differs from its file is
made anew after the versioned migrations. A file is named for its object, a trigger's for its table
and itself. It opens with a comment, whose first paragraph becomes the object's comment in the
database, and goes on with one CREATE OR REPLACE statement. Objects are made after those they name,
triggers last.

A difference is found by two digests in the table `living_sql`: of the file that was applied, and of
the definition that Postgres gave the object then. So a changed file is applied, as is one whose
object was changed, disabled or dropped by hand; if neither is the case nothing is locked.

Processes of the previous version run on beside all of this: what they call and read stays for one
release, under its name or beside a new one. A migration that takes away what a view reads drops the
view first; it is made anew from its file.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from itertools import takewhile
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

import models
from migrations.errors import SqlInUse

FOLDER = Path(models.__file__).parent / "sql"
KINDS = ("function", "view", "trigger")
# Tables with triggers, in the order of locks of models/__init__.py.
LOCKED = ("jobs", "files", "fleet_revisions", "audit_events_default", "audit_events")

_NOT_REPLACEABLE = ("42P13", "42P16")  # another return type or parameter's name; other columns
_DEPENDED_ON = "2BP01"

_TABLE = """
CREATE TABLE IF NOT EXISTS living_sql (
    kind text NOT NULL, name text NOT NULL, file_sha256 text NOT NULL, found_sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (kind, name))
"""
_NOTE = text(
    """
    INSERT INTO living_sql (kind, name, file_sha256, found_sha256)
        VALUES (:kind, :name, :file, :found)
    ON CONFLICT (kind, name) DO UPDATE SET
        file_sha256 = excluded.file_sha256, found_sha256 = excluded.found_sha256,
        applied_at = excluded.applied_at
    """
)

_FORGET = text("DELETE FROM living_sql WHERE kind = :kind AND name = :name")

# What Postgres says of an object, its comment included; no row, or NULL, where it is not there.
_FOUND = {
    "function": """
        SELECT string_agg(concat(pg_get_functiondef(oid), obj_description(oid)), ';' ORDER BY oid)
        FROM pg_proc WHERE proname = :name AND pronamespace = 'public'::regnamespace
    """,
    "view": """
        SELECT concat(pg_get_viewdef(oid), reloptions, obj_description(oid))
        FROM pg_class WHERE oid = to_regclass('public.' || :name) AND relkind = 'v'
    """,
    # Enabled or not, here and in every partition.
    "trigger": """
        SELECT concat(pg_get_triggerdef(oid), obj_description(oid), (
                   SELECT string_agg(DISTINCT own.tgenabled::text, '') FROM pg_trigger own
                   WHERE own.oid = t.oid OR own.tgparentid = t.oid))
        FROM pg_trigger t WHERE tgrelid = to_regclass('public.' || :table) AND tgname = :name
    """,
}


@dataclass(frozen=True)
class Living:
    """A function, view or trigger. name: a trigger's with its table.  sql: its file's text."""

    kind: str
    name: str
    sql: str

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    @property
    def table(self) -> str:
        """Name a trigger's table; empty for other kinds."""
        return self.name.rpartition(".")[0]

    @property
    def comment(self) -> str:
        """Return the object's comment: the first paragraph of the file's comment, on one line."""
        lines = takewhile(lambda line: line.startswith("-- "), self.sql.splitlines())
        return " ".join(line.removeprefix("-- ") for line in lines)

    @cached_property
    def words(self) -> frozenset[str]:
        """Return every word of its statement, comments left out."""
        return frozenset(re.findall(r"\w+", re.sub(r"--.*", "", self.sql)))

    @property
    def sha256(self) -> str:
        return _sha256(self.sql)


def read() -> list[Living]:
    """Read every file, and order them: each object after those that it names, triggers last.

    A trigger locks its table, so they come in the order in which writers lock these.
    """
    by_key = {living.key: living for living in _files(FOLDER)}
    named = {living.name: living.key for living in by_key.values() if living.kind != "trigger"}
    sorter: TopologicalSorter[tuple[str, str]] = TopologicalSorter()
    for living in by_key.values():
        others = sorted((living.words & named.keys()) - {living.name})
        sorter.add(living.key, *(named[name] for name in others))
    locked = {table: place for place, table in enumerate(LOCKED)}
    ordered = [by_key[key] for key in sorter.static_order()]
    return sorted(
        ordered, key=lambda living: (living.kind == "trigger", locked.get(living.table, -1))
    )


def apply(connection: Connection) -> list[str]:
    """Make anew what is not as its file says, drop objects without a file; return their names.

    In the caller's transaction, and under its lock_timeout.  Raises SqlInUse.
    """
    connection.execute(text(_TABLE))
    rows = connection.execute(text("SELECT kind, name, file_sha256, found_sha256 FROM living_sql"))
    applied = {(row.kind, row.name): (row.file_sha256, row.found_sha256) for row in rows}
    changed = []
    for place, living in enumerate(wanted := read()):
        if applied.get(living.key) != (living.sha256, _found(connection, *living.key)):
            _make(connection, living, later=wanted[place + 1 :])
            changed.append(living.name)
    gone = sorted(applied.keys() - {living.key for living in wanted})
    for kind in reversed(KINDS):
        names = [name for own_kind, name in gone if own_kind == kind]
        _drop(connection, kind, *names)
        changed += names
        for name in names:
            connection.execute(_FORGET, {"kind": kind, "name": name})
    return changed


def drop_all(connection: Connection) -> None:
    """Drop every function, view and trigger of this module, and the table `living_sql`."""
    for living in reversed(read()):
        _drop(connection, *living.key)
    connection.execute(text("DROP TABLE IF EXISTS living_sql"))


def _files(folder: Path) -> Iterator[Living]:
    for kind in KINDS:
        for path in sorted((folder / f"{kind}s").glob("*.sql")):
            yield Living(kind, path.name.removesuffix(".sql"), path.read_text())


def _make(connection: Connection, living: Living, later: Sequence[Living]) -> None:
    """Create or replace the object and note its definition.

    Where it cannot be replaced it is dropped first, with those of `later` that are built on it;
    these are then found missing and made in their turn.
    """
    if not _replace(connection, living):
        _drop_with_users(connection, living, later)
        _run(connection, living.sql)
    quoted = living.comment.replace("'", "''")
    _run(connection, f"COMMENT ON {_reference(*living.key)} IS '{quoted}'")
    found = _found(connection, *living.key)
    note = {"kind": living.kind, "name": living.name, "file": living.sha256, "found": found}
    connection.execute(_NOTE, note)


def _replace(connection: Connection, living: Living) -> bool:
    """Create the object or replace the existing one; False if that has to be dropped first."""
    try:
        with connection.begin_nested():
            _run(connection, living.sql)
    except DBAPIError as error:
        if _sqlstate(error) not in _NOT_REPLACEABLE:
            raise
        return False
    # A function with other parameters stands beside the one of before.
    return len(_signatures(connection, living.name)) <= 1


def _drop_with_users(connection: Connection, living: Living, later: Sequence[Living]) -> None:
    """Drop the object, and before it, if necessary, those of `later` that are built on it.

    Also those built on it through others. Raises SqlInUse.
    """
    try:
        with connection.begin_nested():
            _drop(connection, *living.key)
    except SqlInUse:
        users = [living]
        for other in later:
            if other.words & {user.name for user in users}:
                users.append(other)
        for user in reversed(users):
            _drop(connection, *user.key)


def _drop(connection: Connection, kind: str, *names: str) -> None:
    """Drop those objects of a kind that are there, functions with whatever parameters.

    Raises SqlInUse.
    """
    if kind == "trigger":
        statements = [f"DROP {_reference(kind, name, 'IF EXISTS ')}" for name in names]
    else:  # all at once, for one may be built on another
        what = list(names)
        if kind == "function":
            what = [each for name in names for each in _signatures(connection, name)]
        statements = [f"DROP {kind.upper()} IF EXISTS {', '.join(what)}"] if what else []
    try:
        for statement in statements:
            _run(connection, statement)
    except DBAPIError as error:
        if _sqlstate(error) != _DEPENDED_ON:
            raise
        told = " ".join(str(error.orig).split())
        hint = f"Drop what depends on {', '.join(names)}, migrate, and make it again"
        raise SqlInUse(f"{told} {hint}") from error


def _reference(kind: str, name: str, if_exists: str = "") -> str:
    """Name the object as statements do: `VIEW queue_now`, `TRIGGER audit_link ON audit_events`."""
    table, _, own_name = name.rpartition(".")
    return f"{kind.upper()} {if_exists}{own_name}" + (f" ON {table}" if table else "")


def _signatures(connection: Connection, name: str) -> list[str]:
    """List the functions of that name, with their parameters' types."""
    query = """SELECT oid::regprocedure::text FROM pg_proc
               WHERE proname = :name AND pronamespace = 'public'::regnamespace"""
    return list(connection.scalars(text(query), {"name": name}))


def _found(connection: Connection, kind: str, name: str) -> str | None:
    """Digest the definition of the object in the database; None if it is not there."""
    table, _, own_name = name.rpartition(".")
    said = connection.scalar(
        text(_FOUND[kind]), {"name": own_name, **({"table": table} if table else {})}
    )
    return None if said is None else _sha256(said)


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "pgcode", None)


def _run(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
