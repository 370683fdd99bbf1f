"""Have a worker's name for this process alone, from before its models are loaded.

The row of the name in Postgres is the fence (models/workers.py). A process takes a name that is
free, or whose holder is known to be gone: it is silent for too long, or it was a process of this
machine that does not run any more. So a killed worker that is started again works at once, and two
live ones never share a name.
"""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from edges import processes
from models import workers
from models.database import run_transaction
from models.workers import NameHolder, NewWorker
from policy.workers import WorkerState, WorkerTerms, pause_before_start_s
from tasks.devicetime import DeviceMeter

log = structlog.get_logger(__name__)

RETRY_S = 0.5
LEAVES_WITHIN_S = 180.0  # a holder that has said that it leaves


class NameTaken(Exception):
    """Another live worker has the name; the message tells which, and the way out."""


@dataclass(frozen=True, kw_only=True)
class WorkerIdentity:
    """Describe the worker, as every heartbeat does.

    held, failed: the checkpoints that it serves, and why it does not serve others; None: all.
    loaded: those that are in its device's memory now.
    """

    name: str
    pool: str
    device: str
    slots: int
    facts: dict[str, Any]
    terms: WorkerTerms = field(default_factory=WorkerTerms)
    instance: uuid.UUID = field(default_factory=uuid.uuid4)
    held: tuple[str, ...] | None = None
    loaded: tuple[str, ...] | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    def changed(
        self, *, facts: Mapping[str, Any] | None = None, **changes: Any
    ) -> "WorkerIdentity":
        """Return the same with other fields; `facts` are added, and None takes one away."""
        told = self.facts | dict(facts or {})
        kept = {name: fact for name, fact in told.items() if fact is not None}
        return replace(self, facts=kept, **changes)


class NameClaim:
    """Ask for a name until it is this process's, or another one is seen to live under it."""

    def __init__(
        self, database: Engine, identity: WorkerIdentity, *, silent_after_s: float
    ) -> None:
        self._database = database
        self._silent_after_s = silent_after_s
        self._new = NewWorker(
            name=identity.name,
            pool=identity.pool,
            capacity_class=identity.terms.capacity_class,
            device=identity.device,
            instance=identity.instance,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=processes.process_key(os.getpid()),
        )
        self._first_seen: NameHolder | None = None
        self._waited_s = 0.0

    def attempt(self) -> NameHolder | None:
        """Ask once; return our own row, or None if the holder may be gone: ask again in RETRY_S.

        Raises NameTaken, OperationalError, PoolTimeout.
        """
        holder = self._claim()
        if holder is not None and holder.instance != self._new.instance and _is_gone(holder):
            holder = self._claim(gone=holder.instance)
        if holder is None or holder.instance == self._new.instance:
            return holder
        self._check_it_may_go(holder)
        return None

    def _claim(self, gone: uuid.UUID | None = None) -> NameHolder | None:
        return run_transaction(
            self._database,
            lambda session: workers.claim(
                session, self._new, silent_after_s=self._silent_after_s, gone=gone
            ),
        )

    def _check_it_may_go(self, holder: NameHolder) -> None:
        """Raise NameTaken if the holder is seen to live and has not said that it leaves."""
        if self._first_seen is None or self._first_seen.instance != holder.instance:
            log.info("worker_name_waited_for", worker=self._new.name, pid=holder.pid)
            self._first_seen = holder
        self._waited_s += RETRY_S
        if holder.state == WorkerState.LEAVING and self._waited_s < LEAVES_WITHIN_S:
            return
        is_alive = processes.is_running(holder.process or "")
        if is_alive or holder.seen_at > self._first_seen.seen_at:
            raise NameTaken(
                f"the name {self._new.name!r} is taken by a live worker of pool {holder.pool!r}"
                f" (host {holder.host}, process {holder.pid},"
                f" since {holder.started_at:%Y-%m-%d %H:%M:%S} UTC):"
                " end that one, or give this one another name by WORKER_NAME"
            )


