"""Change tables while others read and write them; nobody waits longer than LOCK_TIMEOUT for it.

A migration calls these functions for every change of a table that an earlier migration made, before
everything else that it does. Each change is committed at once, so that no lock is held while the
next one is waited for. So each is harmless when repeated, for an interrupted migration begins
again. New tables, functions, views and grants follow in the migration's own transaction, which
notes the revision.

Long work runs under locks that writers share: constraints are added NOT VALID and validated
afterwards, indexes are built CONCURRENTLY. A change that does not get its lock in time fails, and
`migrations.upgrade` begins again a little later.
"""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateColumn

LOCK_TIMEOUT = "1s"  # a statement that waits for a lock makes all later ones wait


def add_columns(table: str, columns: Iterable[sa.Column[Any]]) -> None:
    """Add those of the columns that are missing, in one statement.

    A default must be a constant, or Postgres rewrites the whole table.
    """
    dialect = postgresql.dialect()
    shadow = sa.Table(table, sa.MetaData(), *columns)
    added = [
        f"ADD COLUMN IF NOT EXISTS {CreateColumn(column).compile(dialect=dialect)}"
        for column in shadow.columns
    ]
    _run(f"ALTER TABLE {table} {', '.join(added)}")


def add_check(table: str, name: str, condition: str) -> None:
    """Refuse rows that do not meet `condition`: new ones at once, then validate existing ones."""
    _add_constraint(table, name, f"CHECK ({condition})")


def drop_check(table: str, name: str) -> None:
    """Accept rows again that did not meet the check, if it is there."""
    _run(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")


def add_foreign_key(table: str, column: str, other: str, *, on_delete: str = "NO ACTION") -> None:
    """Make `column` name a row of `other` by its id."""
    action = "" if on_delete == "NO ACTION" else f" ON DELETE {on_delete}"
    _add_constraint(
        table, f"{table}_{column}_fkey", f"FOREIGN KEY ({column}) REFERENCES {other} (id){action}"
    )


def create_index(
    name: str,
    table: str,
    columns: Sequence[str],
    *,
    where: str | None = None,
    unique: bool = False,
    using: str = "",
) -> None:
    """Build an index while others write; one that an earlier try left incomplete is rebuilt."""
    if _is_valid(name):
        return
    drop_index(name)
    kind = "UNIQUE INDEX" if unique else "INDEX"
    how = f"USING {using} " if using else ""
    condition = f" WHERE {where}" if where else ""
    _run_for_long(
        f"CREATE {kind} CONCURRENTLY {name} ON {table} {how}({', '.join(columns)}){condition}"
    )


def drop_index(name: str) -> None:
    """Drop an index, if it is there, while others write."""
    _run_for_long(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def replace_index(
    name: str, table: str, columns: Sequence[str], *, where: str | None = None
) -> None:
    """Rebuild the index `name` on other columns; one of the two exists at any time."""
    new = f"{name}_new"
    if _columns_of(name) != list(columns):
        create_index(new, table, columns, where=where)
        drop_index(name)
    if _is_valid(new):
        _run(f"ALTER INDEX {new} RENAME TO {name}")


def run_in_pieces(table: str, statement: str, *, rows: int = 5_000) -> None:
    """Run `statement` for all rows of `table`, a piece at a time, by ascending id.

    Each piece are the ids above `:after` and up to `:upto`.
    """
    bind = op.get_bind()
    after = uuid.UUID(int=0)
    query = (
        f"SELECT id FROM (SELECT id FROM {table} WHERE id > :after ORDER BY id LIMIT :rows) piece"
        " ORDER BY id DESC LIMIT 1"
    )
    with op.get_context().autocommit_block():
        while (upto := bind.scalar(sa.text(query), {"after": after, "rows": rows})) is not None:
            bind.execute(sa.text(statement), {"after": after, "upto": upto})
            after = upto


def _add_constraint(table: str, name: str, definition: str) -> None:
    query = (
        "SELECT convalidated FROM pg_constraint"
        " WHERE conname = :name AND conrelid = CAST(:table AS regclass)"
    )
    is_valid = op.get_bind().scalar(sa.text(query), {"name": name, "table": table})
    if is_valid is None:
        _run(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition} NOT VALID")
    if not is_valid:
        _run_for_long(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def _is_valid(index: str) -> bool:
    query = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)"
    return bool(op.get_bind().scalar(sa.text(query), {"index": index}))


def _columns_of(index: str) -> list[str]:
    query = "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:index) ORDER BY attnum"
    return list(op.get_bind().scalars(sa.text(query), {"index": index}))


def _run(statement: str) -> None:
    """Run a short statement, once it has its lock."""
    with op.get_context().autocommit_block():
        op.execute(statement)


def _run_for_long(statement: str) -> None:
    """Run a statement whose locks let others read and write.

    It waits as long as it takes for transactions older than itself.
    """
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        try:
            op.execute(statement)
        finally:
            op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
