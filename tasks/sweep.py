"""The sweeper: finds what fell through. Every promise that a crash can break is kept here, within seconds.

Safe when several run: each row is taken with SKIP LOCKED or a fenced UPDATE, and a sweep that finds another one at work
leaves. Every look goes through a partial index, so a sweep costs what has changed, not what exists.
"""

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.inputs import Inputs
from edges.progress import News
from edges.release import Release
from edges.snapshots import Snapshots, SnapshotsUnavailable
from models import idempotency, jobs, learning, leases, releasing, sweeping, uploads, webhooks, workers
from models.database import is_away, transaction
from models.releasing import Announced
from models.states import JobState
from models.uploads import ORPHAN_AFTER_S
from policy import queues
from policy.fleet import Fleet
from policy.prediction import EtaRatios, learn_ratios
from settings import Settings

log = structlog.get_logger(__name__)

LOST_AFTER_S = 3.0  # an announced job that no worker took this long may have lost its message
MOST_HANDED_OUT = 200  # webhook deliveries at a time
FORGOTTEN_AT_A_TIME = 5000  # rows that are too old
OVERTAKEN_BY_S = 2.0  # or was popped and lost, if the next message in line was announced this much later
MINUTELY_S, HOURLY_S = 60.0, 3600.0
PIECE = 1000  # rows deleted per transaction
_LOCK = 0x5357454550  # "SWEEP"


