"""Bring a database up to date: versioned migrations, then living SQL, then the grants.

`python -m migrations` runs it. The tables' history is in versions/, one story per file; functions,
views and triggers follow their files in models/sql.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from migrations import living, roles
from migrations.errors import DatabaseBusy, RevisionTooOld, UnknownRevision
from migrations.log_settings import keep_prompts_out_of_logs
from migrations.online import LOCK_TIMEOUT
from models.sweeping import AUDIT_MONTHS_AHEAD

_LOCK = 0x4461726B726F6F6D  # "Darkroom": only one process migrates at a time
_OTHERS_FIRST = ("55P03", "40P01")  # lock not available, deadlock detected
_PAUSE_S = 2.0  # between two tries; whom the first one made wait is served meanwhile
_WAIT_S = 600.0

VERSIONS = [Path(__file__).parent / "versions"]  # folders of versioned migrations
# Revisions that the baseline, the twelfth, replaced.
REPLACED = {f"{number:04}" for number in range(1, 12)}


def upgrade(
    owner_url: str,
    revision: str = "head",
    *,
    say: Callable[[str], None] = lambda line: None,
    wait_s: float = _WAIT_S,
) -> None:
    """Run every migration that the database has not seen, as its owner; then living SQL and grants.

    Safe when several start at once, and beside running code.

    revision: to stop at; living SQL is for the newest alone.  say: is called with each line of
    progress.  wait_s: how long to try for locks that others hold.  Raises MigrationFailed.
    """
    engine = create_engine(owner_url)
    deadline = time.monotonic() + wait_s
    try:
        with _only_one(engine, deadline, say):
            before = _check_revision(engine)
            while (applied := _try(engine, revision, say)) is None:
                if time.monotonic() > deadline:
                    raise DatabaseBusy(
                        f"a table stayed locked for {wait_s:g} s; end the transaction that holds it"
                        " (see pg_stat_activity) and try again"
                    )
                time.sleep(_PAUSE_S)
            after = current_revision(engine)
            keep_prompts_out_of_logs(engine, say)
    finally:
        engine.dispose()
    say(f"at revision {after}{_what_changed(before, after, applied)}")


def _what_changed(before: str | None, after: str | None, applied: Sequence[str]) -> str:
    if before != after:
        return f", was {before or 'empty'}"
    return f"; made anew: {', '.join(applied)}" if applied else ", nothing to do"


def current_revision(engine: Engine) -> str | None:
    """Read the revision of the database; None for an empty one."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def _only_one(engine: Engine, deadline: float, say: Callable[[str], None]) -> Iterator[None]:
    """Take turns with other processes that migrate.

    It polls: a statement that waits for the lock would have a snapshot, and a process that builds
    an index waits for the end of every snapshot.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        is_told = False
        while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}):
            if not is_told:
                say("another process is migrating this database; waiting for it")
            is_told = True
            if time.monotonic() > deadline:
                raise DatabaseBusy("another process is migrating this database and does not end")
            time.sleep(0.2)
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK})


def _check_revision(engine: Engine) -> str | None:
    """Return the database's revision. Raises UnknownRevision, RevisionTooOld."""
    revision = current_revision(engine)
    scripts = ScriptDirectory.from_config(_config())
    if revision is None or revision in {script.revision for script in scripts.walk_revisions()}:
        return revision
    if revision in REPLACED:
        raise RevisionTooOld(
            f"the database is at revision {revision}, and this version begins at"
            f" {scripts.get_base()}: upgrade it first with a version that has the migrations in"
            " between, or begin with an empty database"
        )
    raise UnknownRevision(
        f"the database is at revision {revision}, which this version does not know, so a newer one"
        " migrated it: start that version again, or go back to the backup that was made before the"
        " upgrade (docs/operating.md)"
    )


def _try(engine: Engine, revision: str, say: Callable[[str], None]) -> list[str] | None:
    """Run what is missing; name the living SQL that was applied, or None if a lock was not free.

    What was done before that stays, or is done again harmlessly.
    """
    try:
        with engine.connect() as connection:
            connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
            connection.commit()
            command.upgrade(_config(connection), revision)
            applied = _apply_living(connection) if revision == "head" else []
            connection.commit()
    except OperationalError as error:
        if getattr(error.orig, "pgcode", None) not in _OTHERS_FIRST:
            raise
        say(f"a table is in use ({' '.join(str(error.orig).split())}); trying again")
        return None
    return applied


def _apply_living(connection: Connection) -> list[str]:
    """Bring functions, views, triggers, who may use them, and the log's partitions up to date."""
    applied = living.apply(connection)
    roles.grant(connection)
    connection.execute(
        text("SELECT audit_ensure_partitions(:months)"), {"months": AUDIT_MONTHS_AHEAD}
    )
    return applied


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", os.pathsep.join(map(str, VERSIONS)))
    config.attributes["connection"] = connection
    return config
