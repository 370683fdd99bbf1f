"""Keep a row for every worker from its start on, refreshed with its leases.

A pool's capacity is the sum of its live workers' slots. A name belongs to one process at a time:
every write to the row names the instance that has it, as leases name their attempt.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, any_, case, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.orm import Session

from models.tables import FleetRevision, Job, Worker
from policy.states import JobState
from policy.workers import LIVE, WorkerNow, WorkerState

# Held until the end of the transaction, by whoever of a pool decides to leave.
_ONE_LEAVES = text("SELECT pg_advisory_xact_lock(hashtext('leaves ' || :pool))")
WAITS_FOR = "waits_for"  # of a worker's facts: another one, before it starts anew
DOING = "doing"  # of a worker's facts: what it fetches now
RETURNS_WITHIN = timedelta(seconds=180)  # a worker that starts anew
FAILED_KEPT_FOR = 24  # times the silence after which other rows are removed


@dataclass(frozen=True, kw_only=True)
class NewWorker:
    """A process that starts as the worker `name`.

    process: what tells it from every other process of its host; "": nobody can.
    """

    name: str
    pool: str
    device: str
    instance: uuid.UUID
    host: str = ""
    pid: int = 0
    process: str = ""
    capacity_class: str = ""


@dataclass(frozen=True)
class NameHolder:
    """The process that has a name. failed_starts: of the caller, if it has the name now."""

    instance: uuid.UUID | None
    pool: str
    state: str
    host: str | None
    pid: int | None
    process: str | None
    started_at: datetime
    seen_at: datetime
    failed_starts: int


def claim(
    session: Session,
    new: NewWorker,
    *,
    silent_after_s: float,
    gone: uuid.UUID | None = None,
) -> NameHolder | None:
    """Give the name to this process; return who has it then, None if it vanished just now.

    One statement, so of two that start at once one gets the name. It is free if no row has it,
    since a worker that ends in good order removes its own; or if its holder can load nothing and
    has ended, was silent for longer than it may be, or is `gone`: an instance whose process is
    known not to run any more. Harmless when repeated.
    """
    session.execute(_taking(new, silent_after_s=silent_after_s, gone=gone))
    found = session.execute(
        select(
            Worker.instance,
            Worker.pool,
            Worker.state,
            Worker.host,
            Worker.pid,
            Worker.process,
            Worker.started_at,
            Worker.seen_at,
            Worker.failed_starts,
        ).where(Worker.name == new.name)
    ).one_or_none()
    return None if found is None else NameHolder(*found)


def _taking(new: NewWorker, *, silent_after_s: float, gone: uuid.UUID | None) -> Insert:
    """Write the row of a worker that starts, where the name is free or its own."""
    now = func.clock_timestamp()
    is_own = Worker.instance == new.instance
    silent = func.make_interval(0, 0, 0, 0, 0, 0, Worker.silent_after_s)
    failed_starts = case(
        (is_own, Worker.failed_starts),
        (Worker.state.in_(LIVE), 0),  # the last start came to its end
        else_=Worker.failed_starts + 1,
    )
    values = {
        "pool": new.pool,
        "capacity_class": new.capacity_class,
        "device": new.device,
        "slots": 0,
        "facts": {},
        "state": WorkerState.LOADING,
        "instance": new.instance,
        "host": new.host,
        "pid": new.pid,
        "process": new.process,
        "held": [],
        "loaded": [],
        "failed": {},
        "silent_after_s": silent_after_s,
    }
    since = {
        "started_at": case((is_own, Worker.started_at), else_=now),
        "seen_at": now,
        "starts": case((is_own, Worker.starts), else_=Worker.starts + 1),
        "failed_starts": failed_starts,
    }
    is_failed = Worker.state == WorkerState.FAILED
    is_free = or_(is_own, is_failed, Worker.seen_at < now - silent, Worker.instance == gone)
    statement = insert(Worker).values(name=new.name, **values)
    return statement.on_conflict_do_update(
        index_elements=[Worker.name], set_=values | since, where=is_free
    )


def heartbeat(
    session: Session,
    *,
    name: str,
    pool: str,
    device: str,
    slots: int,
    facts: dict[str, Any],
    silent_after_s: float = 15.0,
    instance: uuid.UUID | None = None,
    state: WorkerState = WorkerState.READY,
    held: Sequence[str] | None = None,
    loaded: Sequence[str] | None = None,
    failed: Mapping[str, str] | None = None,
    revision: int | None = None,
    capacity_class: str = "",
) -> bool:
    """Note that the worker is alive, now by the database's clock; False if its name is another's.

    silent_after_s: without a heartbeat for so long it counts as gone.  instance: of the process, as
    it claimed the name.  held: checkpoints that it serves; None: all of its pool.  loaded: those of
    them in its device's memory; None: all.  failed: why it does not serve others.  revision: of the
    fleet that it goes by; None: of a file.
    """
    row = {
        "pool": pool,
        "capacity_class": capacity_class,
        "device": device,
        "slots": slots,
        "facts": facts,
        "seen_at": func.clock_timestamp(),
        "silent_after_s": silent_after_s,
        "instance": instance,
        "state": state,
        "held": None if held is None else list(held),
        "loaded": None if loaded is None else list(loaded),
        "failed": dict(failed or {}),
        "fleet_revision": revision,
    }
    if state in LIVE:
        row |= {"failed_starts": 0, "problem": None, "left_for_revision": None}
    # An insert, for the row of a worker that was silent for an hour is removed.
    written = session.execute(
        insert(Worker)
        .values(name=name, **row)
        .on_conflict_do_update(index_elements=[Worker.name], set_=row, where=_is(instance))
        .returning(Worker.name)
    )
    return written.one_or_none() is not None


def fail(session: Session, name: str, instance: uuid.UUID, problem: str) -> None:
    """Note why the worker can load nothing, as it ends."""
    session.execute(
        update(Worker)
        .where(Worker.name == name, _is(instance))
        .values(
            state=WorkerState.FAILED,
            slots=0,
            problem=problem,
            seen_at=func.clock_timestamp(),
        )
    )


def leave(session: Session, name: str, instance: uuid.UUID | None = None) -> None:
    """Remove the row of a worker that stops in good order, if it is still its own."""
    session.execute(delete(Worker).where(Worker.name == name, _is(instance)))


def leave_for_a_moment(
    session: Session, name: str, instance: uuid.UUID | None = None, *, revision: int
) -> None:
    """Note that the worker is started again at once: others of its pool wait until it is back.

    revision: of the fleet, for which it starts anew.
    """
    gone = {
        "state": WorkerState.LEAVING,
        "slots": 0,
        "held": [],
        "loaded": [],
        "left_for_revision": revision,
    }
    session.execute(
        update(Worker)
        .where(Worker.name == name, _is(instance))
        .values(**gone, seen_at=func.clock_timestamp())
    )


class WorkerInTheWay(NamedTuple):
    """The worker for which another one of its pool waits before it leaves."""

    name: str
    state: str


def leave_in_turn(session: Session, name: str, pool: str) -> WorkerInTheWay | None:
    """Note that this worker leaves, or return another one of the pool that leaves or loads.

    So that workers of a pool that have to start anew do so one after the other, and none does while
    one that left for the newest revision fails to start under it. One that fails for reasons of its
    own is in nobody's way.
    """
    session.execute(_ONE_LEAVES, {"pool": pool})
    silent = func.make_interval(0, 0, 0, 0, 0, 0, Worker.silent_after_s)
    now = func.clock_timestamp()
    newest = select(func.max(FleetRevision.number)).scalar_subquery()
    others = select(Worker.name, Worker.state).where(
        Worker.pool == pool,
        Worker.name != name,
        or_(
            and_(Worker.state == WorkerState.LOADING, Worker.seen_at > now - silent),
            # Between its last word and the first of its successor torch is imported.
            and_(Worker.state == WorkerState.LEAVING, Worker.seen_at > now - RETURNS_WITHIN),
            and_(Worker.state == WorkerState.FAILED, Worker.left_for_revision == newest),
        ),
    )
    first = session.execute(others.order_by(Worker.name).limit(1)).one_or_none()
    if first is not None:
        return WorkerInTheWay(*first)
    leaving = update(Worker).where(Worker.name == name).values(state=WorkerState.LEAVING, slots=0)
    session.execute(leaving)
    return None


def live(session: Session, *, silent_for_s: float) -> Sequence[Worker]:
    """List the workers that are ready, heard of in the last `silent_for_s`, by name."""
    return session.scalars(
        select(Worker).where(*_is_live(silent_for_s)).order_by(Worker.name)
    ).all()


def now(session: Session, *, silent_for_s: float) -> list[WorkerNow]:
    """List every worker with its state, by name; also those that fail or are silent."""
    is_silent = Worker.seen_at <= func.clock_timestamp() - timedelta(seconds=silent_for_s)
    columns = (
        Worker.name,
        Worker.pool,
        Worker.state,
        is_silent,
        Worker.failed_starts,
        Worker.held,
        Worker.failed,
        Worker.fleet_revision,
    )
    return [WorkerNow(*row) for row in session.execute(select(*columns).order_by(Worker.name))]


def weights_of(session: Session, checkpoint: str, *, silent_for_s: float) -> set[str]:
    """Collect the digests of the files by which live workers serve the checkpoint."""
    digest = Worker.facts["weights"][checkpoint].astext
    query = select(digest).where(digest.is_not(None), *_is_live(silent_for_s)).distinct()
    return {found for found in session.scalars(query) if found}


def loaded_checkpoints(session: Session, *, silent_for_s: float) -> frozenset[str]:
    """Name the checkpoints that are in the memory of a live worker's device."""
    loaded = func.unnest(func.coalesce(Worker.loaded, Worker.held))
    query = select(loaded).where(*_is_live(silent_for_s)).distinct()
    return frozenset(session.scalars(query))


