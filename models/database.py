"""One engine per process, one transaction per `with`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import DateTime, Engine, ScalarSelect, create_engine, func, select
from sqlalchemy.orm import Session

# libpq: a server that is gone without a word (failover, a NAT that forgot us) is an error after some 8 s, not a hang of minutes.
_NOTICES_SILENCE = {"keepalives_idle": 5, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 8000}

AFRESH = {"populate_existing": True}  # execution options of a locking read: it is taken to see what is there now


def make_engine(database_url: str, *, pool_size: int = 5) -> Engine:
    """Connections that are checked before use (a restarted Postgres costs a reconnect, not an error), with a limit on every wait."""
    options = "-c statement_timeout=30000 -c idle_in_transaction_session_timeout=30000 -c lock_timeout=10000"
    return create_engine(
        database_url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_timeout=10,
        connect_args={"options": options, "connect_timeout": 5, "application_name": "darkroom", **_NOTICES_SILENCE},
    )


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """A session that commits when the block ends well and rolls back when it does not."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def now_once() -> ScalarSelect[Any]:
    """The database's clock, read once a statement, to compare an indexed column with.

    `clock_timestamp()` itself is volatile: no index is searched with it, every row that a partial index holds is looked at.
    """
    return select(func.clock_timestamp(type_=DateTime(timezone=True))).scalar_subquery()
