"""Data of before the migrations had one baseline.

At its revision they are brought up to date, older ones are refused.
"""

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import migrations
from migrations.errors import RevisionTooOld
from models import files, jobs, leases, usage
from models.listing import JobFilter, page
from tests.builders import WORKER, a_job, hand_off, store
from tests.models.conftest import a_database
from tests.models.facts import HEAD, definitions, living_definitions, rights

OLD_DATA = Path(__file__).with_name("revision_0012.sql")


@pytest.fixture(scope="module")
def old_data(stack):
    """A database as the twelve migrations left it, and what today's say to it."""
    with a_database(stack.env, is_migrated=False) as database:
        with database.owner.begin() as connection:
            connection.exec_driver_sql(
                OLD_DATA.read_text(), execution_options={"no_parameters": True}
            )
        told: list[str] = []
        migrations.upgrade(database.owner_url, say=told.append)
        assert told[-1].startswith(f"at revision {HEAD}")
        yield database


@pytest.fixture
def old_session(old_data):
    """A transaction of the application with the old data, which comes to nothing."""
    with Session(old_data.app, expire_on_commit=False) as session:
        yield session
        session.rollback()


def tenant_id_of(session):
    return session.scalar(text("SELECT id FROM tenants WHERE name = 'acme'"))


@pytest.mark.parametrize("what", [definitions, living_definitions, rights])
def test_old_data_come_to_what_a_new_database_is(old_data, database, what):
    options = {"schema": "public"} if what is definitions else {}
    with old_data.owner.connect() as old, database.owner.connect() as new:
        assert what(old, **options) == what(new, **options)


def test_old_data_are_migrated_once(old_data):
    told: list[str] = []

    migrations.upgrade(old_data.owner_url, say=told.append)

    assert told == [f"at revision {HEAD}, nothing to do"]


def test_old_rows_are_still_there_and_counted(old_session):
    tenant_id = tenant_id_of(old_session)

    states = old_session.execute(
        text("SELECT state, count(*) FROM jobs GROUP BY state ORDER BY state")
    ).all()

    assert [tuple(row) for row in states] == [("failed", 1), ("queued", 2), ("succeeded", 1)]
    assert files.stored(old_session, tenant_id=tenant_id) == (1, 70)
    queued = old_session.scalar(text("SELECT sum(queued_jobs) FROM flows"))
    assert queued == 2
    assert usage.usage_totals(old_session, tenant_id=tenant_id, count_jobs_to=10).active_jobs == 2


def test_old_jobs_are_found_by_their_labels(old_session):
    found = page(
        old_session,
        JobFilter(metadata={"order": "7"}),
        tenant_id=tenant_id_of(old_session),
        limit=5,
    )

    assert [job.tenant_metadata for job in found.jobs] == [{"order": "7"}]


def test_the_old_audit_log_verifies_also_with_new_events(old_session):
    problems = text("SELECT * FROM audit_verify()")
    assert old_session.execute(problems).all() == []

    job = a_job(old_session)
    jobs.cancel(old_session, job.id, tenant_id=job.tenant_id, actor="tests")

    assert old_session.execute(problems).all() == []


def test_an_old_job_that_waits_can_be_rendered_and_stored(old_session):
    old_session.execute(
        text(
            "UPDATE jobs SET start_by = clock_timestamp() + interval '1 hour' "
            "WHERE state = 'queued'"
        )
    )
    waiting = old_session.scalar(
        text("SELECT id FROM jobs WHERE state = 'queued' AND predicted_s > 0")
    )
    lease = leases.take(old_session, waiting, worker=WORKER, device="cpu", ttl_s=15)
    hand_off(old_session, lease)

    assert store(old_session, lease.job).state == "succeeded"


@pytest.mark.parametrize("revision", ["0001", "0011"])
def test_data_of_before_the_baseline_are_refused_in_one_sentence(empty_database, revision):
    with empty_database.owner.begin() as connection:
        connection.execute(
            text("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        )
        connection.execute(
            text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": revision}
        )

    with pytest.raises(RevisionTooOld) as refused:
        migrations.upgrade(empty_database.owner_url)

    said = str(refused.value)
    assert said.startswith(
        f"the database is at revision {revision}, and this version begins at 0012: upgrade it first"
    )
    assert len(said.splitlines()) == 1
