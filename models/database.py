"""One engine per process, one transaction per `with`, or one that is tried again when another got into its way."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import DateTime, Engine, ScalarSelect, create_engine, event, func, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

# libpq: a server that is gone without a word (failover, a NAT that forgot us) is an error after some 8 s, not a hang of minutes.
_NOTICES_SILENCE = {"keepalives_idle": 5, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 8000}

CHECKED_AFTER_S = 0.5  # of idleness; a check costs a round trip, and a Postgres that restarts is away for about as long

CONFLICTS = {"40P01": "deadlock", "40001": "serialization"}  # by SQLSTATE: what ended is sound, and so is the database
TRIES = 5  # of a transaction that conflicts with others; a deadlock costs each of them a second

Answer = TypeVar("Answer")

AFRESH = {"populate_existing": True}  # execution options of a locking read: it is taken to see what is there now


def make_engine(database_url: str, *, pool_size: int = 5) -> Engine:
    """Connections that are checked after they were idle (a restarted Postgres costs a reconnect, not an error), every wait limited."""
    options = "-c statement_timeout=30000 -c idle_in_transaction_session_timeout=30000 -c lock_timeout=10000"
    engine = create_engine(
        database_url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_use_lifo=True,  # those in use stay few and warm
        pool_timeout=10,
        connect_args={"options": options, "connect_timeout": 5, "application_name": "darkroom", **_NOTICES_SILENCE},
    )
    _check_idle_ones(engine)
    return engine


def _check_idle_ones(engine: Engine) -> None:
    def note_use(connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    def check(connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        if time.monotonic() - record.info.get("used_at", math.inf) < CHECKED_AFTER_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool makes all its connections anew

    event.listen(engine, "checkin", note_use)
    event.listen(engine, "checkout", check)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """A session that commits when the block ends well and rolls back when it does not."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def run_transaction(engine: Engine, work: Callable[[Session], Answer]) -> Answer:
    """Do `work` in a transaction, commit it and return what `work` did.

    A transaction that the database ended only because of another one beside it is begun again, from `work`'s first line, up to
    TRIES times in all: so `work` touches nothing but its session. Raises what the last try raised.
    """
    for tried in range(1, TRIES):
        try:
            with transaction(engine) as session:
                return work(session)
        except DBAPIError as error:
            if conflict(error) is None:
                raise
            time.sleep(random.uniform(0, 0.01 * 2**tried))  # apart: two who lost to each other would else meet again
    with transaction(engine) as session:
        return work(session)


def conflict(error: BaseException) -> str | None:
    """Name what ended a transaction if that was only what ran beside it, so that another try will do; None for any other error."""
    return CONFLICTS.get(getattr(error.orig, "pgcode", None) or "") if isinstance(error, DBAPIError) else None


def now_once() -> ScalarSelect[Any]:
    """The database's clock, read once a statement, to compare an indexed column with.

    `clock_timestamp()` itself is volatile: no index is searched with it, every row that a partial index holds is looked at.
    """
    return select(func.clock_timestamp(type_=DateTime(timezone=True))).scalar_subquery()
