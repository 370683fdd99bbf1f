"""Make the engine and run transactions: with `with`, or with another try after a conflict.

A server that is unavailable for a while is one kind of error. DatabaseAway is raised for a Postgres
that restarts, shuts down, was demoted to a replica, has no connection, disk or memory left, or
broke a connection, whatever class the driver gave the error. It is an OperationalError, so a caller
that survives an unreachable server survives all of these.
"""

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import DateTime, Engine, ScalarSelect, create_engine, event, func, select
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

# For libpq: a server that vanished without closing the connection (a failover, a NAT that dropped
# it) is an error after some 8 s, not a hang of minutes.
_NOTICES_SILENCE = {
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
}

# A connection that was idle for longer is checked before use. A check costs a round trip, and a
# Postgres that restarts is away for about as long.
CHECKED_AFTER_S = 0.5

# SQLSTATEs of a transaction that only conflicted with another: another try will do.
CONFLICTS = {"40P01": "deadlock", "40001": "serialization"}
TRIES = 5  # of a transaction that conflicts with others; a deadlock costs each of them a second

Result = TypeVar("Result")

# SQLSTATEs. 08: the connection broke. 25006: read-only, as a replica is. 25P03, 57P: the server
# ends this session, or all of them. 53: no connections, disk or memory left. 58: its files cannot
# be read or written.
_SERVER_AWAY = re.compile("08...|25006|25P03|53...|57P..|58...")
# Those after which no existing connection is of use.
_SESSION_OVER = re.compile("08...|25006|25P03|57P..")

# Execution options of a locking read, which must see the row as it is now, not as it was loaded.
AFRESH = {"populate_existing": True}


class DatabaseAway(OperationalError):
    """The server is unavailable right now; the same statement will work later."""

    def __init__(self, cause: BaseException, *, is_session_over: bool) -> None:
        super().__init__(None, None, cause, connection_invalidated=is_session_over)


def is_away(error: BaseException) -> bool:
    """Tell whether the error says that the server cannot be reached or used at all.

    False for an error of one statement only, such as a deadlock.
    """
    if isinstance(error, OperationalError):
        return isinstance(error, DatabaseAway) or getattr(error.orig, "pgcode", None) is None
    return isinstance(error, PoolTimeout)


def make_engine(database_url: str, *, pool_size: int = 5) -> Engine:
    """Make an engine of connections in UTC to a writable server, checked after they were idle.

    Every wait is limited. A restarted Postgres costs a reconnect, not an error. So does one that
    was demoted, if the URL leads to its successor: with several hosts in the URL, to their primary.
    """
    settings = {
        "statement_timeout": "30000",
        "idle_in_transaction_session_timeout": "30000",
        "lock_timeout": "10000",
        "timezone": "UTC",  # not the server's own: instants are shown as they come from here
    }
    engine = create_engine(
        database_url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_use_lifo=True,  # those in use stay few and warm
        pool_timeout=10,
        hide_parameters=True,  # in what an error says, and so in logs
        connect_args={
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
            "connect_timeout": 5,
            "application_name": "darkroom",
            "target_session_attrs": "read-write",
            **_NOTICES_SILENCE,
        },
    )
    _check_idle_ones(engine)
    event.listen(engine, "handle_error", _keep_values_out)
    event.listen(engine, "handle_error", _to_one_kind)
    return engine


def _keep_values_out(context: ExceptionContext) -> None:
    """Cut an error's text to what went wrong, without the row it went wrong with.

    The lines after the first one quote the row, prompt included. `error.orig.diag` still has all of
    it.
    """
    original = context.original_exception
    wrapped = context.sqlalchemy_exception
    told = str(original).partition("\n")[0]
    # Class 22: a value that cannot be used, which the first line quotes at its end.
    if str(getattr(original, "pgcode", "") or "").startswith("22"):
        told = told.partition('"')[0]
    if told != str(original):
        original.args = (told,)
        if wrapped is not None:
            wrapped.args = (f"({type(original).__module__}.{type(original).__name__}) {told}",)


def _check_idle_ones(engine: Engine) -> None:
    def note_use(connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    def check(
        connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        if time.monotonic() - record.info.get("used_at", math.inf) < CHECKED_AFTER_S:
            return
        try:
            is_read_only = _is_read_only(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool makes all its connections anew
        if is_read_only:
            # A demoted primary would go on to answer reads with ever older data.
            raise InvalidatePoolError

    event.listen(engine, "checkin", note_use)
    event.listen(engine, "checkout", check)


def _is_read_only(connection: Any) -> bool:
    """Ask the server whether it is read-only, outside of any transaction."""
    before = connection.autocommit
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_read_only")
            return bool(cursor.fetchone() == ("on",))
    finally:
        if not connection.closed:
            connection.autocommit = before


def _to_one_kind(context: ExceptionContext) -> DatabaseAway | None:
    """Return a DatabaseAway to raise instead, if the error says that the server is unavailable.

    The pool drops connections that are of no use after it.
    """
    cause = context.original_exception
    if not isinstance(cause, Exception):
        return None  # a KeyboardInterrupt or SystemExit in the middle of a query ends the process
    sqlstate = getattr(cause, "pgcode", None) or ""
    if _SESSION_OVER.fullmatch(sqlstate):
        context.is_disconnect = True
    if _SERVER_AWAY.fullmatch(sqlstate) or context.is_disconnect:
        return DatabaseAway(cause, is_session_over=context.is_disconnect)
    return None


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session that commits when the block ends well and else rolls back."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def run_transaction(engine: Engine, work: Callable[[Session], Result]) -> Result:
    """Do `work` in a transaction, commit it and return what `work` did.

    A transaction that the database ended only because of a concurrent one is run again from
    `work`'s first line, up to TRIES times in all: so `work` touches nothing but its session. Raises
    what the last try raised.
    """
    for tried in range(1, TRIES):
        try:
            with transaction(engine) as session:
                return work(session)
        except DBAPIError as error:
            if conflict(error) is None:
                raise
            # At random: two transactions that conflicted would otherwise conflict again.
            time.sleep(random.uniform(0, 0.01 * 2**tried))
    with transaction(engine) as session:
        return work(session)


def conflict(error: BaseException) -> str | None:
    """Name the conflict with a concurrent transaction that raised `error`; another try will do.

    None for any other error.
    """
    if not isinstance(error, DBAPIError):
        return None
    return CONFLICTS.get(getattr(error.orig, "pgcode", None) or "")


def statement_time() -> ScalarSelect[Any]:
    """Return SQL for the database's clock, read once a statement, for use with indexed columns.

    `clock_timestamp()` itself is volatile: Postgres does not search an index with it, but looks at
    every row of a partial index.
    """
    return select(func.clock_timestamp(type_=DateTime(timezone=True))).scalar_subquery()