def has_free_holder(
    session: Session, checkpoint: str, *, pool: str, but: str, silent_for_s: float
) -> bool:
    """Tell whether a live worker of the pool has the checkpoint loaded, and slots free.

    but: the name of the one that is not asked for.
    """
    running = select(func.coalesce(func.sum(Job.num_images), 0)).where(
        Job.pool == pool, Job.state == JobState.RUNNING, Job.worker == Worker.name
    )
    holders = select(Worker.name).where(
        Worker.pool == pool,
        Worker.name != but,
        any_(func.coalesce(Worker.loaded, Worker.held)) == checkpoint,
        Worker.slots > running.scalar_subquery(),
        *_is_live(silent_for_s),
    )
    return session.scalar(holders.limit(1)) is not None


class Capacity(NamedTuple):
    """The capacity of a pool's live workers.

    slots: images that they can hold at once.  devices: workers that take jobs; a worker that is
    leaving has no slots any more.  held: the checkpoints that one of them serves at least; None:
    all of the pool.  slots_by_class: slots, by capacity class.
    """

    slots: int
    devices: int
    held: frozenset[str] | None = None
    slots_by_class: Mapping[str, int] = MappingProxyType({})


def capacity(session: Session, *, pool: str, silent_for_s: float) -> Capacity:
    """Add up the capacity of the workers heard of in the last `silent_for_s`."""
    columns = (
        Worker.capacity_class,
        func.sum(Worker.slots),
        func.count(),
        func.bool_or(Worker.held.is_(None)),
        # As a rule all hold the same, and this is one line.
        func.string_agg(func.array_to_string(Worker.held, " ").distinct(), "\n"),
    )
    takes_jobs = (Worker.pool == pool, Worker.slots > 0, *_is_live(silent_for_s))
    by_class = session.execute(
        select(*columns).where(*takes_jobs).group_by(Worker.capacity_class)
    ).all()
    slots = {name: slots for name, slots, _, _, _ in by_class}
    holds_all = any(holds_all for _, _, _, holds_all, _ in by_class) or not by_class
    held = frozenset(name for *_, names in by_class for name in (names or "").split())
    devices = sum(devices for _, _, devices, _, _ in by_class)
    return Capacity(sum(slots.values()), devices, None if holds_all else held, slots)


def forget_the_silent(session: Session, *, silent_for_s: float) -> None:
    """Remove rows of workers that died without a last heartbeat.

    Those that can load nothing keep theirs for a day, for somebody to read why.
    """
    oldest = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    oldest_failed = func.clock_timestamp() - FAILED_KEPT_FOR * timedelta(seconds=silent_for_s)
    is_old = case(
        (Worker.state == WorkerState.FAILED, Worker.seen_at < oldest_failed),
        else_=Worker.seen_at < oldest,
    )
    session.execute(delete(Worker).where(is_old))


def _is(instance: uuid.UUID | None) -> ColumnElement[bool]:
    return Worker.instance.is_not_distinct_from(instance)


def _is_live(silent_for_s: float) -> tuple[ColumnElement[bool], ...]:
    fresh = func.clock_timestamp() - timedelta(seconds=silent_for_s)
    return Worker.state.in_(LIVE), Worker.seen_at > fresh
