"""Functions, views and triggers are what their files say, whatever the database had before."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import migrations
from migrations import living, roles
from migrations.errors import DatabaseBusy, SqlInUse
from tests.builders import until
from tests.models.conftest import a_database
from tests.models.facts import HEAD, at_once, living_definitions, rights

EVERY_FILE = living.read()


def sql_of(name: str) -> str:
    return next(each.sql for each in EVERY_FILE if each.name == name)


def amend(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def upgrade(database, **options) -> str:
    """Migrate, and return the last thing that was said, without the revision."""
    lines: list[str] = []
    migrations.upgrade(database.owner_url, say=lines.append, **options)
    return re.sub(r"^at revision \w+[;,] ", "", lines[-1])


def write(files: Path, name: str, sql: str) -> None:
    (files / f"{name}.sql").write_text(sql)


def change(database, *statements: str) -> None:
    """Change the database by hand, as its owner."""
    with database.owner.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def found(database) -> dict[str, tuple[str, str]]:
    with database.owner.connect() as connection:
        return living_definitions(connection)


@pytest.fixture(scope="module")
def own_database(stack):
    """A migrated database that only the tests of this module change, and put right again."""
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def in_a_hurry(monkeypatch):
    """Locks are waited for, and tried for again, as shortly as a test can do with."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "200ms")
    monkeypatch.setattr(migrations, "_PAUSE_S", 0.2)


@pytest.fixture
def files(tmp_path, monkeypatch, own_database):
    """A copy of the files to change; afterwards the database is as the real ones say."""
    folder = tmp_path / "sql"
    shutil.copytree(living.FOLDER, folder)
    with monkeypatch.context() as patch:
        patch.setattr(living, "FOLDER", folder)
        yield folder
    migrations.upgrade(own_database.owner_url)


def test_a_migrated_database_has_what_the_files_say_and_nothing_else(database, empty_database):
    """Each file run by itself, by kinds, over tables without any function, view or trigger."""
    migrations.upgrade(empty_database.owner_url, HEAD)
    assert found(empty_database) == {}
    change(
        empty_database,
        "SET check_function_bodies = off",
        *(each.sql for each in EVERY_FILE if each.kind == "function"),
    )
    change(empty_database, *(each.sql for each in EVERY_FILE if each.kind == "view"))
    change(empty_database, *(each.sql for each in EVERY_FILE if each.kind == "trigger"))

    by_hand = {name: definition for name, (definition, _) in found(empty_database).items()}

    assert {name: definition for name, (definition, _) in found(database).items()} == by_hand
    assert len(by_hand) == len(EVERY_FILE) >= 37


@pytest.fixture(scope="module")
def comments(database) -> dict[str, str]:
    """By kind and name of every object: its comment in the database."""
    return {name.partition("(")[0]: comment for name, (_, comment) in found(database).items()}


@pytest.mark.parametrize("each", EVERY_FILE, ids=lambda each: f"{each.kind}-{each.name}")
def test_a_file_is_named_for_its_object_and_says_what_it_is_for(comments, each):
    table, _, own_name = each.name.rpartition(".")
    statement = re.sub(r"--.*", "", each.sql).strip()
    opening = f"CREATE OR REPLACE {each.kind.upper()} {own_name}\\b"
    assert re.match(f"{opening}.* ON {table}\n" if table else opening, statement)
    assert statement.count("CREATE OR REPLACE") == 1
    assert re.match(r"[A-Z].*(\.|\(\))$", each.comment)
    assert comments[f"{each.kind} {own_name}" + (f" on {table}" if table else "")] == each.comment


def test_triggers_are_made_in_the_order_in_which_writers_lock_their_tables():
    """Or who writes a job and then its event would wait for who changes triggers, and the other way
    round.
    """
    tables = [each.table for each in EVERY_FILE if each.kind == "trigger"]

    assert list(dict.fromkeys(tables)) == [
        "jobs",
        "files",
        "fleet_revisions",
        "audit_events_default",
        "audit_events",
    ]


def test_no_file_has_a_setting_s_value_in_it():
    for each in EVERY_FILE:
        assert not re.search(r"interval\s*'\d+\s*(s|sec|seconds?|m|min|minutes?)'", each.sql), (
            each.name
        )


