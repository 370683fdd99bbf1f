"""The audit log: append-only, linked by hash, and honest about every edit."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from models import audit, sweeping
from models.database import transaction
from tests.builders import a_succeeded_job, a_tenant, a_zone_of_another_day
from tests.models.facts import at_once


@pytest.fixture
def chain() -> str:
    """The name of a chain that no other test writes to."""
    return f"chain-{uuid.uuid4().hex[:8]}"


def append(session, chain, count=1):
    for number in range(count):
        audit.append(session, "test:thing:happened", chain=chain, actor="tests", number=number)


def verify(session, chain) -> list[tuple[int, str]]:
    """The problems of a chain: where, and what."""
    rows = session.execute(text("SELECT seq, problem FROM audit_verify(:chain)"), {"chain": chain})
    return [(row.seq, row.problem) for row in rows]


@pytest.fixture
def tampered(database, chain):
    """A chain of five events, and a superuser without conscience.

    `tampered(sql)` edits history and says what verify finds.
    """
    with Session(database.owner) as session:
        append(session, chain, 5)
        session.execute(text("SET LOCAL session_replication_role = replica"))  # no trigger fires

        def edit(statement: str) -> list[tuple[int, str]]:
            session.execute(text(statement), {"chain": chain})
            return verify(session, chain)

        yield edit
        session.rollback()


def test_events_are_numbered_and_linked(session, chain):
    append(session, chain, 3)

    rows = session.execute(
        text("SELECT seq, prev_hash, hash FROM audit_log WHERE chain = :chain ORDER BY seq"),
        {"chain": chain},
    ).all()

    assert [row.seq for row in rows] == [1, 2, 3]
    assert [row.prev_hash for row in rows] == ["", rows[0].hash, rows[1].hash]
    assert verify(session, chain) == []


def test_the_log_verifies_whatever_time_zone_postgres_is_set_to(session):
    session.execute(text(f"SET LOCAL TIME ZONE '{a_zone_of_another_day()}'"))
    job = a_succeeded_job(session)
    session.execute(text("SET LOCAL TIME ZONE 'Asia/Tokyo'"))

    assert verify(session, str(job.tenant_id)) == []


def test_a_whole_life_of_a_job_verifies(session):
    job = a_succeeded_job(session, num_images=3)

    assert verify(session, str(job.tenant_id)) == []


def test_a_tenant_s_chain_goes_by_its_name_for_people(session):
    tenant = a_tenant(session)

    row = session.execute(
        text("SELECT * FROM audit_chain_status WHERE chain = :name"), {"name": tenant.name}
    ).one()

    assert (row.chain_id, row.events) == (str(tenant.id), 1)


@pytest.mark.parametrize("role", ["app", "owner"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET actor = 'someone else'",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events",
        "TRUNCATE audit_events_default",
        "UPDATE audit_events_default SET actor = 'someone else'",
        "DELETE FROM audit_events_default",
    ],
)
def test_the_log_refuses_every_change(database, chain, role, statement):
    with transaction(database.app) as session:
        append(session, chain)
        session.execute(INSERT_WITHOUT_PARTITION, {"id": uuid.uuid4(), "chain": chain})

    with (
        getattr(database, role).connect() as connection,
        pytest.raises(DBAPIError, match=r"append-only|permission denied") as refused,
    ):
        connection.execute(text(statement))
    assert refused.value.orig.pgcode == "42501"  # insufficient privilege, whoever asks

    with transaction(database.app) as session:
        assert verify(session, chain) == []


INSERT_WITHOUT_PARTITION = text(
    """INSERT INTO audit_events (id, at, chain_id, seq, event, actor, facts, prev_hash, hash)
       VALUES (:id, '2001-01-01T00:00:00Z', :chain, 0,
               'test:thing:happened', 'tests', '{}', '', '')"""
)


@pytest.mark.parametrize("table", ["audit_events", "audit_events_default", "audit_chains"])
def test_the_application_reads_the_log_only_through_the_view(database, table):
    with database.app.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
        connection.execute(text(f"SELECT * FROM {table}"))


def test_the_auditor_reads_the_views_and_can_verify(database):
    with database.auditor.connect() as connection:
        connection.execute(text("SELECT * FROM audit_log LIMIT 1"))
        connection.execute(text("SELECT * FROM audit_verify('system')"))

        with pytest.raises(DBAPIError, match="permission denied"):
            connection.execute(text("SELECT * FROM audit_events"))


def test_a_forged_number_or_hash_is_overwritten(session, chain):
    append(session, chain)

    session.execute(
        text(
            """INSERT INTO audit_events (id, chain_id, seq, event, actor, facts, prev_hash, hash)
               VALUES (:id, :chain, 99, 'test:thing:forged', 'tests', '{}', '\\xdead', '\\xbeef')"""
        ),
        {"id": uuid.uuid4(), "chain": chain},
    )

    row = session.execute(
        text(
            "SELECT seq, hash FROM audit_log WHERE event = 'test:thing:forged' AND chain = :chain"
        ),
        {"chain": chain},
    ).one()
    assert (row.seq, row.hash == "beef") == (2, False)
    assert verify(session, chain) == []


@pytest.mark.parametrize(
    "column",
    [
        "actor = 'someone else'",
        "event = 'test:thing:unhappened'",
        "facts = '{\"number\": 7}'",
        "at = at + interval '1 microsecond'",
        "job_id = gen_random_uuid()",
        "attempt = 2",
        "id = gen_random_uuid()",
    ],
)
def test_an_edited_event_is_found(tampered, column):
    [(seq, problem)] = tampered(
        f"UPDATE audit_events SET {column} WHERE chain_id = :chain AND seq = 3"
    )

    assert (seq, "was changed" in problem) == (3, True)


def test_an_edited_event_with_a_recomputed_hash_breaks_the_next_link(tampered):
    tampered("UPDATE audit_events SET actor = 'someone else' WHERE chain_id = :chain AND seq = 3")

    found = tampered(
        """UPDATE audit_events SET hash = audit_digest(
               prev_hash, chain_id, seq, id, at, event, actor, job_id, attempt, facts)
           WHERE chain_id = :chain AND seq = 3"""
    )

    assert found == [(4, "the link to the event before is broken")]


def test_an_edited_newest_event_with_a_recomputed_hash_does_not_fit_the_head(tampered):
    """Nothing links to the newest event yet: only the chain's head knows its hash."""
    tampered("UPDATE audit_events SET actor = 'someone else' WHERE chain_id = :chain AND seq = 5")

    found = tampered(
        """UPDATE audit_events SET hash = audit_digest(
               prev_hash, chain_id, seq, id, at, event, actor, job_id, attempt, facts)
           WHERE chain_id = :chain AND seq = 5"""
    )

    assert found == [(5, "the newest events are missing")]


