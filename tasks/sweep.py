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
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dispatch.endings import EndedJobs, lose_hand_off
from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.inputs import Inputs
from edges.snapshots import Snapshots, SnapshotsUnavailable
from models import (
    erasing,
    idempotency,
    inputs,
    jobs,
    learning,
    leases,
    releasing,
    sweeping,
    uploads,
    webhooks,
    workers,
)
from models.database import is_away, run_transaction, transaction
from models.releasing import Announced
from models.sweeping import Unstored
from models.uploads import ORPHAN_AFTER_S
from policy import gates, queues
from policy.fleet import Fleet
from policy.prediction import EtaRatios, learn_ratios
from policy.states import FINAL_STATES
from policy.webhooks import GIVE_UP_AFTER_S
from settings import Settings

log = structlog.get_logger(__name__)

LOST_AFTER_S = 3.0  # an announced job that no worker took this long may have lost its message
ENDPOINTS_AT_A_TIME = 200  # with deliveries pending, looked at in one sweep
MINUTELY_S, HOURLY_S = 60.0, 3600.0
AGAIN_AFTER_S = 15.0  # what comes every minute or hour and fails; not at the next sweep, for it may have made others wait
PIECE = 1000  # rows deleted per transaction
LOOKED_AT = 2000  # jobs at a time whose content may be too old
AT_MOST_S = 1.0  # that one part deletes for; leases and deadlines must not wait for it
_LOCK = 0x5357454550  # "SWEEP"