def _is_gone(holder: NameHolder) -> bool:
    return processes.is_gone(holder.process or "")


class Loading:
    """Show in Postgres that a worker loads its models, until it is ready or has failed.

    Loading does not wait for Postgres: while that is away, the worker goes on by itself.
    """

    def __init__(
        self,
        database: Engine,
        identity: WorkerIdentity,
        *,
        ttl_s: float,
        renew_s: float,
        meter: DeviceMeter | None = None,
    ) -> None:
        self.identity = identity
        self._meter = meter
        self._database = database
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._claim = NameClaim(database, identity, silent_after_s=ttl_s)
        self._has_name = threading.Event()
        self._stop = threading.Event()
        self._on_taken: Callable[[str], object] = str
        self._failed_starts = 0
        self._doing = ""
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)

    def start(self, *, on_taken: Callable[[str], object]) -> None:
        """Begin to ask for the name; wait a moment for it, and longer after failed starts.

        on_taken: called with the reason, in another thread, if a live worker has the name.
        """
        self._on_taken = on_taken
        self._thread.start()
        self._has_name.wait(timeout=2 * RETRY_S)
        pause_s = pause_before_start_s(self._failed_starts)
        if pause_s:
            log.warning(
                "worker_start_postponed",
                worker=self.identity.name,
                failed_starts=self._failed_starts,
                wait_s=pause_s,
            )
            self._stop.wait(pause_s)

    def tell(self, doing: str) -> None:
        """Say what is under way; the worker's row shows it from the next heartbeat on."""
        self._doing = doing

    def end(self) -> None:
        """Beat no more: the lease keeper goes on with the row, or the process ends."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self._database.dispose()

    def fail(self, problem: str) -> None:
        """Note why nothing can be loaded; the process is about to end."""
        self.end()
        me = self.identity
        with suppress(SQLAlchemyError):
            run_transaction(
                self._database,
                lambda session: workers.fail(session, me.name, me.instance, problem),
            )
            run_transaction(self._database, self._note_device_time)

    def leave(self) -> None:
        """Give the name up: the process was told to end before it was ready."""
        self.end()
        me = self.identity
        with suppress(SQLAlchemyError):
            run_transaction(self._database, self._note_device_time)
            run_transaction(
                self._database, lambda session: workers.leave(session, me.name, me.instance)
            )

    def _run(self) -> None:
        while not self._stop.is_set():
            wait_s = RETRY_S
            try:
                if self._has_name.is_set():
                    self._beat()
                    wait_s = self._renew_s
                elif (own := self._claim.attempt()) is not None:
                    self._failed_starts = own.failed_starts
                    self._has_name.set()
                    wait_s = self._renew_s
            except NameTaken as error:
                self._on_taken(str(error))
                return
            except (OperationalError, PoolTimeout) as error:
                log.info("worker_waits_for_the_database", reason=type(error).__name__)
            except SQLAlchemyError as error:
                log.warning("loading_not_told", reason=f"{type(error).__name__}: {error}"[:300])
            self._stop.wait(wait_s)

    def _beat(self) -> None:
        if not run_transaction(self._database, self._write_beat):
            raise NameTaken(
                f"the name {self.identity.name!r} was taken by another worker meanwhile"
            )

    def _write_beat(self, session: Session) -> bool:
        """Write all that a heartbeat says; False if the name is another's."""
        me = self.identity
        is_ours = workers.heartbeat(
            session,
            name=me.name,
            pool=me.pool,
            capacity_class=me.terms.capacity_class,
            device=me.device,
            slots=0,
            facts={workers.DOING: self._doing} if self._doing else {},
            silent_after_s=self._ttl_s,
            instance=me.instance,
            state=WorkerState.LOADING,
            held=(),
        )
        if is_ours:
            self._note_device_time(session)
        return is_ours

    def _note_device_time(self, session: Session) -> None:
        if self._meter is not None:
            self._meter.write(session, self.identity)
