"""Who is alive: a row a worker, refreshed with its leases; the pool's capacity is the sum of the live ones' slots."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.tables import Worker


def heartbeat(
    session: Session,
    *,
    name: str,
    pool: str,
    device: str,
    slots: int,
    facts: dict[str, Any],
    silent_after_s: float = 15.0,
) -> None:
    """Say that the worker is alive, now by the database's clock, and that it is gone when nothing is heard for `silent_after_s`."""
    row = {
        "pool": pool,
        "device": device,
        "slots": slots,
        "facts": facts,
        "seen_at": func.clock_timestamp(),
    }
    row |= {"silent_after_s": silent_after_s}
    session.execute(
        insert(Worker)
        .values(name=name, **row)
        .on_conflict_do_update(index_elements=[Worker.name], set_=row)
    )


def leave(session: Session, name: str) -> None:
    """The worker stops in good order."""
    session.execute(delete(Worker).where(Worker.name == name))


def live(session: Session, *, silent_for_s: float) -> Sequence[Worker]:
    """Workers heard of in the last `silent_for_s`."""
    fresh = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    return session.scalars(select(Worker).where(Worker.seen_at > fresh).order_by(Worker.name)).all()


class Capacity(NamedTuple):
    """Images that a pool's live workers can hold at once, and how many of them take jobs: one that is leaving has no slots any more."""

    slots: int
    devices: int


def capacity(session: Session, *, pool: str, silent_for_s: float) -> Capacity:
    """What the workers heard of in the last `silent_for_s` can do."""
    fresh = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    columns = func.coalesce(func.sum(Worker.slots), 0), func.count().filter(Worker.slots > 0)
    return Capacity(
        *session.execute(select(*columns).where(Worker.pool == pool, Worker.seen_at > fresh)).one()
    )


def forget_the_silent(session: Session, *, silent_for_s: float) -> None:
    """Remove rows of workers that died without a word."""
    session.execute(
        delete(Worker).where(
            Worker.seen_at < func.clock_timestamp() - timedelta(seconds=silent_for_s)
        )
    )
