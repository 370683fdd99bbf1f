"""What the tests of this room ask the database."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

import migrations

# the newest revision
HEAD = max(path.name.partition("_")[0] for path in migrations.VERSIONS[0].glob("*.py"))


def events_of(session: Session, job_id: uuid.UUID) -> list[str]:
    """The job's audit events, oldest first."""
    return list(
        session.scalars(
            text("SELECT event FROM audit_log WHERE job_id = :job_id ORDER BY seq"),
            {"job_id": job_id},
        )
    )


def attempt_of(session: Session, job_id: uuid.UUID, number: int = 1) -> Any:
    """The record of one attempt."""
    query = text("SELECT * FROM attempts WHERE job_id = :job_id AND attempt = :number")
    return session.execute(query, {"job_id": job_id, "number": number}).one()


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """What the acts return when they all start at the same moment, each in a thread of its own."""
    line = Barrier(len(acts))

    def start(act: Callable[[], Any]) -> Any:
        line.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as threads:
        return [future.result() for future in [threads.submit(start, act) for act in acts]]


def definitions(connection: Connection, schema: str) -> set[tuple[str, str]]:
    """Columns, constraints and indexes of a schema, as Postgres itself writes them down."""
    queries = (
        """SELECT table_name || '.' || column_name,
                  concat_ws(' ', data_type, udt_name, is_nullable, column_default)
           FROM information_schema.columns
           JOIN information_schema.tables USING (table_schema, table_name)
           WHERE table_schema = :schema AND table_type = 'BASE TABLE'""",
        """SELECT conrelid::regclass || '.' || contype::text, pg_get_constraintdef(oid)
           FROM pg_constraint
           WHERE connamespace = CAST(:schema AS regnamespace) AND conrelid <> 0""",
        "SELECT tablename || '.' || indexname, indexdef FROM pg_indexes WHERE schemaname = :schema",
    )
    rows = [row for query in queries for row in connection.execute(text(query), {"schema": schema})]
    plain = [
        (str(name).replace(f"{schema}.", ""), str(definition).replace(f"{schema}.", ""))
        for name, definition in rows
    ]
    return {
        (name, definition)
        for name, definition in plain
        if not name.startswith(
            ("audit_events_2", "audit_events_default", "alembic_version", "living_sql")
        )
    }


def living_definitions(connection: Connection) -> dict[str, tuple[str, str]]:
    """Functions, views and triggers, as Postgres itself writes them down, with their comments.

    Without those of the log's months.
    """
    query = text(
        """
        SELECT 'function ' || oid::regprocedure, pg_get_functiondef(oid),
               obj_description(oid, 'pg_proc')
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'view ' || relname, concat(pg_get_viewdef(oid), reloptions),
               obj_description(oid, 'pg_class')
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'v'
        UNION ALL
        SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass,
               pg_get_triggerdef(oid) || tgenabled::text,
               obj_description(oid, 'pg_trigger')
        FROM pg_trigger WHERE NOT tgisinternal AND tgparentid = 0
                          AND tgrelid::regclass::text !~ '^audit_events_[0-9]'
        """
    )
    return {name: (definition, comment) for name, definition, comment in connection.execute(query)}


def rights(connection: Connection) -> set[tuple[str, str]]:
    """Who may do what with tables, views, columns and functions; months of the log left out."""
    query = text(
        """
        SELECT relname, unnest(relacl)::text FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relname !~ '^audit_events_[0-9]'
        UNION ALL
        SELECT attrelid::regclass || '.' || attname, unnest(attacl)::text FROM pg_attribute
        WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
        UNION ALL
        SELECT proname, unnest(coalesce(proacl, acldefault('f', proowner)))::text FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        """
    )
    return {(name, right) for name, right in connection.execute(query)}