BY_HAND = [
    (
        "CREATE OR REPLACE FUNCTION audit_refuse() RETURNS trigger "
        "LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "audit_refuse",
    ),
    ("ALTER FUNCTION audit_link SECURITY INVOKER", "audit_link"),
    ("ALTER FUNCTION audit_verify RESET search_path", "audit_verify"),
    ("DROP FUNCTION jobs_with_labels", "jobs_with_labels"),
    (
        "CREATE FUNCTION job_label(text) RETURNS uuid LANGUAGE sql AS 'SELECT gen_random_uuid()'",
        "job_label",
    ),
    (f"{sql_of('usage_by_tenant_day')} WHERE false", "usage_by_tenant_day"),
    ("DROP VIEW dead_letters", "dead_letters"),
    ("DROP VIEW flows_now; CREATE VIEW flows_now AS SELECT 1 AS one", "flows_now"),
    ("ALTER VIEW job_history SET (security_invoker = true)", "job_history"),
    ("COMMENT ON VIEW audit_log IS 'mine'", "audit_log"),
    ("ALTER TABLE audit_events DISABLE TRIGGER audit_link", "audit_events.audit_link"),
    (
        "ALTER TABLE audit_events_default DISABLE TRIGGER audit_no_change",
        "audit_events.audit_no_change",
    ),
    ("ALTER TABLE jobs DISABLE TRIGGER flows_count_moved", "jobs.flows_count_moved"),
    ("DROP TRIGGER files_are_counted ON files", "files.files_are_counted"),
    (
        "CREATE OR REPLACE TRIGGER job_labels_added AFTER INSERT ON jobs"
        " FOR EACH ROW WHEN (false) EXECUTE FUNCTION job_labels_follow()",
        "jobs.job_labels_added",
    ),
]


def test_objects_that_somebody_changed_by_hand_are_put_right(own_database):
    assert_put_right(own_database, BY_HAND)


@pytest.mark.slow
@pytest.mark.parametrize(("statement", "name"), BY_HAND)
def test_each_object_that_somebody_changed_by_hand_is_put_right_alone(
    own_database, statement, name
):
    assert_put_right(own_database, [(statement, name)])


def assert_put_right(own_database, changes) -> None:
    before = found(own_database)
    with own_database.owner.connect() as connection:
        rights_before = rights(connection)
    change(own_database, *(statement for statement, _ in changes))

    said = upgrade(own_database)

    made = said.removeprefix("made anew: ").split(", ")
    assert sorted(made) == sorted(name for _, name in changes)
    assert found(own_database) == before
    with own_database.owner.connect() as connection:
        assert rights(connection) == rights_before
        disabled = "SELECT tgname FROM pg_trigger WHERE tgenabled <> 'O' AND NOT tgisinternal"
        assert connection.scalars(text(disabled)).all() == []


def test_rights_that_somebody_gave_or_took_by_hand_are_put_right(own_database):
    with own_database.owner.connect() as connection:
        before = rights(connection)
    change(
        own_database,
        "GRANT EXECUTE ON FUNCTION audit_ensure_partitions TO PUBLIC",
        "GRANT EXECUTE ON FUNCTION audit_prune_month TO darkroom_app, darkroom_gateway",
        "REVOKE EXECUTE ON FUNCTION audit_verify FROM darkroom_auditor",
        "REVOKE SELECT ON job_history FROM darkroom_auditor, darkroom_app",
        "GRANT SELECT ON webhook_secrets TO darkroom_worker",
    )

    upgrade(own_database)

    with own_database.owner.connect() as connection:
        assert rights(connection) == before


def test_functions_that_run_as_their_owner_are_not_for_everybody(database):
    query = """SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef
               AND prorettype <> 'trigger'::regtype"""
    for_everybody = (
        "SELECT proname FROM pg_proc WHERE proname = ANY(:names) "
        "AND has_function_privilege('public', oid, 'EXECUTE')"
    )
    with database.owner.connect() as connection:
        as_owner = set(connection.scalars(text(query)))
        open_to_all = connection.scalars(
            text(for_everybody), {"names": list(roles.FUNCTIONS)}
        ).all()

    assert as_owner <= set(roles.FUNCTIONS)
    assert open_to_all == []


