"""The sweeper: finds what fell through. Every promise that a crash can break is kept here, within seconds.

Safe when several run: each row is taken with SKIP LOCKED or a fenced UPDATE, and a sweep that finds another one at work
leaves. Every look goes through a partial index, so a sweep costs what has changed, not what exists.
"""

import time
import uuid
from dataclasses import dataclass, field

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.progress import News
from edges.release import Release
from models import jobs, leases, releasing, sweeping, workers
from models.database import transaction
from models.states import JobState
from policy import queues
from policy.fleet import Fleet
from settings import Settings

log = structlog.get_logger(__name__)

LOST_AFTER_S = 3.0  # an announced job that no worker took this long may have lost its message
OVERTAKEN_BY_S = 2.0  # or was popped and lost, if the next message in line was announced this much later
HOURLY_S = 3600.0
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
    news: News
    _tidied_at: float | None = field(default=None, init=False)

    def sweep(self) -> None:
        """One pass over everything. A part that fails does not keep the others from their turn."""
        with self.database.connect() as lock:
            if not lock.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}):
                return
            parts = (self._leases, self._deadlines, self._stores, self._releases, self._lost_messages, self._gauges, self._tidy)
            for part in parts:
                try:
                    part()
                except (SQLAlchemyError, BrokerUnavailable, HandoffUnavailable) as error:
                    log.warning("sweep_part_failed", part=part.__name__, reason=f"{type(error).__name__}: {error}"[:300])

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
        """Jobs that nothing started in time."""
        with transaction(self.database) as session:
            missed = sweeping.missed_starts(session)
        for job_id in missed:
            with transaction(self.database) as session:
                job = jobs.expire(session, job_id)
            if job is not None:
                self._count("start_deadline", job_id)
                self.news.tell_ending(job_id)

    def _stores(self) -> None:
        """Rendered jobs that nobody stored: announce them again while their pixels live, render again when they do not."""
        with transaction(self.database) as session:
            overdue = sweeping.overdue_stores(session)
        for unstored in overdue:
            held = {index: self.handoff.holds(unstored.job_id, index, attempt) for index, attempt in unstored.attempt_of.items()}
            gone = [index for index, here in held.items() if not here]
            with transaction(self.database) as session:
                if gone:
                    leases.lose_hand_off(session, unstored.job_id, gone, attempt_of=unstored.attempt_of)
                sweeping.postpone_store(session, unstored.job_id, store_within_s=self.settings.store_within_s)
            if any(held.values()):
                self.broker.announce(queues.STORE_IMAGES, queues.results_queue(unstored.tier), unstored.job_id)
            self._count("hand_off_lost" if gone else "store_overdue", unstored.job_id)

    def _releases(self) -> None:
        """Waiting jobs for which there is room: missed at accept, or put back since."""
        for pool in self.fleet.pools:
            for tier in self.fleet.tiers:
                released = self.release.release(pool, tier)
                if released:
                    telemetry.SWEPT.labels("released").inc(released)

    def _lost_messages(self) -> None:
        """Announced jobs whose message the broker lost. Announcing twice is harmless, so a guess is good enough."""
        for pool in self.fleet.pools:
            for tier in self.fleet.tiers:
                lost = self._lost(pool, tier)
                if lost:
                    log.warning("messages_lost", pool=pool, tier=tier, jobs=len(lost))
                    telemetry.SWEPT.labels("message_lost").inc(len(lost))
                    self.release.again(pool, tier, lost)

    def _lost(self, pool: str, tier: str) -> list[uuid.UUID]:
        with transaction(self.database) as session:
            announced = releasing.announced(session, pool=pool, tier=tier, older_than_s=LOST_AFTER_S)
        if not announced:
            return []
        queue = queues.render_queue(pool, tier)
        if self.broker.waiting(queue) == 0:
            return [job.job_id for job in announced]
        next_job = self.broker.next_job(queue)
        with transaction(self.database) as session:
            next_at = releasing.announced_at(session, next_job) if next_job else None
        if next_at is None:
            return []  # a message of a job that is over: it will be dropped, and the next one tells more
        return [job.job_id for job in announced if (next_at - job.announced_at).total_seconds() > OVERTAKEN_BY_S]

    def _gauges(self) -> None:
        """What the queues look like, for Prometheus."""
        with transaction(self.database) as session:
            rows = session.execute(text("SELECT pool, tier, waiting, announced, running, storing, oldest_wait_s FROM queue_now")).all()
            live = [worker.pool for worker in workers.live(session, silent_for_s=self.settings.lease_ttl_s)]
        telemetry.QUEUE_JOBS.clear()
        telemetry.OLDEST_WAIT.clear()
        for pool, tier, waiting, announced, running, storing, oldest_wait_s in rows:
            for state, count in {"waiting": waiting, "announced": announced, "running": running, "storing": storing}.items():
                telemetry.QUEUE_JOBS.labels(pool, tier, state).set(count)
            telemetry.OLDEST_WAIT.labels(pool, tier).set(oldest_wait_s or 0)
        for pool in self.fleet.pools:
            telemetry.LIVE_WORKERS.labels(pool).set(live.count(pool))

    def _tidy(self) -> None:
        """Once an hour: partitions of the audit log for the months to come, and rows of workers that never signed off."""
        if self._tidied_at is not None and time.monotonic() - self._tidied_at < HOURLY_S:
            return
        with transaction(self.database) as session:
            sweeping.ensure_audit_partitions(session)
            workers.forget_the_silent(session, silent_for_s=HOURLY_S)
        self._tidied_at = time.monotonic()

    def _count(self, why: str, job_id: uuid.UUID) -> None:
        telemetry.SWEPT.labels(why).inc()
        log.info("swept", why=why, job_id=str(job_id))
