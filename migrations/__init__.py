"""How the tables got here, one story per file. `python -m migrations` brings a database up to date."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

from migrations import roles

_LOCK = 0x4461726B726F6F6D  # "Darkroom": only one process migrates at a time


def upgrade(owner_url: str, revision: str = "head") -> tuple[str | None, str | None]:
    """Run every migration that the database has not seen, as its owner, and apply the grants; the revisions before and after.

    Safe when several start at once.
    """
    engine = create_engine(owner_url)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        connection.commit()
        was = _revision(connection)
        command.upgrade(_config(connection), revision)
        if revision == "head":
            roles.grant(connection)
        connection.commit()
        now = _revision(connection)
    engine.dispose()
    return was, now


def revision_of(owner_url: str) -> str | None:
    """Where the database is; None before its first migration."""
    engine = create_engine(owner_url)
    with engine.connect() as connection:
        found = _revision(connection)
    engine.dispose()
    return found


def head() -> str | None:
    """The newest revision that this program knows."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return ScriptDirectory.from_config(config).get_current_head()


def _revision(connection: Connection) -> str | None:
    found = MigrationContext.configure(connection).get_current_revision()
    connection.commit()
    return found


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