def test_an_edited_event_is_found_by_who_verifies_from_the_next_one_on(database, chain):
    """Its hash fits again, and of what was before only the link to it is looked at."""
    is_third = "WHERE chain_id = :chain AND seq = 3"
    digest = "audit_digest(prev_hash, chain_id, seq, id, at, event, actor, job_id, attempt, facts)"
    since = "(SELECT at FROM audit_events WHERE chain_id = :chain AND seq = 4)"
    query = text(f"SELECT seq, problem FROM audit_verify_since({since}, :chain)")
    with Session(database.owner) as session:
        append(session, chain, 5)
        assert session.execute(query, {"chain": chain}).all() == []

        session.execute(text("SET LOCAL session_replication_role = replica"))
        for change in ("actor = 'someone else'", f"hash = {digest}"):
            session.execute(text(f"UPDATE audit_events SET {change} {is_third}"), {"chain": chain})
        found = session.execute(query, {"chain": chain}).all()
        session.rollback()

    assert found == [(4, "the link to the event before is broken")]


def test_a_head_that_was_set_back_is_found(tampered):
    found = tampered(
        """UPDATE audit_chains SET last_seq = 4,
               last_hash = (SELECT hash FROM audit_events e WHERE e.chain_id = :chain AND e.seq = 4)
           WHERE chain_id = :chain"""
    )

    assert found == [(4, "the newest events are missing")]


def test_a_deletion_in_the_middle_is_found(tampered):
    assert tampered("DELETE FROM audit_events WHERE chain_id = :chain AND seq = 3") == [
        (4, "events are missing before this one")
    ]