@dataclass
class Sweeper:
    """One pass every `sweep_every_s`, on the maintenance queue."""

    settings: Settings
    fleet: Fleet
    database: Database
    broker: Broker
    release: Release
    handoff: Handoff
    snapshots: Snapshots
    inputs: Inputs
    news: News
    fill: Callable[[], float]  # of the hand-off
    on_turn: Callable[[], None] = lambda: None  # told of every step of a pass
    _done_at: dict[str, float] = field(default_factory=dict, init=False)
    _lenient_until: float = field(default=-math.inf, init=False)
    _well_at: float = field(default_factory=time.monotonic, init=False)  # when every part was last seen well
    _saw_outage: bool = field(default=False, init=False)  # since then
    _may_judge: bool = field(default=False, init=False)
    _away: set[str] = field(default_factory=set, init=False)  # parts that take nothing, at the last look

    def sweep(self) -> None:
        """One pass over everything. A part that fails does not keep the others from their turn."""
        try:
            with self.database.connect() as lock:
                if lock.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}):
                    self._sweep()
                else:  # whoever sweeps right now looks after all of it
                    self._well_at, self._saw_outage = time.monotonic(), False
        except (OperationalError, PoolTimeout) as error:
            if is_away(error):
                self._note_outage()
            telemetry.AWAY_SECONDS.labels("database").set(time.monotonic() - self._well_at)
            log.warning("sweep_postponed", reason=type(error).__name__)

    def _sweep(self) -> None:
        for part, every_s in self._parts():
            self.on_turn()
            now = time.monotonic()
            is_early = now - self._done_at.get(part.__name__, -math.inf) < every_s
            if is_early or (part == self._leases and now < self._lenient_until):
                continue
            try:
                part()
                self._done_at[part.__name__] = now
            except (SQLAlchemyError, BrokerUnavailable, HandoffUnavailable, SnapshotsUnavailable) as error:
                if is_away(error):
                    self._note_outage()
                log.warning("sweep_part_failed", part=part.__name__, reason=f"{type(error).__name__}: {error}"[:300])
            except Exception as error:  # one row that nobody foresaw must not keep all others from their turn
                log.error("sweep_part_failed", part=part.__name__, exc_info=error)

    def _note_outage(self) -> None:
        """When Postgres is back, workers first get the time to renew: it was not they who were silent."""
        self._saw_outage = True
        self._lenient_until = time.monotonic() + self.settings.lease_renew_s

    def _parts(self) -> Sequence[tuple[Callable[[], None], float]]:
        """What is looked at, and how often at most."""
        return (
            (self._outages, 0),
            (self._leases, 0),
            (self._deadlines, 0),
            (self._stores, 0),
            (self._releases, 0),
            (self._lost_messages, 0),
            (self._webhooks, 0),
            (self._gauges, 0),
            (self._etas, 0),
            (self._orphans, MINUTELY_S),
            (self._tidy, HOURLY_S),
        )

    def _outages(self) -> None:
        """While the broker, the hand-off or Postgres is away no worker is given a job: that does not count against deadlines."""
        now = time.monotonic()
        self._may_judge = False  # deadlines, until those that an outage endangered are moved
        checks = {"broker": self.broker.check, "handoff": self.handoff.check}
        self._away = {part for part, check in checks.items() if not _passes(check)}
        for part in checks:
            telemetry.AWAY_SECONDS.labels(part).set(now - self._well_at if part in self._away else 0)
        telemetry.AWAY_SECONDS.labels("database").set(0)
        self._saw_outage |= bool(self._away)
        if self._saw_outage:
            lasted_s = now - self._well_at
            with transaction(self.database) as session:
                prolonged = sweeping.prolong_deadlines(session, lasted_s=lasted_s)
            telemetry.SWEPT.labels("deadline_prolonged").inc(prolonged)
            told = {"away": sorted(self._away), "lasted_s": round(lasted_s, 1), "prolonged": prolonged}
            log.warning("outage" if self._away else "outage_over", **told)
        if not self._away:
            self._well_at, self._saw_outage = now, False
        self._may_judge = True

    def _leases(self) -> None:
        """Workers that fell silent: their jobs go back, or fail if it was one time too many."""
        with transaction(self.database) as session:
            expired = sweeping.expired_leases(session)
        for job_id in expired:
            with transaction(self.database) as session:
                job = leases.lose(session, job_id, max_attempts=self.settings.max_attempts)
            if job is not None:
                self._count("lease_expired", job_id)
                if job.state == JobState.FAILED:
                    self.news.tell_ending(job_id)

    def _deadlines(self) -> None:
        """Jobs that nothing started in time, and those that were given back and have no time left."""
        if not self._may_judge:
            return
        with transaction(self.database) as session:
            missed, overrun = sweeping.missed_starts(session), sweeping.overruns(session)
        for why, end, job_ids in (("start_deadline", jobs.expire, missed), ("run_deadline", jobs.overrun, overrun)):
            for job_id in job_ids:
                with transaction(self.database) as session:
                    job = end(session, job_id)
                if job is not None:
                    self._count(why, job_id)
                    self.news.tell_ending(job_id)

    def _stores(self) -> None:
        """Rendered jobs that nobody stored: announce them again while their pixels live, render again when they do not.

        A queue never gets more messages than there are jobs to be stored from it, however long nobody takes any.
        """
        with transaction(self.database) as session:
            overdue, storing = sweeping.overdue_stores(session), sweeping.storing_by_tier(session)
        missing: Counter[str] = Counter()  # messages, by queue
        for tier, count in storing.items():
            missing[queues.results_queue(self.fleet, tier)] += count
        for queue in {queues.results_queue(self.fleet, unstored.tier) for unstored in overdue}:
            missing[queue] -= self.broker.waiting(queue)
        for unstored in overdue:
            self.on_turn()
            queue = queues.results_queue(self.fleet, unstored.tier)
            held = {index: self.handoff.holds(unstored.job_id, index, attempt) for index, attempt in unstored.attempt_of.items()}
            gone = [index for index, here in held.items() if not here]
            with transaction(self.database) as session:
                if gone:
                    leases.lose_hand_off(session, unstored.job_id, gone, attempt_of=unstored.attempt_of)
                sweeping.postpone_store(session, unstored.job_id, store_within_s=self.settings.store_within_s)
            if any(held.values()) and missing[queue] > 0:
                missing[queue] -= 1
                self.broker.announce(queues.STORE_IMAGES, queue, unstored.job_id)
            self._count("hand_off_lost" if gone else "store_overdue", unstored.job_id)

    def _releases(self) -> None:
        """Waiting jobs for which there is room: missed at accept, or put back since."""
        if "broker" in self._away:
            return
        for pool in self.fleet.pools:
            for tier in self.fleet.tiers:
                self.on_turn()
                released = self.release.release(pool, tier)
                if released:
                    telemetry.SWEPT.labels("released").inc(released)

    def _lost_messages(self) -> None:
        """Announced jobs whose message the broker lost. Announcing twice is harmless, so a guess is good enough."""
        for pool in self.fleet.pools:
            for tier in self.fleet.tiers:
                self.on_turn()
                lost = self._lost(pool, tier)
                if lost:
                    log.warning("messages_lost", pool=pool, tier=tier, jobs=len(lost))
                    telemetry.SWEPT.labels("message_lost").inc(len(lost))
                    self.release.again(pool, tier, lost)

    def _lost(self, pool: str, tier: str) -> list[uuid.UUID]:
        with transaction(self.database) as session:
            announced = releasing.announced(session, pool=pool, tier=tier, older_than_s=LOST_AFTER_S)
        lost = []
        for is_front in (True, False):
            here = [job for job in announced if job.is_front == is_front]
            if here:
                lost += self._missing(here, queues.render_queue(pool, tier, is_front=is_front))
        return lost

    def _missing(self, announced: Sequence[Announced], queue: str) -> list[uuid.UUID]:
        """Those of one queue's jobs whose message cannot be in it any more."""
        if self.broker.waiting(queue) == 0:
            return [job.job_id for job in announced]
        next_job = self.broker.next_job(queue)
        with transaction(self.database) as session:
            next_at = releasing.announced_at(session, next_job) if next_job else None
        if next_at is None:
            return []  # a message of a job that is over: it will be dropped, and the next one tells more
        return [job.job_id for job in announced if (next_at - job.announced_at).total_seconds() > OVERTAKEN_BY_S]

    def _webhooks(self) -> None:
        """Deliveries that are due and that nobody tries: missed at the job's end, or to be tried again."""
        if self.broker.waiting(queues.WEBHOOKS) > MOST_HANDED_OUT:
            return
        with transaction(self.database) as session:
            due = webhooks.due(session, limit=MOST_HANDED_OUT)
        for delivery_id in due:
            self.broker.ask_to_deliver(delivery_id)

    def _gauges(self) -> None:
        """What the queues look like, for Prometheus."""
        with transaction(self.database) as session:
            rows = session.execute(text("SELECT pool, tier, waiting, announced, running, storing, oldest_wait_s FROM queue_now")).all()
            telemetry.WEBHOOKS_PENDING.set(webhooks.pending(session))
            live = [worker.pool for worker in workers.live(session, silent_for_s=self.settings.lease_ttl_s)]
        telemetry.QUEUE_JOBS.clear()
        telemetry.OLDEST_WAIT.clear()
        for pool, tier, waiting, announced, running, storing, oldest_wait_s in rows:
            for state, count in {"waiting": waiting, "announced": announced, "running": running, "storing": storing}.items():
                telemetry.QUEUE_JOBS.labels(pool, tier, state).set(count)
            telemetry.OLDEST_WAIT.labels(pool, tier).set(oldest_wait_s or 0)
        for pool in self.fleet.pools:
            telemetry.LIVE_WORKERS.labels(pool).set(live.count(pool))
        telemetry.HANDOFF_FILL.set(self.fill())

    def _etas(self) -> None:
        """What ended since the last look teaches how far the gateway's guesses are off."""
        with transaction(self.database) as session:
            for ended in learning.newly_ended(session):
                row = learning.eta_of(session, pool=ended.pool, tier=ended.tier)
                known = EtaRatios(p50=row.ratio_p50, p90=row.ratio_p90) if row is not None else None
                ratios = learn_ratios(known, ended.taken_s / ended.guessed_s, observed=row.observed if row is not None else 0)
                learning.learn_eta(session, ended, ratio_p50=ratios.p50, ratio_p90=ratios.p90)

    def _orphans(self) -> None:
        """Pixels, snapshots and pictures that nobody will read, and objects that nothing names."""
        kept = {(job_id, index, attempt): key for key, job_id, index, attempt in self.handoff.kept()}
        with_snapshots, with_inputs = self.snapshots.jobs(), self.inputs.jobs()
        with transaction(self.database) as session:
            awaited = sweeping.awaited_pixels(session, list({job_id for job_id, _, _ in kept}))
            over = sweeping.finished_of(session, with_snapshots)
            unread = sweeping.not_running_of(session, with_inputs)
            objects = uploads.are_left_behind(session, older_than_s=ORPHAN_AFTER_S)
        orphans = [key for image, key in kept.items() if image not in awaited]
        self.handoff.forget(orphans)
        self.snapshots.drop(over)
        self.inputs.drop(unread)
        telemetry.SWEPT.labels("orphan_pixels").inc(len(orphans))
        telemetry.SWEPT.labels("orphan_snapshots").inc(len(over))
        telemetry.SWEPT.labels("orphan_inputs").inc(len(unread))
        last_queue = queues.results_queue(self.fleet, self.fleet.tiers_by_rank[-1])
        if objects and self.broker.waiting(last_queue) <= MOST_HANDED_OUT:  # else nobody takes anything for now
            self.broker.ask_for(queues.TIDY_STORE, last_queue)

    def _tidy(self) -> None:
        """Partitions of the audit log for the months to come, rows of workers that never signed off, idempotency keys of the day before."""
        with transaction(self.database) as session:
            sweeping.ensure_audit_partitions(session)
            workers.forget_the_silent(session, silent_for_s=HOURLY_S)
        with transaction(self.database) as session:
            webhooks.forget_old(session, limit=FORGOTTEN_AT_A_TIME)
        forgotten = PIECE
        while forgotten == PIECE:
            with transaction(self.database) as session:
                forgotten = idempotency.forget_old(session, limit=PIECE)
            telemetry.SWEPT.labels("idempotency_key").inc(forgotten)

    def _count(self, why: str, job_id: uuid.UUID) -> None:
        telemetry.SWEPT.labels(why).inc()
        log.info("swept", why=why, job_id=str(job_id))


class SweepLoop:
    """Sweeps every so many seconds from a thread of its own. No broker says when: what is due is to be seen also while it is away."""

    def __init__(self, sweep: Callable[[], None], *, every_s: float, on_turn: Callable[[], None]) -> None:
        self._sweep, self._every_s, self._on_turn = sweep, every_s, on_turn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the pass that runs end, and begin no other."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._on_turn()
            try:
                self._sweep()
            except Exception as error:  # nothing may end the one loop that finds what fell through
                log.error("sweep_failed", exc_info=error)
            self._stop.wait(self._every_s)


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
        return True
    except (BrokerUnavailable, HandoffUnavailable) as error:
        log.warning("part_away", reason=str(error)[:300])
        return False
