"""Connections of the pool: a server that went away costs who comes next a reconnect, not an error. And transactions that conflict."""

from threading import Barrier

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from models import database
from models.database import TRIES, conflict, make_engine, run_transaction, transaction
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
