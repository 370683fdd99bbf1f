"""Migrations beside running code.

What they may ask of a table that is in use, that nobody waits for them for long, and what they say.
"""

import re
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect, make_url, text

import migrations
from migrations import online
from settings import REPO
from tests.builders import until
from tests.models.conftest import a_database
from tests.models.facts import HEAD, living_definitions

BASELINE = "0012"  # whatever comes later may meet rows, readers and writers
# a migration that does everything that one may do
LATER = Path(__file__).with_name("later_versions")

# Statements that read or write a whole table while nobody else may, and what to do in their stead.
FORBIDDEN = {
    r"CREATE (UNIQUE )?INDEX (?!CONCURRENTLY)": "online.create_index",
    r"DROP INDEX (?!CONCURRENTLY)": "online.drop_index",
    r"ALTER TABLE \S+ ADD CONSTRAINT (?!.*NOT VALID)": "online.add_check, online.add_foreign_key",
    r"ALTER TABLE \S+ ADD COLUMN (?!IF NOT EXISTS)": "online.add_columns",
    r"ALTER TABLE \S+ ALTER COLUMN \S+ (TYPE|SET NOT NULL|SET DATA)": (
        "another column, filled in pieces"
    ),
    r"ADD COLUMN .*DEFAULT [^,]*(random|clock_timestamp|now)\(": "a constant as its default",
}


def revisions(*more: Path) -> list[str]:
    """All of them, oldest first, with those of further folders."""
    folders = [str(folder) for folder in (*migrations.VERSIONS, *more)]
    found = ScriptDirectory(
        str(Path(migrations.__file__).parent), version_locations=folders
    ).walk_revisions()
    return [script.revision for script in found][::-1]