def test_a_deletion_of_the_first_is_found(tampered):
    assert tampered("DELETE FROM audit_events WHERE chain_id = :chain AND seq = 1") == [
        (2, "events are missing before this one")
    ]


def test_a_deletion_of_the_newest_is_found(tampered):
    assert tampered("DELETE FROM audit_events WHERE chain_id = :chain AND seq = 5") == [
        (5, "the newest events are missing")
    ]


def test_a_deletion_of_a_whole_chain_is_found(tampered):
    assert tampered("DELETE FROM audit_events WHERE chain_id = :chain") == [
        (5, "the newest events are missing")
    ]


def test_a_chain_whose_head_was_removed_is_found(tampered):
    assert tampered("DELETE FROM audit_chains WHERE chain_id = :chain") == [
        (0, "the chain has no head")
    ]


def test_a_copied_event_is_found(tampered):
    found = tampered(
        """INSERT INTO audit_events
           SELECT gen_random_uuid(), at, chain_id, seq, event, actor, job_id, attempt, facts,
                  prev_hash, hash
           FROM audit_events WHERE chain_id = :chain AND seq = 3"""
    )

    assert {seq for seq, _ in found} == {3}


def test_an_edit_is_also_found_by_who_verifies_everything(database, chain, tampered):
    tampered("UPDATE audit_events SET actor = 'someone else' WHERE chain_id = :chain AND seq = 2")

    found = tampered(
        "UPDATE audit_events SET actor = 'a third' WHERE chain_id = :chain AND seq = 4"
    )

    assert [seq for seq, _ in found] == [2, 4]


def test_appends_to_one_chain_from_many_sides_leave_no_gap_and_no_fork(database, chain):
    def append_some():
        for _ in range(5):
            with transaction(database.app) as session:
                append(session, chain, 2)

    at_once(*[append_some] * 6)

    with transaction(database.app) as session:
        seqs = list(
            session.scalars(
                text("SELECT seq FROM audit_log WHERE chain = :chain ORDER BY seq"),
                {"chain": chain},
            )
        )
        assert seqs == list(range(1, 61))
        assert verify(session, chain) == []


def test_an_append_that_is_rolled_back_leaves_no_gap(database, chain):
    with transaction(database.app) as session:
        append(session, chain)
    with Session(database.app) as session:
        append(session, chain, 3)
        session.rollback()

    with transaction(database.app) as session:
        append(session, chain)
        assert list(
            session.scalars(
                text("SELECT seq FROM audit_log WHERE chain = :chain ORDER BY seq"),
                {"chain": chain},
            )
        ) == [1, 2]
        assert verify(session, chain) == []


def partitions_of(connection) -> set[str]:
    """The tables that hold the log."""
    query = """SELECT inhrelid::regclass::text FROM pg_inherits
               WHERE inhparent = 'audit_events'::regclass"""
    return set(connection.scalars(text(query)))


def test_the_log_is_partitioned_by_month_and_the_coming_months_are_there(database):
    with database.owner.connect() as connection:
        partitions = partitions_of(connection)
        months = connection.scalars(
            text(
                "SELECT to_char(now() AT TIME ZONE 'UTC' + make_interval(months => ahead), "
                "'YYYY_MM') FROM generate_series(0, 12) ahead"
            )
        )
        assert partitions == {
            "audit_events_default",
            *(f"audit_events_{month}" for month in months),
        }
        assert (
            connection.scalar(text("SELECT pg_get_partkeydef('audit_events'::regclass)"))
            == "RANGE (at)"
        )


def test_a_month_of_the_log_is_utc_s_whatever_time_zone_postgres_is_set_to(database):
    """As it is made again, where another zone is set."""
    bounds = text(
        """SELECT pg_get_expr(relpartbound, oid) FROM pg_class
           WHERE oid = to_regclass(:name)"""
    )
    with database.owner.connect() as connection:
        connection.execute(text("SET LOCAL TIME ZONE 'UTC'"))
        last = text("SELECT to_char(now() + interval '12 months', 'YYYY_MM')")
        name = f"audit_events_{connection.scalar(last)}"
        before = connection.scalar(bounds, {"name": name})
        months = partitions_of(connection)
        connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text(f"SET LOCAL TIME ZONE '{a_zone_of_another_day()}'"))

        connection.execute(text("SELECT audit_ensure_partitions(12)"))

        connection.execute(text("SET LOCAL TIME ZONE 'UTC'"))
        after = connection.scalar(bounds, {"name": name})
        assert partitions_of(connection) == months
        connection.rollback()

    assert after == before
    assert before is not None


