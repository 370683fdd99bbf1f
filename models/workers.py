"""Keep a row for every live worker, refreshed with its leases.

A pool's capacity is the sum of its live workers' slots.
"""

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
    """Note that the worker is alive, now by the database's clock.

    silent_after_s: without a heartbeat for so long it counts as gone.
    """
    row = {
        "pool": pool,
        "device": device,
        "slots": slots,
        "facts": facts,
        "seen_at": func.clock_timestamp(),
        "silent_after_s": silent_after_s,
    }
    session.execute(
        insert(Worker)
        .values(name=name, **row)
        .on_conflict_do_update(index_elements=[Worker.name], set_=row)
    )


def leave(session: Session, name: str) -> None:
    """Remove the row of a worker that stops in good order."""
    session.execute(delete(Worker).where(Worker.name == name))


def live(session: Session, *, silent_for_s: float) -> Sequence[Worker]:
    """List the workers heard of in the last `silent_for_s`, by name."""
    fresh = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    return session.scalars(select(Worker).where(Worker.seen_at > fresh).order_by(Worker.name)).all()


class Capacity(NamedTuple):
    """The capacity of a pool's live workers.

    slots: images that they can hold at once.  devices: workers that take jobs; a worker that is
    leaving has no slots any more.
    """

    slots: int
    devices: int


def capacity(session: Session, *, pool: str, silent_for_s: float) -> Capacity:
    """Add up the capacity of the workers heard of in the last `silent_for_s`."""
    fresh = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    columns = (func.coalesce(func.sum(Worker.slots), 0), func.count().filter(Worker.slots > 0))
    query = select(*columns).where(Worker.pool == pool, Worker.seen_at > fresh)
    return Capacity(*session.execute(query).one())


def forget_the_silent(session: Session, *, silent_for_s: float) -> None:
    """Remove rows of workers that died without a last heartbeat."""
    oldest = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    session.execute(delete(Worker).where(Worker.seen_at < oldest))
