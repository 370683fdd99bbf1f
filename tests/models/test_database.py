"""Connections of the pool: what a server that went away, or is not itself, costs who comes next. And transactions that conflict."""

from threading import Barrier

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from models import database
from models.database import TRIES, DatabaseAway, conflict, make_engine, run_transaction, transaction
from tests.models.facts import at_once


@pytest.fixture
def engine(stack):
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


def backend(engine) -> int:
    with transaction(engine) as session:
        return session.scalar(text("SELECT pg_backend_pid()"))


def cut(stack, pid: int) -> None:
    owner = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)
    with transaction(owner) as session:
        session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    owner.dispose()


def test_a_connection_that_broke_while_it_was_idle_is_made_anew(engine, stack, monkeypatch):
    monkeypatch.setattr(database, "CHECKED_AFTER_S", 0.0)
    before = backend(engine)

    cut(stack, before)

    assert backend(engine) != before


def test_one_that_was_just_used_is_not_asked_first_and_only_its_next_user_sees_that_it_broke(engine, stack, monkeypatch):
    monkeypatch.setattr(database, "CHECKED_AFTER_S", 60.0)
    before = backend(engine)
    assert backend(engine) == before

    cut(stack, before)

    with pytest.raises(OperationalError):
        backend(engine)
    assert backend(engine) != before


def raise_sqlstate(session, code):
    session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'as if' USING ERRCODE = '{code}'; END $$"))


def test_two_transactions_that_lock_crosswise_both_come_to_their_end(stack):
    engine, tries = make_engine(stack.env["DATABASE_URL"], pool_size=2), []
    met = Barrier(2, timeout=20)

    def lock(*numbers):
        def work(session):
            tries.append(numbers)
            session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": numbers[0]})
            if len(tries) <= 2:
                met.wait()
            session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": numbers[1]})
            return numbers

        return lambda: run_transaction(engine, work)

    assert at_once(lock(71, 72), lock(72, 71)) == [(71, 72), (72, 71)]
    assert len(tries) == 3, "one of them was begun again"
    engine.dispose()


@pytest.mark.parametrize("code", ["40P01", "40001"])
def test_a_transaction_that_always_conflicts_is_tried_a_few_times_and_then_says_so(engine, code):
    tries = []

    def work(session):
        tries.append(session)
        raise_sqlstate(session, code)

    with pytest.raises(OperationalError) as caught:
        run_transaction(engine, work)

    assert len(tries) == len(set(tries)) == TRIES
    assert conflict(caught.value) is not None


def test_what_fails_of_itself_is_not_tried_again(engine):
    tries = []

    def work(session):
        tries.append(session)
        raise_sqlstate(session, "23505")

    with pytest.raises(IntegrityError) as caught:
        run_transaction(engine, work)

    assert len(tries) == 1
    assert conflict(caught.value) is None


def test_a_transaction_begun_again_leaves_nothing_of_its_first_try(engine):
    tries = []

    def work(session):
        session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS noted (number integer) ON COMMIT PRESERVE ROWS"))
        session.execute(text("INSERT INTO noted VALUES (1)"))
        tries.append(session)
        if len(tries) == 1:
            raise_sqlstate(session, "40001")
        return session.scalar(text("SELECT count(*) FROM noted"))

    assert run_transaction(engine, work) == 1


def backend_raising(engine, sqlstate: str) -> int:
    """The backend in which the server raised this."""
    with transaction(engine) as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(DBAPIError) as raised:
            session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'so be it' USING ERRCODE = '{sqlstate}'; END $$"))
        raise raised.value.with_traceback(None) from PidKnown(pid)


class PidKnown(Exception):
    """Carries a backend's pid out of a transaction."""


def raised(engine, sqlstate: str) -> tuple[DBAPIError, int]:
    with pytest.raises(DBAPIError) as error:
        backend_raising(engine, sqlstate)
    return error.value, error.value.__cause__.args[0]


# Every state in which a server says that it is not itself: PostgreSQL's appendix on error codes, classes 08, 25, 53, 57, 58.
@pytest.mark.parametrize("sqlstate", ["08000", "08003", "08006", "08P01", "25006", "25P03", "57P01", "57P02", "57P03", "57P04", "57P05"])
def test_a_server_that_is_not_itself_is_one_kind_of_error_and_its_connections_are_dropped(engine, sqlstate):
    error, before = raised(engine, sqlstate)

    assert isinstance(error, DatabaseAway)
    assert error.connection_invalidated
    assert backend(engine) != before


@pytest.mark.parametrize("sqlstate", ["53000", "53100", "53200", "53300", "53400", "58000", "58030"])
def test_a_server_that_lacks_something_is_the_same_kind_and_its_connections_are_good(engine, sqlstate):
    error, before = raised(engine, sqlstate)

    assert isinstance(error, DatabaseAway)
    assert backend(engine) == before


@pytest.mark.parametrize("sqlstate", ["23505", "22012", "25001", "42501", "42P01", "57014", "XX000"])
def test_any_other_error_is_told_as_it_is(engine, sqlstate):
    error, before = raised(engine, sqlstate)

    assert not isinstance(error, DatabaseAway)
    assert backend(engine) == before


def demote(engine) -> int:
    """Make the pool's only connection one to a server that takes no writes any more; its backend."""
    with engine.connect() as connection:
        connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        connection.commit()
    return backend(engine)


def test_a_connection_to_a_primary_that_was_demoted_is_made_anew_when_it_was_idle(engine, monkeypatch):
    before = demote(engine)

    monkeypatch.setattr(database, "CHECKED_AFTER_S", 0.0)

    assert backend(engine) != before


def test_one_that_was_in_use_fails_one_write_and_is_made_anew(engine, monkeypatch):
    monkeypatch.setattr(database, "CHECKED_AFTER_S", 60.0)
    before = demote(engine)

    with pytest.raises(DatabaseAway), transaction(engine) as session:
        session.execute(text("DELETE FROM workers WHERE name = 'nobody'"))

    assert backend(engine) != before
    with transaction(engine) as session:
        session.execute(text("DELETE FROM workers WHERE name = 'nobody'"))


def test_a_server_that_takes_no_writes_is_away_until_it_does(database):
    name = database.app.url.database
    server = create_engine(database.owner_url, isolation_level="AUTOCOMMIT")
    app = make_engine(database.app.url.render_as_string(hide_password=False), pool_size=1)

    def set_read_only(value: str) -> None:
        with server.connect() as connection:
            connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"))
            connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"))

    set_read_only("on")
    try:
        with pytest.raises(OperationalError):
            backend(app)
    finally:
        set_read_only("off")

    assert backend(app)
    app.dispose()
    server.dispose()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_query_that_the_end_of_its_process_interrupts_is_no_outage(engine, end):
    before = backend(engine)

    def interrupt(*arguments):
        event.remove(engine, "do_execute", interrupt)
        raise end

    event.listen(engine, "do_execute", interrupt)
    with pytest.raises(end):
        backend(engine)

    assert backend(engine) != before, "the interrupted connection is not used again"
