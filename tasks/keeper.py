"""Take leases for a worker's tasks, renew them all in one thread, and notice when one is lost.

Renewal has a thread of its own, because Celery's event loop does not turn during a warm shutdown. A
worker that could not renew for `stop_s` drops its work by itself, before another worker is given
the job.
"""

import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from dispatch.endings import EndedJobs
from edges import telemetry
from models import learning, leases, workers
from models.database import run_transaction, transaction
from models.learning import CostKey, ImageTimings
from models.leases import Lease
from policy import gates
from policy.workers import WorkerState
from tasks.devicetime import DeviceMeter
from tasks.held import HeldLease
from tasks.registration import NameClaim, WorkerIdentity

log = structlog.get_logger(__name__)

RETRY_S = 0.5  # a renewal that failed is not put off until the next beat
# Counted tries, after which a job shares its worker with no other: if it kills it, it kills
# nobody else's.
EXCLUSIVE_FROM = 2


class _NameLost(Exception):
    """The row of the worker's name is another process's."""


def _nothing() -> None:
    """Do nothing."""


class LeaseKeeper:
    """Take leases and renew them; send the worker's heartbeat."""

    def __init__(
        self,
        database: Engine,
        identity: WorkerIdentity,
        *,
        ended: EndedJobs,
        ttl_s: float,
        renew_s: float,
        stop_s: float,
        beats: Engine | None = None,
        meter: DeviceMeter | None = None,
    ) -> None:
        """Keep leases of `ttl_s` seconds, renewed every `renew_s`.

        stop_s: without a renewal for so long, all work is dropped.
        beats: connections for renewals and heartbeats alone, so that no task keeps them waiting;
        None: those of `database`.  meter: of what the worker's time is spent on.
        """
        self._database = database
        self._beats = beats or database
        self._meter = meter
        self.identity = identity  # changed by `describe` alone
        self._ended = ended
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._stop_s = stop_s
        self._held: dict[uuid.UUID, HeldLease] = {}
        # Tasks that know whether they have got the lease, by job.
        self._asked: Counter[uuid.UUID] = Counter()
        self._seen: defaultdict[CostKey, ImageTimings] = defaultdict(ImageTimings)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_due = threading.Event()  # the next heartbeat, before its time
        self._exclusive = threading.Lock()
        self._renewed_at = time.monotonic()
        self._leaving = ""
        self._note_turn: Callable[[], None] = _nothing
        self._claim = NameClaim(self._beats, identity, silent_after_s=ttl_s)
        self._has_name = True
        # Of the fleet that this worker goes by; None: of a file.
        self.revision: int | None = None
        # For which the process is started again at once; until then its row says that it leaves.
        # None: it is not.
        self.returns_for: int | None = None
        # Called when another process has taken the name.
        self.on_name_lost: Callable[[], None] = _nothing
        self._threads = [
            threading.Thread(target=run, name=run.__name__.strip("_"), daemon=True)
            for run in (self._renew, self._watch)
        ]

    def start(self, *, max_attempts: int) -> None:
        """Register this worker and begin to renew.

        Jobs that a predecessor of its name held are put back or fail first. Waits for a database
        that is away, because the models are loaded already, and for the name, if its holder may be
        gone. Raises NameTaken.
        """
        self._note_turn = telemetry.loop("leases")
        while not self._begins(max_attempts):
            self._note_turn()
            self._stop.wait(RETRY_S)
        for thread in self._threads:
            thread.start()

    def describe(self, **changes: Any) -> None:
        """Have the heartbeats to come say this of the worker: see `WorkerIdentity.changed`."""
        with self._lock:  # threads that tell of different things must not undo each other's
            self.identity = self.identity.changed(**changes)

    @property
    def leaving(self) -> str:
        """Say why this worker takes no more jobs; empty while it does."""
        return self._leaving

    def take_no_more(self, reason: str) -> None:
        """Offer no slots from now on, because the worker has to leave."""
        with self._lock:
            self._leaving = reason

    def beat_soon(self) -> None:
        """Have the next heartbeat at once: something that it says has changed."""
        self._is_due.set()

    @contextmanager
    def leased(self, job_id: uuid.UUID) -> Iterator[HeldLease | None]:
        """Hold the job's lease during the block; None if it is finished or another holds it."""
        lease = run_transaction(self._database, partial(self._take, job_id=job_id))
        held = HeldLease(lease) if lease is not None else None
        with self._lock:
            self._asked[job_id] += 1
            if held is not None:
                self._held[job_id] = held
            leaving = self._leaving
        if held is None:
            yield None
            return
        if leaving:  # it was about to take the job when it heard that it has to go
            held.leave(leaving)
        try:
            yield held
        finally:
            with self._lock:
                # If this lease was lost, a later attempt may be here already.
                if self._held.get(job_id) is held:
                    del self._held[job_id]

    @contextmanager
    def exclusive(self, held: HeldLease) -> Iterator[bool]:
        """Keep everything else off this worker for the length of the block.

        The block begins when all else that is here has ended, or when `held` is released meanwhile.
        False, at once, if another job has, or waits to have, the worker to itself.
        """
        if not self._exclusive.acquire(blocking=False):
            yield False
            return
        held.set_exclusive(True)
        try:
            while not held.is_released and len(self.all_held()) > 1:
                time.sleep(0.05)
            yield True
        finally:
            held.set_exclusive(False)
            self._exclusive.release()

    def is_reserved(self, held: HeldLease | None = None) -> bool:
        """Tell whether a job here, other than `held`, has or wants the worker to itself."""
        return any(other.is_exclusive and other is not held for other in self.all_held())

    def drop(self, job_id: uuid.UUID) -> None:
        """Stop working on the job, if it is here: it was canceled."""
        with self._lock:
            held = self._held.get(job_id)
        if held is not None:
            held.lose()

    def learn(self, key: CostKey, *, row_steps: float, denoise_s: float, fixed_s: float) -> None:
        """Note what one image took; the next heartbeat writes it to Postgres."""
        image = ImageTimings(images=1, row_steps=row_steps, denoise_s=denoise_s, fixed_s=fixed_s)
        with self._lock:
            self._seen[key].add(image)

    def end_task(self, job_id: uuid.UUID) -> None:
        """Note that a task ends which asked for the job's lease."""
        with self._lock:
            self._asked[job_id] -= 1
            if self._asked[job_id] <= 0:
                del self._asked[job_id]

    def images_in_hand(self, taken: Mapping[uuid.UUID, tuple[str, int]]) -> Counter[str]:
        """Count by tier the images that this worker has to render, or may be about to.

        Those of the leases it holds, and of the jobs whose message it has taken.
        taken: tier and images of each such job. They count until the lease is here, or refused.
        """
        counts: Counter[str] = Counter()
        # Under one lock, or a job that gets its lease meanwhile might be counted in neither place.
        with self._lock:
            for held in self._held.values():
                counts[held.lease.job.tier] += held.unrendered
            for job_id, (tier, images) in taken.items():
                if job_id not in self._asked:
                    counts[tier] += images
        return counts

    def all_held(self) -> list[HeldLease]:
        """List every lease that is held at this moment."""
        with self._lock:
            return list(self._held.values())

    def close(self) -> None:
        """Stop renewing and sign off; leases still held expire."""
        self._stop.set()
        self._is_due.set()
        telemetry.end_loop("leases")
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)
        with self._lock:  # a thread that did not end in time may still add to it
            seen, self._seen = self._seen, defaultdict(ImageTimings)
        try:
            with transaction(self._database) as session:
                learning.observe(session, seen)
                self._note_device_time(session)
                self._sign_off(session)
        except SQLAlchemyError as error:
            log.info("sign_off_failed", reason=type(error).__name__)

    def _sign_off(self, session: Session) -> None:
        me = self.identity
        if self.returns_for is None:
            workers.leave(session, me.name, me.instance)
        else:
            revision = self.returns_for
            workers.leave_for_a_moment(session, me.name, me.instance, revision=revision)

    def _take(self, session: Session, *, job_id: uuid.UUID) -> Lease | None:
        who = self.identity
        return leases.take(
            session,
            job_id,
            worker=who.name,
            device=who.device,
            ttl_s=self._ttl_s,
            pool=who.pool,
            terms=who.terms,
        )

    def _begins(self, max_attempts: int) -> bool:
        try:
            if self._claim.attempt() is None:
                return False
            self._take_over(max_attempts)
            self._beat()
            return True
        except (OperationalError, PoolTimeout) as error:
            log.warning("worker_waits_for_the_database", reason=type(error).__name__)
            return False

    def _take_over(self, max_attempts: int) -> None:
        """End the leases that a killed predecessor of this name held, before they expire."""
        with transaction(self._database) as session:
            left = leases.running_on(session, self.identity.name)
        for job_id in left:
            lose = partial(
                leases.lose, job_id=job_id, max_attempts=max_attempts, worker=self.identity.name
            )
            job = self._ended.run_ending(self._database, lose)
            if job is not None:
                log.warning("lease_of_predecessor_ended", job_id=str(job_id), state=job.state)

    def _renew(self) -> None:
        wait_s = self._renew_s
        while True:
            self._is_due.wait(wait_s)
            self._is_due.clear()
            if self._stop.is_set():
                return
            wait_s = self._renew_s
            try:
                self._beat()
            except SQLAlchemyError as error:
                wait_s = min(wait_s, RETRY_S)
                log.warning(
                    "renewal_failed",
                    silent_s=round(time.monotonic() - self._renewed_at, 1),
                    reason=type(error).__name__,
                )

    def _watch(self) -> None:
        """Drop all work when nothing was renewed for too long.

        Runs in a thread of its own, because a renewal may hang instead of failing.
        """
        while not self._stop.wait(RETRY_S):
            # Noted here and not in `_renew`: a renewal that hangs is no reason to restart and load
            # the models again; Postgres shows that no heartbeat comes.
            self._note_turn()
            silent_s = time.monotonic() - self._renewed_at
            if gates.must_drop_work(silent_s, stop_s=self._stop_s):
                self._lose([held for held in self.all_held() if not held.is_lost])

    def _beat(self) -> None:
        """Renew everything in one UPDATE and say that this worker is alive."""
        if not self._has_name:
            return
        snapshot = self.all_held()
        with self._lock:
            seen, self._seen = self._seen, defaultdict(ImageTimings)
        started_at = time.monotonic()
        write = partial(self._write_beat, snapshot=snapshot, seen=seen)
        try:
            kept = run_transaction(self._beats, write)
        except _NameLost:
            self._lose_name()
            return
        except (OperationalError, PoolTimeout):
            # Not after other errors: what Postgres refuses would fail every heartbeat to come.
            self._learn_again(seen)
            raise
        self._renewed_at = started_at
        gone = [
            held
            for held in snapshot
            if held.lease.job_id not in kept and held.unrendered and not held.is_lost
        ]
        self._lose(gone)

    def _write_beat(
        self, session: Session, *, snapshot: list[HeldLease], seen: Mapping[CostKey, ImageTimings]
    ) -> set[uuid.UUID]:
        """Write all that a heartbeat says; return the jobs whose leases are still ours.

        Raises _NameLost.
        """
        who = self.identity
        is_ours = workers.heartbeat(
            session,
            name=who.name,
            pool=who.pool,
            capacity_class=who.terms.capacity_class,
            device=who.device,
            slots=gates.offered_slots(who.slots, is_leaving=bool(self.leaving)),
            facts=who.facts,
            silent_after_s=self._ttl_s,
            instance=who.instance,
            state=WorkerState.LEAVING if self.leaving else WorkerState.READY,
            held=who.held,
            loaded=who.loaded,
            failed=who.failed,
            revision=self.revision,
        )
        if not is_ours:
            raise _NameLost
        own = [(held.lease.job_id, held.lease.attempt) for held in snapshot]
        kept = leases.renew(session, own, worker=who.name, ttl_s=self._ttl_s)
        going_on = [held for held in snapshot if held.lease.job_id in kept]
        leases.note_steps(session, _steps_of(going_on))
        leases.note_unfinished(session, _unfinished_s_of(going_on))
        learning.observe(session, seen)
        self._note_device_time(session)
        return kept

    def _note_device_time(self, session: Session) -> None:
        if self._meter is not None:
            self._meter.write(session, self.identity)

    def _lose_name(self) -> None:
        """Give everything up: another process has the name, and has ended our leases by it."""
        log.error("worker_name_lost", worker=self.identity.name, pool=self.identity.pool)
        self._has_name = False
        self.take_no_more("another process has the name of this worker")
        self._lose([held for held in self.all_held() if not held.is_lost])
        self.on_name_lost()

    def _learn_again(self, seen: Mapping[CostKey, ImageTimings]) -> None:
        """Keep for the next heartbeat what was measured before one that failed."""
        with self._lock:
            for key, sums in seen.items():
                self._seen[key].add(sums)

    def _lose(self, gone: list[HeldLease]) -> None:
        for held in gone:
            telemetry.LEASES_LOST.inc()
            log.warning("lease_lost", job_id=str(held.lease.job_id), attempt=held.lease.attempt)
            held.lose()


def _steps_of(going_on: Iterable[HeldLease]) -> dict[tuple[uuid.UUID, int], int]:
    """Tell how far each image is, by job and index."""
    return {
        (held.lease.job_id, index): step
        for held in going_on
        for index, step in held.steps().items()
    }


def _unfinished_s_of(going_on: Iterable[HeldLease]) -> dict[tuple[uuid.UUID, int], float]:
    """Tell the device seconds that are not on record, by job and attempt."""
    return {(held.lease.job_id, held.lease.attempt): held.unfinished_s() for held in going_on}