@contextmanager
def a_later_version():
    """There is one migration more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "VERSIONS", [*migrations.VERSIONS, LATER])
        yield


@pytest.fixture
def of_this_version(stack):
    """A database that this version migrated; the next one, with a migration more, is about to."""
    with a_database(stack.env) as database, a_later_version():
        yield database


@pytest.fixture
def in_a_hurry(monkeypatch):
    """Locks are waited for, and tried for again, as shortly as a test can do with."""
    assert (migrations.LOCK_TIMEOUT, migrations._PAUSE_S) == ("1s", 2)
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "200ms")
    monkeypatch.setattr(migrations, "_PAUSE_S", 0.2)


@pytest.fixture(scope="module")
def statements(stack) -> dict[str, list[tuple[str, set[str]]]]:
    """By revision: every statement of its upgrade, with the tables that were there before it."""
    ran: dict[str, list[tuple[str, set[str]]]] = {}
    with a_database(stack.env, is_migrated=False) as database, a_later_version():
        for revision in revisions():
            with database.owner.connect() as connection:
                before = set(inspect(connection).get_table_names())
            ran[revision] = []

            def note(
                connection,
                cursor,
                statement,
                parameters,
                context,
                executemany,
                into=ran[revision],
                before=before,
            ):
                into.append((" ".join(statement.split()), before))

            event.listen(migrations.Engine, "before_cursor_execute", note)
            try:
                migrations.upgrade(database.owner_url, revision)
            finally:
                event.remove(migrations.Engine, "before_cursor_execute", note)
    return ran


@pytest.mark.parametrize(
    "revision", [revision for revision in revisions(LATER) if revision > BASELINE]
)
def test_a_migration_locks_no_table_that_is_in_use_for_long(statements, revision):
    assert statements[revision]
    for statement, tables in statements[revision]:
        for pattern, instead in FORBIDDEN.items():
            if re.match(pattern, statement, re.IGNORECASE):
                table = re.search(r" (?:ON|TABLE) (?:ONLY )?(\w+)", f" {statement}")
                assert table is not None
                assert table[1] not in tables, (
                    f"{revision}: {statement}: {table[1]} is in use; "
                    f"{instead} changes it while others write"
                )


class Traffic:
    """A client of the tables that were there at the first release.

    Reads and writes all the time, and how long that took.
    """

    def __init__(self, owner_url: str) -> None:
        self._engine = create_engine(owner_url, connect_args={"options": "-c lock_timeout=4000"})
        self._is_over = False
        self.rounds = 0

    def run(self) -> None:
        """Until `stop`.

        Raises if anything has to wait for a lock for longer than somebody in front of it may wait.
        """
        while not self._is_over:
            with self._engine.begin() as connection:
                tenant = {"id": uuid.uuid4(), "name": f"t-{uuid.uuid4()}"}
                connection.execute(
                    text("INSERT INTO tenants (id, name) VALUES (:id, :name)"), tenant
                )
                connection.execute(text("UPDATE jobs SET worker = 'w'"))
                connection.execute(text("SELECT count(*) FROM jobs"))
            self.rounds += 1

    def stop(self) -> None:
        self._is_over = True


def test_a_forgotten_transaction_delays_a_migration_and_nobody_else(of_this_version, in_a_hurry):
    database = of_this_version
    with ThreadPoolExecutor(2) as threads:
        told: list[str] = []
        with database.owner.connect() as forgotten:
            # its lock stays, and with it whoever wants the table for himself
            forgotten.execute(text("SELECT count(*) FROM jobs"))
            traffic = Traffic(database.owner_url)
            client = threads.submit(traffic.run)
            until(lambda: traffic.rounds, within_s=60, what="traffic")
            migrated = threads.submit(migrations.upgrade, database.owner_url, say=told.append)

            # each had to give way to the traffic
            until(lambda: len(told) >= 2, within_s=60, what="a second try")
            rounds = traffic.rounds
            until(lambda: traffic.rounds > rounds, within_s=60)
            assert not migrated.done()
        migrated.result(timeout=120)
        traffic.stop()
        client.result(timeout=60)

    assert {line.partition(" (")[0] for line in told[:-1]} == {"a table is in use"}
    assert told[-1].startswith("at revision ")


def test_a_migration_that_was_cut_short_anywhere_begins_again(of_this_version, monkeypatch):
    """After each of the changes that are committed at once."""

    class CutShort(Exception):
        pass

    done: list[str] = []

    def then_cut(run):
        def run_some(statement):
            run(statement)
            if statement not in done:
                done.append(statement)
                raise CutShort

        return run_some

    for name in ("_run", "_run_for_long"):
        monkeypatch.setattr(online, name, then_cut(getattr(online, name)))
    with of_this_version.owner.begin() as connection:
        before = living_definitions(connection)
        connection.execute(
            text(
                "INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'tenant-' || n "
                "FROM generate_series(1, 5) n"
            )
        )
    while True:
        try:
            migrations.upgrade(of_this_version.owner_url)
            break
        except CutShort:
            continue

    with of_this_version.owner.connect() as connection:
        invalid = connection.scalars(
            text("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        ).all()
        unchecked = connection.scalars(
            text("SELECT conname FROM pg_constraint WHERE NOT convalidated")
        ).all()
        running = connection.scalar(text("SELECT pg_get_indexdef('jobs_running'::regclass)"))
        filled = connection.scalar(text("SELECT count(*) FROM tenants WHERE later = name"))
        dropped = connection.scalar(text("SELECT to_regclass('jobs_dead')"))
        assert living_definitions(connection) == before
    assert len(done) > 12
    assert (invalid, unchecked, filled, dropped) == ([], [], 5, None)
    assert "(pool, tier, later_count)" in running


def migrate(env, database, **changes) -> subprocess.CompletedProcess[str]:
    """`python -m migrations` on a database of one's own."""
    names = ("MIGRATION_DATABASE_URL", "DATABASE_URL", "AUDITOR_DATABASE_URL")
    urls = {
        name: make_url(env[name]).set(database=make_url(database.owner_url).database)
        for name in names
    }
    variables = {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
    command = [sys.executable, "-m", "migrations"]
    return subprocess.run(
        command, cwd=REPO, env={**variables, **changes}, capture_output=True, text=True, timeout=120
    )


def test_the_migrations_say_at_which_revision_the_database_is(stack, empty_database):
    logins = "migrations: logins of darkroom_app, darkroom_auditor set\n"
    assert (
        migrate(stack.env, empty_database).stdout
        == f"migrations: at revision {HEAD}, was empty\n{logins}"
    )
    assert (
        migrate(stack.env, empty_database).stdout
        == f"migrations: at revision {HEAD}, nothing to do\n{logins}"
    )


def test_a_database_of_a_newer_version_ends_the_migrations_with_one_sentence(
    stack, of_this_version
):
    with of_this_version.owner.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    done = migrate(stack.env, of_this_version)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "migrations: the database is at revision 9999, which this version does not know"
    )
    assert len(done.stderr.splitlines()) == 1
    assert "docs/operating.md" in done.stderr