@dataclass
class Sweeper:
    """One pass every `sweep_every_s`; `SweepLoop` says when."""

    settings: Settings
    fleet: Fleet
    database: Database
    broker: Broker
    release: Release
    handoff: Handoff
    snapshots: Snapshots
    inputs: Inputs
    ended: EndedJobs
    fill: Callable[[], float]  # of the hand-off
    on_turn: Callable[[], None] = lambda: None  # told of every step of a pass
    _in_pass: threading.Lock = field(default_factory=threading.Lock, init=False)
    _due_at: dict[str, float] = field(default_factory=dict, init=False)
    _erased_upto: dict[str, uuid.UUID] = field(default_factory=dict, init=False)  # by tier
    _outage_noted_at: float | None = field(default=None, init=False)  # of Postgres, the last one
    _endpoints_after: uuid.UUID | None = field(default=None, init=False)
    _well_at: float = field(
        default_factory=time.monotonic, init=False
    )  # when every part was last seen well
    _saw_outage: bool = field(default=False, init=False)  # since then
    _may_judge: bool = field(default=False, init=False)
    _away: set[str] = field(
        default_factory=set, init=False
    )  # parts that take nothing, at the last look

    def sweep(self) -> None:
        """Do one pass over everything; nothing if this process is in one. A part that fails does not keep the others from their turn."""
        if not self._in_pass.acquire(
            blocking=False
        ):  # or what the pass under way knows of an outage would be forgotten
            return
        try:
            self._sweep_unless_another_does()
        finally:
            self._in_pass.release()

    def _sweep_unless_another_does(self) -> None:
        try:
            with self.database.connect() as lock:
                lock.execute(
                    text("SET LOCAL idle_in_transaction_session_timeout = 0")
                )  # it is idle for as long as a pass takes
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
            is_early = now < self._due_at.get(part.__name__, -math.inf)
            if is_early or (part == self._leases and not self._may_end_leases(now)):
                continue
            self._due_at[part.__name__] = now + min(every_s, AGAIN_AFTER_S)
            try:
                is_done = part() is not False
                self._due_at[part.__name__] = now + every_s if is_done else now
            except (
                SQLAlchemyError,
                BrokerUnavailable,
                HandoffUnavailable,
                SnapshotsUnavailable,
            ) as error:
                if is_away(error):
                    self._note_outage()
                log.warning(
                    "sweep_part_failed",
                    part=part.__name__,
                    reason=f"{type(error).__name__}: {error}"[:300],
                )
            except (
                Exception
            ) as error:  # one row that nobody foresaw must not keep all others from their turn
                log.error("sweep_part_failed", part=part.__name__, exc_info=error)

    def _note_outage(self) -> None:
        """Remember when Postgres was away, for leases and deadlines are judged by what it lasted."""
        self._saw_outage = True
        self._outage_noted_at = time.monotonic()

    def _may_end_leases(self, now: float) -> bool:
        renew_s = self.settings.lease_renew_s
        return gates.may_end_leases(now, outage_noted_at=self._outage_noted_at, renew_s=renew_s)

    def _parts(self) -> Sequence[tuple[Callable[[], bool | None], float]]:
        """What is looked at, and how often at most; one that returns False has more to do and comes again at the next sweep."""
        return (
            (self._outages, 0),
            (self._leases, 0),
            (self._deadlines, 0),
            (self._stores, 0),
            (self._releases, 0),
            (self._lost_messages, 0),
            (self._late_inputs, 0),
            (self._webhooks, 0),
            (self._gauges, 0),
            (self._etas, 0),
            (self._undeliverable, MINUTELY_S),
            (self._orphans, MINUTELY_S),
            (self._audit_partitions, HOURLY_S),
            (self._retention, HOURLY_S),
            (self._silent_workers, HOURLY_S),
            (self._old_deliveries, HOURLY_S),
            (self._old_idempotency_keys, HOURLY_S),
        )

    def _outages(self) -> None:
        """While the broker, the hand-off or Postgres is away no worker is given a job: that does not count against deadlines."""
        now = time.monotonic()
        self._may_judge = False  # deadlines, until those that an outage endangered are moved
        checks = {"broker": self.broker.check, "handoff": self.handoff.check}
        self._away = {part for part, check in checks.items() if not _passes(check)}
        for part in checks:
            telemetry.AWAY_SECONDS.labels(part).set(
                now - self._well_at if part in self._away else 0
            )
        telemetry.AWAY_SECONDS.labels("database").set(0)
        self._saw_outage |= bool(self._away)
        if self._saw_outage:
            lasted_s = now - self._well_at
            with transaction(self.database) as session:
                prolonged = sweeping.prolong_deadlines(session, lasted_s=lasted_s)
            telemetry.SWEPT.labels("deadline_prolonged").inc(prolonged)
            told = {
                "away": sorted(self._away),
                "lasted_s": round(lasted_s, 1),
                "prolonged": prolonged,
            }
            log.warning("outage" if self._away else "outage_over", **told)
        if not self._away:
            self._well_at, self._saw_outage = now, False
        self._may_judge = True

    def _leases(self) -> None:
        """Workers that fell silent: their jobs go back, or fail if it was one time too many."""
        with transaction(self.database) as session:
            expired = sweeping.expired_leases(session)
        for job_id in expired:
            lose = partial(leases.lose, job_id=job_id, max_attempts=self.settings.max_attempts)
            if self.ended.run_ending(self.database, lose) is not None:
                self._count("lease_expired", job_id)

    def _deadlines(self) -> None:
        """Jobs that nothing started in time, and those that were given back and have no time left."""
        if not self._may_judge:
            return
        with transaction(self.database) as session:
            missed, overrun = sweeping.missed_starts(session), sweeping.overruns(session)
        for why, end, job_ids in (
            ("start_deadline", jobs.expire, missed),
            ("run_deadline", jobs.overrun, overrun),
        ):
            for job_id in job_ids:
                if self.ended.run_ending(self.database, partial(end, job_id=job_id)) is not None:
                    self._count(why, job_id)

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
            held = {
                index: self.handoff.holds(unstored.job_id, index, attempt)
                for index, attempt in unstored.attempt_of.items()
            }
            gone = [index for index, here in held.items() if not here]
            has_ended = bool(gone) and self._loses(unstored, gone)
            postpone = partial(
                sweeping.postpone_store,
                job_id=unstored.job_id,
                store_within_s=self.settings.store_within_s,
            )
            run_transaction(
                self.database, postpone
            )  # nothing where it is to be rendered again, or has ended
            if not has_ended and any(held.values()) and missing[queue] > 0:
                missing[queue] -= 1
                self.broker.announce(queues.STORE_IMAGES, queue, unstored.job_id)
            self._count("hand_off_lost" if gone else "store_overdue", unstored.job_id)

    def _loses(self, unstored: Unstored, gone: Sequence[int]) -> bool:
        """Have these images rendered again; has the job failed by that?"""
        job = lose_hand_off(
            self.database, self.ended, unstored.job_id, gone, attempt_of=unstored.attempt_of
        )
        return job is not None and job.state in FINAL_STATES

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
                    self.release.reannounce(pool, tier, lost)

    def _lost(self, pool: str, tier: str) -> list[uuid.UUID]:
        with transaction(self.database) as session:
            announced = releasing.announced(
                session, pool=pool, tier=tier, older_than_s=LOST_AFTER_S
            )
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

        def was_overtaken(job: Announced) -> bool:
            return gates.was_overtaken(job.announced_at, next_announced_at=next_at)

        return [job.job_id for job in announced if was_overtaken(job)]

    def _late_inputs(self) -> None:
        """Pictures that did not come: ask again, but not while whoever brings them has not looked at what he was asked before."""
        for pool in self.fleet.pools:
            for tier in self.fleet.tiers:
                waiting = self.broker.waiting(queues.results_queue(self.fleet, tier))
                if gates.is_backed_up(waiting):
                    continue
                late_s = gates.inputs_late_after_s(waiting)
                late = self.release.ask_for_inputs_again(pool, tier, asked_before_s=late_s)
                if late:
                    telemetry.SWEPT.labels("inputs_late").inc(late)

    def _webhooks(self) -> None:
        """Deliveries that are due and that nobody tries: missed at the job's end, or to be tried again."""
        if gates.is_backed_up(self.broker.waiting(queues.WEBHOOKS)):
            return
        with transaction(self.database) as session:
            endpoints = webhooks.endpoints_with_pending(
                session, after=self._endpoints_after, limit=ENDPOINTS_AT_A_TIME
            )
            due = webhooks.due(session, endpoints)
        for delivery_id in due:
            self.broker.ask_to_deliver(delivery_id)
        # The next sweep goes on where this one ended, so that no endpoint waits behind those that always have something pending.
        self._endpoints_after = endpoints[-1] if len(endpoints) == ENDPOINTS_AT_A_TIME else None

    def _undeliverable(self) -> bool:
        """Deliveries that are older than anybody tries to deliver one: their endpoint was disabled all the time."""
        return self._forget(
            "webhook_given_up", partial(webhooks.give_up_old, older_than_s=GIVE_UP_AFTER_S)
        )

    def _gauges(self) -> None:
        """What the queues look like, for Prometheus."""
        with transaction(self.database) as session:
            rows = session.execute(
                text(
                    "SELECT pool, tier, waiting, announced, running, storing, oldest_wait_s FROM queue_now"
                )
            ).all()
            telemetry.WEBHOOKS_PENDING.set(webhooks.pending(session))
            live = [
                worker.pool
                for worker in workers.live(session, silent_for_s=self.settings.lease_ttl_s)
            ]
            lacking = inputs.asked_and_lacking(session)
        telemetry.QUEUE_JOBS.clear()
        telemetry.JOBS_LACKING_INPUTS.clear()
        for (pool, tier), jobs_lacking in lacking.items():
            telemetry.JOBS_LACKING_INPUTS.labels(pool, tier).set(jobs_lacking)
        telemetry.OLDEST_WAIT.clear()
        for pool, tier, waiting, announced, running, storing, oldest_wait_s in rows:
            for state, count in {
                "waiting": waiting,
                "announced": announced,
                "running": running,
                "storing": storing,
            }.items():
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
                ratios = learn_ratios(
                    known,
                    ended.taken_s / ended.guessed_s,
                    observed=row.observed if row is not None else 0,
                )
                learning.learn_eta(session, ended, ratio_p50=ratios.p50, ratio_p90=ratios.p90)

    def _orphans(self) -> None:
        """Pixels, snapshots and pictures that nobody will read, and objects that nothing names."""
        kept = {
            (job_id, index, attempt): key for key, job_id, index, attempt in self.handoff.kept()
        }
        with_snapshots, with_inputs = self.snapshots.jobs(), self.inputs.jobs()
        with transaction(self.database) as session:
            awaited = sweeping.awaited_pixels(session, list({job_id for job_id, _, _ in kept}))
            over = sweeping.finished_of(session, with_snapshots)
            unread = sweeping.rendered_of(session, with_inputs)
            objects = uploads.are_left_behind(session, older_than_s=ORPHAN_AFTER_S)
        orphans = [key for image, key in kept.items() if image not in awaited]
        self.handoff.forget(orphans)
        self.snapshots.drop(over)
        self.inputs.drop(unread)
        telemetry.SWEPT.labels("orphan_pixels").inc(len(orphans))
        telemetry.SWEPT.labels("orphan_snapshots").inc(len(over))
        telemetry.SWEPT.labels("orphan_inputs").inc(len(unread))
        last_queue = queues.results_queue(self.fleet, self.fleet.tiers_by_rank[-1])
        if objects and not gates.is_backed_up(self.broker.waiting(last_queue)):
            self.broker.ask_for(queues.TIDY_STORE, last_queue)

    def _audit_partitions(self) -> None:
        """Partitions of the audit log for the months to come."""
        with transaction(self.database) as session:
            months_ahead = sweeping.ensure_audit_partitions(session)
        telemetry.AUDIT_MONTHS_AHEAD.set(months_ahead)
        if months_ahead < sweeping.AUDIT_MONTHS_AHEAD:
            log.warning(
                "audit_partitions_postponed", months_ahead=months_ahead
            )  # somebody reads the log; in an hour they may have ended

    def _retention(self) -> bool:
        """Content of jobs that is older than their tier keeps it; False if there was more than one sweep has time for."""
        ends_at = time.monotonic() + AT_MOST_S
        kept = {
            name: timedelta(days=tier.retention_days)
            for name, tier in self.fleet.tiers.items()
            if tier.retention_days
        }
        return all(self._erase_old(tier, older_than, ends_at) for tier, older_than in kept.items())

    def _erase_old(self, tier: str, older_than: timedelta, ends_at: float) -> bool:
        """Erase as a tenant does. Begins where everything before is erased, as far as this process knows; at its start it looks at all."""
        after = self._erased_upto.get(tier, uuid.UUID(int=0))
        is_all_erased = True
        while True:
            with transaction(self.database) as session:
                some = sweeping.aged(session, older_than=older_than, after=after, limit=LOOKED_AT)
            for job in some:
                if time.monotonic() > ends_at:
                    return False
                if job.tier == tier and job.is_due:
                    with transaction(self.database) as session:
                        erasing.erase(
                            session, job.job_id, tenant_id=job.tenant_id, actor=jobs.SWEEPER
                        )
                    self._count("retention", job.job_id)
                is_all_erased &= (
                    job.tier != tier or job.is_due or job.is_erased
                )  # or its time comes later
                after = job.job_id
                if is_all_erased:
                    self._erased_upto[tier] = after
            if len(some) < LOOKED_AT:
                return True

    def _silent_workers(self) -> None:
        """Rows of workers that never signed off."""
        with transaction(self.database) as session:
            workers.forget_the_silent(session, silent_for_s=HOURLY_S)

    def _old_deliveries(self) -> bool:
        """Webhook deliveries that ended a month ago."""
        return self._forget("webhook_delivery", webhooks.forget_old)

    def _old_idempotency_keys(self) -> bool:
        """Idempotency keys of the day before."""
        return self._forget("idempotency_key", idempotency.forget_old)

    def _forget(self, why: str, forget_old: Callable[..., int]) -> bool:
        """Delete what is too old, a piece per transaction; False if there was more than one sweep has time for."""
        ends_at = time.monotonic() + AT_MOST_S
        while True:
            with transaction(self.database) as session:
                forgotten = forget_old(session, limit=PIECE)
            telemetry.SWEPT.labels(why).inc(forgotten)
            if forgotten < PIECE:
                return True
            if time.monotonic() > ends_at:
                return False

    def _count(self, why: str, job_id: uuid.UUID) -> None:
        telemetry.SWEPT.labels(why).inc()
        log.info("swept", why=why, job_id=str(job_id))


class SweepLoop:
    """Sweeps every so many seconds from a thread of its own. No broker says when: what is due is to be seen also while it is away."""

    def __init__(
        self, sweep: Callable[[], None], *, every_s: float, on_turn: Callable[[], None]
    ) -> None:
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
