"""The worker's leases: taken for a task, renewed by one thread for all of them, and known to be lost in time.

Renewal has a thread of its own, for Celery's event loop stands still in a drain. A worker that could not renew for
`stop_s` drops its work by itself, before anyone else is given the job.
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from edges import telemetry
from models import leases, workers
from models.database import transaction
from models.leases import Lease

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerIdentity:
    """What the worker says of itself with every heartbeat."""

    name: str
    pool: str
    device: str
    slots: int
    facts: dict[str, Any]


@dataclass
class Held:
    """A lease in this worker's hands."""

    lease: Lease
    unrendered: int
    lost: threading.Event = field(default_factory=threading.Event)
    on_lost: Callable[[], None] = lambda: None

    def lose(self) -> None:
        """Let go: the job is somebody else's, or nobody's any more."""
        if not self.lost.is_set():
            self.lost.set()
            self.on_lost()

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` once the lease is lost; at once if it is."""
        self.on_lost = act
        if self.lost.is_set():
            act()


class LeaseKeeper:
    """Takes leases and keeps them; also the worker's heartbeat."""

    def __init__(self, database: Engine, identity: WorkerIdentity, *, ttl_s: float, renew_s: float, stop_s: float) -> None:
        self._database, self.identity = database, identity
        self._ttl_s, self._renew_s, self._stop_s = ttl_s, renew_s, stop_s
        self._held: dict[uuid.UUID, Held] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._renewed_at = time.monotonic()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    @contextmanager
    def leased(self, job_id: uuid.UUID) -> Iterator[Held | None]:
        """The job, kept for the length of the block; None if it is finished or someone else holds it."""
        with transaction(self._database) as session:
            lease = leases.take(session, job_id, worker=self.identity.name, device=self.identity.device, ttl_s=self._ttl_s)
        if lease is None:
            yield None
            return
        held = Held(lease, unrendered=len(lease.pending))
        with self._lock:
            self._held[job_id] = held
        try:
            yield held
        finally:
            with self._lock:
                del self._held[job_id]

    def drop(self, job_id: uuid.UUID) -> None:
        """Stop working on the job, if it is here: it was canceled."""
        with self._lock:
            held = self._held.get(job_id)
        if held is not None:
            held.lose()

    def images_held(self) -> Counter[str]:
        """Unrendered images in hand, by tier."""
        with self._lock:
            counts: Counter[str] = Counter()
            for held in self._held.values():
                counts[held.lease.job.tier] += held.unrendered
            return counts

    def jobs_held(self) -> Counter[str]:
        """Jobs in hand, by tier."""
        with self._lock:
            return Counter(held.lease.job.tier for held in self._held.values())

    def close(self) -> None:
        """Stop renewing and sign off; leases still held run out."""
        self._stop.set()
        self._thread.join(timeout=10)
        try:
            with transaction(self._database) as session:
                workers.leave(session, self.identity.name)
        except SQLAlchemyError as error:
            log.info("sign_off_failed", reason=type(error).__name__)

    def _run(self) -> None:
        while not self._stop.wait(self._renew_s):
            try:
                self._beat()
            except SQLAlchemyError as error:
                silent_s = time.monotonic() - self._renewed_at
                log.warning("renewal_failed", silent_s=round(silent_s, 1), reason=type(error).__name__)
                if silent_s > self._stop_s:
                    self._lose([held for held in self._snapshot() if not held.lost.is_set()])

    def _beat(self) -> None:
        """Renew everything in one UPDATE and say that this worker is alive."""
        snapshot = self._snapshot()
        started_at = time.monotonic()
        with transaction(self._database) as session:
            kept = leases.renew(session, [(held.lease.job_id, held.lease.attempt) for held in snapshot], ttl_s=self._ttl_s)
            who = self.identity
            workers.heartbeat(session, name=who.name, pool=who.pool, device=who.device, slots=who.slots, facts=who.facts)
        self._renewed_at = started_at
        gone = [held for held in snapshot if held.lease.job_id not in kept and held.unrendered and not held.lost.is_set()]
        self._lose(gone)

    def _lose(self, gone: list[Held]) -> None:
        for held in gone:
            telemetry.LEASES_LOST.inc()
            log.warning("lease_lost", job_id=str(held.lease.job_id), attempt=held.lease.attempt)
            held.lose()

    def _snapshot(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())
