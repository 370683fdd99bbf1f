"""How the tables got here, one story per file. `python -m migrations` brings a database up to date."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text

_LOCK = 0x4461726B726F6F6D  # "Darkroom": only one process migrates at a time


def upgrade(owner_url: str, revision: str = "head") -> None:
    """Run every migration that the database has not seen, as its owner. Safe when several start at once."""
    engine = create_engine(owner_url)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        connection.commit()
        command.upgrade(_config(connection), revision)
        connection.commit()
    engine.dispose()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
