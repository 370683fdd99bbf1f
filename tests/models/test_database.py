"""Connections of the pool: a server that went away costs who comes next a reconnect, not an error."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from models import database
from models.database import make_engine, transaction


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