def test_where_nothing_changed_nothing_is_made_and_nobody_is_waited_for(own_database):
    query = text("SELECT kind, name, applied_at FROM living_sql ORDER BY 1, 2")
    with own_database.owner.connect() as connection:
        before = connection.execute(query).all()
    with own_database.owner.begin() as connection:
        connection.execute(
            text("LOCK TABLE jobs, audit_events, files, workers IN SHARE UPDATE EXCLUSIVE MODE")
        )

        assert upgrade(own_database, wait_s=0) == "nothing to do"

    with own_database.owner.connect() as connection:
        assert connection.execute(query).all() == before


def test_a_view_with_other_columns_is_made_anew_and_read_by_the_same(own_database, files):
    write(
        files,
        "views/queue_now",
        "-- Shorter.\nCREATE OR REPLACE VIEW queue_now AS SELECT tier, count(*) AS n "
        "FROM jobs GROUP BY tier",
    )

    assert upgrade(own_database) == "made anew: queue_now"

    with own_database.auditor.connect() as connection:
        assert list(connection.execute(text("SELECT * FROM queue_now")).keys()) == ["tier", "n"]


@pytest.mark.parametrize(
    ("signature", "call"),
    [
        ("job_label(key text, value text, more text) RETURNS uuid", "job_label('a', 'b', 'c')"),
        ("job_label(key text, value text) RETURNS text", "job_label('a', 'b')"),
        ("job_label(k text, v text) RETURNS uuid", "job_label(k => 'a', v => 'b')"),
    ],
)
def test_a_function_with_another_signature_takes_the_place_of_the_one_of_before(
    own_database, files, signature, call
):
    body = "'00000000-0000-0000-0000-000000000007'"
    sql = (
        f"-- Seven.\nCREATE OR REPLACE FUNCTION {signature} "
        f"LANGUAGE plpgsql AS $$BEGIN RETURN {body}; END$$"
    )
    (files / "functions/job_label.sql").write_text(sql)

    assert upgrade(own_database) == "made anew: job_label"

    with own_database.owner.connect() as connection:
        assert str(connection.scalar(text(f"SELECT {call}"))).endswith("7")
        assert (
            connection.scalar(text("SELECT count(*) FROM pg_proc WHERE proname = 'job_label'")) == 1
        )


def test_an_object_whose_file_is_gone_goes_too(own_database, files):
    (files / "triggers/jobs.flows_count_moved.sql").unlink()
    (files / "triggers/jobs.flows_count_accepted.sql").unlink()
    (files / "triggers/jobs.flows_count_rerouted.sql").unlink()
    (files / "functions/flows_count_queued.sql").unlink()
    (files / "functions/flows_count_rerouted.sql").unlink()
    (files / "views/flows_now.sql").unlink()

    said = upgrade(own_database)

    assert said.startswith("made anew: jobs.flows_count_")
    kept = {name.partition("(")[0] for name in found(own_database)}
    assert len(kept) == len(EVERY_FILE) - 6
    assert not [name for name in kept if "flows" in name]
    assert upgrade(own_database) == "nothing to do"


def test_an_object_is_made_after_those_that_it_names(own_database, files):
    """By the alphabet, and by kinds, each would come before what it needs."""
    write(
        files,
        "functions/a_first",
        "-- One.\nCREATE OR REPLACE FUNCTION a_first() RETURNS bigint "
        "LANGUAGE sql AS 'SELECT n FROM m_second'",
    )
    write(
        files, "views/m_second", "-- Two.\nCREATE OR REPLACE VIEW m_second AS SELECT n FROM k_third"
    )
    write(
        files,
        "views/k_third",
        "-- Three.\nCREATE OR REPLACE VIEW k_third AS SELECT z_last() AS n -- not a_first",
    )
    write(
        files,
        "functions/z_last",
        "-- Four.\nCREATE OR REPLACE FUNCTION z_last() RETURNS bigint "
        "LANGUAGE sql AS 'SELECT 4::bigint'",
    )

    assert upgrade(own_database) == "made anew: z_last, k_third, m_second, a_first"

    with own_database.owner.connect() as connection:
        assert connection.scalar(text("SELECT a_first()")) == 4


