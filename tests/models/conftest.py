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


_templates: dict[str, str] = {}  # by the server's URL: the database that migrated ones are made of


@contextmanager
def a_database(env, *, is_migrated: bool = True) -> Iterator[Database]:
    """A fresh database, migrated or empty; it is gone afterwards."""
    name = f"tests_{uuid.uuid4().hex[:12]}"
    template = f" TEMPLATE {_template(env)}" if is_migrated else ""
    _on_server(env, f"CREATE DATABASE {name}{template}")
    owner_url = _url_of(env, "MIGRATION_DATABASE_URL", name)
    engines = (
        create_engine(owner_url),
        make_engine(_url_of(env, "DATABASE_URL", name), pool_size=20),
        make_engine(_url_of(env, "AUDITOR_DATABASE_URL", name)),
    )
    try:
        yield Database(owner_url, *engines)
    finally:
        for engine in engines:
            engine.dispose()
        _on_server(env, f"DROP DATABASE {name} WITH (FORCE)")


def _template(env) -> str:
    """The name of a migrated database that nobody can connect to; it goes with its server."""
    url = env["MIGRATION_DATABASE_URL"]
    if url not in _templates:
        name = f"migrated_{uuid.uuid4().hex[:12]}"
        _on_server(env, f"CREATE DATABASE {name}")
        migrations.upgrade(_url_of(env, "MIGRATION_DATABASE_URL", name))
        _on_server(env, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        _templates[url] = name
    return _templates[url]


def _on_server(env, statement: str) -> None:
    server = create_engine(env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(statement))
    server.dispose()


def _url_of(env, variable: str, name: str) -> str:
    """The URL of that login for the database `name`."""
    return make_url(env[variable]).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def database(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def empty_database(stack) -> Iterator[Database]:
    with a_database(stack.env, is_migrated=False) as database:
        yield database


@pytest.fixture
def session(database) -> Iterator[Session]:
    """A transaction of the application that comes to nothing in the end."""
    with Session(database.app, expire_on_commit=False) as session:
        yield session
        session.rollback()