def test_the_months_ahead_are_counted_up_to_the_first_that_is_missing(database):
    with database.owner.connect() as connection:
        month = datetime.now(UTC).replace(day=1)
        for _ in range(3):
            month = (month + timedelta(days=32)).replace(day=1)
        connection.execute(text(f"DROP TABLE audit_events_{month:%Y_%m}"))

        ahead = connection.scalar(text("SELECT audit_partitions_ahead()"))
        connection.rollback()

    assert ahead == 2


def test_an_event_lies_in_the_partition_of_its_month(database, chain):
    with transaction(database.app) as session:
        append(session, chain)

    query = """SELECT tableoid::regclass::text
                      = 'audit_events_' || to_char(at AT TIME ZONE 'UTC', 'YYYY_MM')
               FROM audit_events WHERE chain_id = :chain"""
    with database.owner.connect() as connection:
        assert connection.scalar(text(query), {"chain": chain}) is True


def test_the_application_can_make_the_partitions_of_the_coming_months_again_and_again(session):
    assert sweeping.ensure_audit_partitions(session) == 12
    assert sweeping.ensure_audit_partitions(session) == 12


@pytest.fixture
def without_the_last_month(database):
    """The log as it is when a month has passed.

    The partition of the month a year ahead is missing. Gives back its name.
    """
    with database.owner.begin() as connection:
        name = connection.scalar(
            text(
                "SELECT 'audit_events_' || to_char(now() AT TIME ZONE 'UTC' + "
                "make_interval(months => 12), 'YYYY_MM')"
            )
        )
        connection.execute(text(f"DROP TABLE {name}"))
    yield name
    with transaction(database.app) as session:
        assert sweeping.ensure_audit_partitions(session) == 12


def make_partitions(database) -> int:
    with transaction(database.app) as session:
        return sweeping.ensure_audit_partitions(session)


def test_making_a_partition_stops_nobody_who_appends_whoever_reads_the_log(
    database, chain, without_the_last_month
):
    with database.auditor.connect() as reader, ThreadPoolExecutor(1) as other:
        # its lock stays until the transaction ends, as a dump's does
        reader.execute(text("SELECT count(*) FROM audit_log"))
        made = other.submit(make_partitions, database)

        while not made.done():
            with transaction(database.app) as session:
                session.execute(text("SET LOCAL lock_timeout = '1s'"))
                append(session, chain)
                session.execute(
                    text("SELECT count(*) FROM audit_log WHERE chain = :chain"), {"chain": chain}
                )

        assert made.result() == 11
    assert make_partitions(database) == 12


def test_a_partition_that_is_made_later_refuses_changes_as_the_others_do(
    database, without_the_last_month
):
    make_partitions(database)

    triggers = """SELECT tgrelid::regclass::text, array_agg(tgname ORDER BY tgname) FROM pg_trigger
                  WHERE tgrelid::regclass::text LIKE 'audit_events_2%' GROUP BY 1"""
    indexes = (
        "SELECT tablename, count(*) FROM pg_indexes WHERE tablename LIKE 'audit_events_2%' "
        "GROUP BY 1"
    )
    with database.owner.connect() as connection:
        triggers_of = dict(connection.execute(text(triggers)).all())
        indexes_of = dict(connection.execute(text(indexes)).all())

    assert triggers_of[without_the_last_month] == [
        "audit_link",
        "audit_no_change",
        "audit_no_truncate",
    ]
    assert set(map(tuple, triggers_of.values())) == {tuple(triggers_of[without_the_last_month])}
    assert set(indexes_of.values()) == {3}


def test_an_event_without_a_partition_is_kept_and_linked_all_the_same(session, chain):
    append(session, chain)

    session.execute(INSERT_WITHOUT_PARTITION, {"id": uuid.uuid4(), "chain": chain})

    assert verify(session, chain) == []
    assert (
        session.scalar(
            text("SELECT count(*) FROM audit_log WHERE chain = :chain"), {"chain": chain}
        )
        == 2
    )
