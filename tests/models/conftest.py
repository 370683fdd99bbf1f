"""A database of its own, migrated once, in the stack's Postgres.

No worker and no sweeper looks at it.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.orm import Session

import migrations
from models.database import make_engine


@dataclass(frozen=True)
class Database:
    """One database, seen by its owner (a superuser here), by the application and by the auditor."""

    owner_url: str
    owner: Engine
    app: Engine
    auditor: Engine


@contextmanager
def a_database(env, *, migrated_to: str | None = "head") -> Iterator[Database]:
    """A fresh database; it is gone afterwards. migrated_to: None leaves it empty."""
    name = f"tests_{uuid.uuid4().hex[:12]}"
    server = create_engine(env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))

    def url(variable: str) -> str:
        return make_url(env[variable]).set(database=name).render_as_string(hide_password=False)

    owner_url = url("MIGRATION_DATABASE_URL")
    engines = (
        create_engine(owner_url),
        make_engine(url("DATABASE_URL"), pool_size=20),
        make_engine(url("AUDITOR_DATABASE_URL")),
    )
    try:
        if migrated_to:
            migrations.upgrade(owner_url, migrated_to)
        yield Database(owner_url, *engines)
    finally:
        for engine in engines:
            engine.dispose()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


@pytest.fixture(scope="session")
def database(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def empty_database(stack) -> Iterator[Database]:
    with a_database(stack.env, migrated_to=None) as database:
        yield database


@pytest.fixture
def session(database) -> Iterator[Session]:
    """A transaction of the application that comes to nothing in the end."""
    with Session(database.app, expire_on_commit=False) as session:
        yield session
        session.rollback()