def test_dependents_of_an_object_that_is_dropped_are_made_anew_with_it(own_database, files):
    write(
        files,
        "functions/k_one",
        "-- One.\nCREATE OR REPLACE FUNCTION k_one() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    )
    write(files, "views/a_two", "-- Two.\nCREATE OR REPLACE VIEW a_two AS SELECT k_one() AS n")
    write(
        files, "views/m_three", "-- Three.\nCREATE OR REPLACE VIEW m_three AS SELECT n FROM a_two"
    )
    upgrade(own_database)
    amend(files / "functions/k_one.sql", "RETURNS int", "RETURNS bigint")

    assert upgrade(own_database) == "made anew: k_one, a_two, m_three"

    with own_database.auditor.connect() as connection:
        assert connection.scalar(text("SELECT pg_typeof(n)::text FROM m_three")) == "bigint"
    for name in ("functions/k_one", "views/a_two", "views/m_three"):
        (files / f"{name}.sql").unlink()
    assert upgrade(own_database) == "made anew: a_two, m_three, k_one"


def test_an_operator_s_view_is_not_dropped_with_the_one_it_is_built_on(own_database, files):
    change(own_database, "CREATE VIEW mine AS SELECT waiting FROM queue_now")
    write(
        files, "views/queue_now", "-- Other.\nCREATE OR REPLACE VIEW queue_now AS SELECT 1 AS other"
    )
    amend(files / "views/audit_log.sql", "readable", "legible")
    before = found(own_database)

    with pytest.raises(
        SqlInUse, match=r"view mine .* Drop what depends on queue_now, migrate, and"
    ):
        upgrade(own_database)

    assert found(own_database) == before
    change(own_database, "DROP VIEW mine")
    assert upgrade(own_database) == "made anew: audit_log, queue_now"


def test_a_file_that_is_wrong_changes_nothing(own_database, files):
    amend(files / "views/audit_log.sql", "readable", "legible")
    write(
        files,
        "views/queue_now",
        "-- Other.\nCREATE OR REPLACE VIEW queue_now AS SELECT nothing FROM nowhere",
    )
    before = found(own_database)

    with pytest.raises(DBAPIError, match="nowhere"):
        upgrade(own_database)

    assert found(own_database) == before


def test_a_trigger_on_a_table_in_use_is_tried_until_it_can_be_made(own_database, files, in_a_hurry):
    amend(files / "triggers/jobs.flows_count_moved.sql", "Counts a job", "Counts one job")
    amend(files / "views/audit_log.sql", "readable", "legible")
    told: list[str] = []

    with ThreadPoolExecutor(1) as threads:
        with own_database.owner.connect() as writer:
            writer.execute(text("UPDATE jobs SET worker = 'w'"))  # its lock stays
            migrated = threads.submit(migrations.upgrade, own_database.owner_url, say=told.append)
            until(lambda: told, within_s=60, what="a try in vain")
            with own_database.app.begin() as reader:  # what was made by then is free again
                reader.execute(text("SET LOCAL lock_timeout = '30s'"))
                reader.execute(text("SELECT * FROM audit_log LIMIT 1"))
        migrated.result(timeout=60)

    assert told[0].startswith("a table is in use (")
    assert told[-1].endswith("; made anew: audit_log, jobs.flows_count_moved")


def test_an_upgrade_that_waits_in_vain_says_to_end_the_transaction(own_database, files, in_a_hurry):
    amend(files / "triggers/jobs.flows_count_moved.sql", "Counts a job", "Counts one job")

    with own_database.owner.connect() as writer:
        writer.execute(text("UPDATE jobs SET worker = 'w'"))
        with pytest.raises(DatabaseBusy, match="pg_stat_activity"):
            upgrade(own_database, wait_s=0)


def test_of_several_who_migrate_at_once_one_makes_what_changed(own_database, files):
    amend(files / "views/audit_log.sql", "readable", "legible")

    said = at_once(*[lambda: upgrade(own_database)] * 3)

    assert sorted(said) == ["made anew: audit_log", *["nothing to do"] * 2]
