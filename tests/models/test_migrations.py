"""The tables as the migrations build them, and who may do what with them."""

import os
import re
import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

import migrations
from cli.sql import sql
from models.tables import Base
from settings import REPO
from tests.builders import a_job
from tests.models.facts import at_once, definitions

VIEWS = [
    "audit_chain_status",
    "audit_log",
    "costs_by_pool_day",
    "costs_by_tenant_day",
    "dead_letters",
    "device_time_by_hour",
    "fleet_history",
    "flows_now",
    "images_by_tenant_day",
    "job_history",
    "queue_now",
    "slo_attainment",
    "stored_files_by_tenant",
    "usage_by_tenant_day",
    "wasted_time_by_day",
    "webhooks_now",
    "workers_now",
]


def is_no_model(name: str | None) -> bool:
    return str(name).startswith("audit_events_") or name == "living_sql"


def test_migrations_build_the_same_schema_as_the_models(database):
    with database.owner.connect() as connection:
        options = {
            "include_name": lambda name, kind, parents: kind != "table" or not is_no_model(name)
        }
        context = MigrationContext.configure(connection, opts=options)

        differences = compare_metadata(context, Base.metadata)

    assert differences == []


def test_constraints_defaults_and_partial_indexes_are_the_same_too(database):
    """Alembic does not compare these, and they are what must always hold."""
    with database.owner.connect() as connection:
        connection.execute(text("CREATE SCHEMA from_models"))
        Base.metadata.create_all(
            connection.execution_options(schema_translate_map={None: "from_models"})
        )
        connection.execute(text("SET LOCAL search_path = public, from_models"))

        migrated, modelled = (
            definitions(connection, "public"),
            definitions(connection, "from_models"),
        )
        connection.rollback()

    assert migrated - modelled == set()
    assert modelled - migrated == set()
    assert any(name == "jobs.c" for name, _ in migrated)


def test_migrating_again_changes_nothing(database):
    with database.owner.connect() as connection:
        before = definitions(connection, "public")

    migrations.upgrade(database.owner_url)

    with database.owner.connect() as connection:
        assert definitions(connection, "public") == before


def test_two_that_migrate_at_once_do_not_disturb_each_other(empty_database):
    at_once(*[lambda: migrations.upgrade(empty_database.owner_url)] * 2)

    with empty_database.owner.connect() as connection:
        assert "jobs" in inspect(connection).get_table_names()


def test_every_migration_can_be_taken_back(empty_database):
    migrations.upgrade(empty_database.owner_url)

    with empty_database.owner.connect() as connection:
        command.downgrade(migrations._config(connection), "base")
        connection.commit()

        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
        assert (
            connection.scalar(
                text("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
            )
            == 0
        )


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_says_what_it_shows(database, view):
    with database.auditor.connect() as connection:
        comment = connection.scalar(
            text("SELECT obj_description(CAST(:view AS regclass))"), {"view": view}
        )
        connection.execute(text(f"SELECT * FROM {view} LIMIT 1"))

    assert comment.endswith((".", "audit_verify()."))


def test_there_is_no_other_view(database):
    with database.owner.connect() as connection:
        views = inspect(connection).get_view_names()

    assert sorted(views) == VIEWS


def test_the_command_line_names_every_view():
    assert set(re.findall(r"\w+_\w+", str(sql.help))) == set(VIEWS)


def test_the_auditor_sees_views_and_nothing_else(database):
    allowed = """
        SELECT relname, privilege FROM pg_class,
               unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) privilege
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
              AND has_table_privilege(oid, privilege)
    """
    with database.auditor.connect() as connection:
        granted = {tuple(row) for row in connection.execute(text(allowed))}

    assert granted == {(view, "SELECT") for view in VIEWS}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM jobs",
        "TRUNCATE jobs CASCADE",
        "DROP TABLE jobs",
        "ALTER TABLE jobs ADD COLUMN x int",
        "CREATE TABLE mine (x int)",
        "DELETE FROM artifacts",
        "SELECT * FROM alembic_version",
        "DELETE FROM living_sql",
        "UPDATE audit_chains SET last_seq = 0",
    ],
)
def test_the_application_cannot(database, statement):
    with (
        database.app.connect() as connection,
        pytest.raises(ProgrammingError, match=r"permission denied|must be owner"),
    ):
        connection.execute(text(statement))


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("state", "'lost'", "jobs_state_is_known"),
        ("state", "'running'", "jobs_lease_while_running"),
        ("lease_expires_at", "now()", "jobs_lease_while_running"),
        ("state", "'storing'", "jobs_store_by_while_storing"),
        ("state", "'canceled'", "jobs_finished_once_final"),
        ("finished_at", "now()", "jobs_finished_once_final"),
        ("failure_code", "'internal'", "jobs_failure_has_code"),
        ("determinism", "'reproducible'", "jobs_bucket_when_reproducible"),
        ("num_images", "0", "jobs_counts_are_positive"),
        ("width_px", "0", "jobs_sides_are_positive"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_by_the_database(
    session, column, value, constraint
):
    job = a_job(session)

    with pytest.raises(DBAPIError, match=constraint):
        session.execute(text(f"UPDATE jobs SET {column} = {value} WHERE id = :id"), {"id": job.id})


def migrate(database, **changed: str) -> "subprocess.CompletedProcess[str]":
    """What the migrate service runs, against a database of the tests'."""
    variables = {
        "MIGRATION_DATABASE_URL": database.owner_url,
        "DATABASE_URL": database.owner_url,
    } | changed
    command = [sys.executable, "-m", "migrations"]
    return subprocess.run(
        command,
        cwd=REPO,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_wrong_password_is_one_line_that_says_what_to_do(database):
    wrong = make_url(database.owner_url).set(password="wrong").render_as_string(hide_password=False)

    end = migrate(database, MIGRATION_DATABASE_URL=wrong)

    [line] = end.stderr.splitlines()
    assert end.returncode == 1
    assert line.startswith("migrations: Postgres: ")
    assert "ALTER ROLE darkroom_owner PASSWORD" in line


def test_a_login_for_a_role_that_is_none_of_ours_is_refused(database):
    end = migrate(database, DATABASE_URL="postgresql://somebody:else@127.0.0.1/darkroom")

    assert end.returncode == 78
    assert end.stderr == (
        "settings: DATABASE_URL: its user is 'somebody'; accepted: 'darkroom_app', or the owner\n"
    )
