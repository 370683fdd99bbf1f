"""Sweep: find and repair, within seconds, what a crash left undone.

Safe when several run: each row is taken with SKIP LOCKED or a fenced UPDATE, and a sweep that finds
another one running returns. Every query uses a partial index, so a sweep costs what has changed,
not what exists.
"""

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy import Row, text
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
    budgets,
    erasing,
    flows,
    idempotency,
    inputs,
    jobs,
    learning,
    leases,
    objectives,
    quarantine,
    releasing,
    revisions,
    sweeping,
    uploads,
    webhooks,
    workers,
)
from models.database import is_away, run_transaction, transaction
from models.learning import SucceededJob
from models.releasing import Announced
from models.sweeping import OldJob, OverdueStore
from models.uploads import ORPHAN_AFTER_S
from policy import gates, queues
from policy.current import UNNUMBERED, CurrentFleet
from policy.fleet import Fleet
from policy.prediction import EtaRatios, learn_ratios
from policy.revisions import Decision, Fate, QueuedKind, decide
from policy.states import FINAL_STATES
from policy.webhooks import GIVE_UP_AFTER_S
from policy.workers import WorkerNow, keeps_failing
from settings import Settings

log = structlog.get_logger(__name__)

LOST_AFTER_S = 3.0  # an announced job that no worker took this long may have lost its message
ENDPOINTS_AT_A_TIME = 200  # with deliveries pending, looked at in one sweep
OBJECTIVES_S = 15.0
MINUTELY_S = 60.0
HOURLY_S = 3600.0
# For parts that run every minute or hour and fail. Not at the next sweep: it may delay the others.
AGAIN_AFTER_S = 15.0
FOLLOWED_AFTER_S = 5.0  # by every process, from when this one has a new revision of the fleet
SETTLED_AT_ONCE = 100  # jobs that a revision has nothing for, each a transaction
PIECE = 1000  # rows deleted per transaction
LOOKED_AT = 2000  # jobs per query whose content may be too old
AT_MOST_S = 1.0  # for deleting, per part; leases and deadlines must not wait for it
_LOCK = 0x5357454550  # "SWEEP"
_QUEUE_NOW = text(
    "SELECT pool, tier, waiting, announced, running, storing, oldest_wait_s FROM queue_now"
)


@dataclass(frozen=True)
class _Settled:
    """The revision whose changes were looked at: when first, and whether a second time."""

    number: int = UNNUMBERED
    at: float = 0.0
    is_done: bool = False


@dataclass
class Sweeper:
    """Do one pass over all that may need repair; `SweepLoop` calls it every `sweep_every_s`."""

    settings: Settings
    current: CurrentFleet
    database: Database
    broker: Broker
    release: Release
    handoff: Handoff
    snapshots: Snapshots
    inputs: Inputs
    ended: EndedJobs
    fill: Callable[[], float]  # of the hand-off
    on_turn: Callable[[], None] = lambda: None  # called at every step of a pass
    _in_pass: threading.Lock = field(default_factory=threading.Lock, init=False)
    _due_at: dict[str, float] = field(default_factory=dict, init=False)
    _erased_upto: dict[str, uuid.UUID] = field(default_factory=dict, init=False)  # by tier
    _outage_noted_at: float | None = field(default=None, init=False)  # of Postgres, the last one
    _endpoints_after: uuid.UUID | None = field(default=None, init=False)
    # When every part was last seen well, and whether there was an outage since then.
    _well_at: float = field(default_factory=time.monotonic, init=False)
    _saw_outage: bool = field(default=False, init=False)
    _may_judge: bool = field(default=False, init=False)
    # Parts that refused a write when they were last checked.
    _away: set[str] = field(default_factory=set, init=False)
    _settled: "_Settled" = field(default_factory=lambda: _Settled(), init=False)

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that runs now."""
        return self.current.fleet

    def sweep(self) -> None:
        """Do one pass over all parts; nothing if one runs in this process.

        A part that fails does not keep the others from running.
        """
        # A second pass would overwrite what the first one knows of an outage.
        if not self._in_pass.acquire(blocking=False):
            return
        try:
            self._sweep_unless_another_does()
        finally:
            self._in_pass.release()

    def _sweep_unless_another_does(self) -> None:
        try:
            with self.database.connect() as lock:
                # This transaction is idle for as long as a pass takes.
                lock.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                if lock.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}):
                    self._sweep()
                else:  # the process that sweeps right now also handles outages
                    self._well_at = time.monotonic()
                    self._saw_outage = False
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
            is_done = self._run_part(part)
            if is_done is not None:
                self._due_at[part.__name__] = now + every_s if is_done else now

    def _run_part(self, part: Callable[[], bool | None]) -> bool | None:
        """Tell whether the part has done all there was for it; None when it failed."""
        try:
            return part() is not False
        except (
            SQLAlchemyError,
            BrokerUnavailable,
            HandoffUnavailable,
            SnapshotsUnavailable,
        ) as error:
            if is_away(error):
                self._note_outage()
            reason = f"{type(error).__name__}: {error}"[:300]
            log.warning("sweep_part_failed", part=part.__name__, reason=reason)
        except Exception as error:  # one unforeseen row must not stop the other parts
            log.error("sweep_part_failed", part=part.__name__, exc_info=error)
        return None

    def _note_outage(self) -> None:
        """Remember when Postgres was away: leases and deadlines are judged by how long that was."""
        self._saw_outage = True
        self._outage_noted_at = time.monotonic()

    def _may_end_leases(self, now: float) -> bool:
        renew_s = self.settings.lease_renew_s
        return gates.may_end_leases(now, outage_noted_at=self._outage_noted_at, renew_s=renew_s)

    def _parts(self) -> Sequence[tuple[Callable[[], bool | None], float]]:
        """List the parts of a pass, each with the seconds between two runs of it.

        A part that returns False has more to do and runs again at the next sweep.
        """
        return (
            (self._outages, 0),
            (self._leases, 0),
            (self._fleet_changes, 0),
            (self._deadlines, 0),
            (self._stores, 0),
            (self._overflows, 0),
            (self._releases, 0),
            (self._lost_messages, 0),
            (self._late_inputs, 0),
            (self._webhooks, 0),
            (self._gauges, 0),
            (self._etas, 0),
            (self._undeliverable, MINUTELY_S),
            (self._budgets, MINUTELY_S),
            (self._objectives, OBJECTIVES_S),
            (self._orphans, MINUTELY_S),
            (self._audit_partitions, HOURLY_S),
            (self._retention, HOURLY_S),
            (self._silent_workers, HOURLY_S),
            (self._old_deliveries, HOURLY_S),
            (self._old_idempotency_keys, HOURLY_S),
            (self._old_objectives, HOURLY_S),
        )

    def _outages(self) -> None:
        """Check broker and hand-off, and prolong deadlines by the length of an outage.

        While one of them or Postgres is away, no worker gets a job.
        """
        now = time.monotonic()
        self._may_judge = False  # deadlines, until those that an outage endangered are moved
        checks = {"broker": self.broker.check, "handoff": self.handoff.check}
        self._away = {part for part, check in checks.items() if not _passes(check)}
        for part in checks:
            away_s = now - self._well_at if part in self._away else 0
            telemetry.AWAY_SECONDS.labels(part).set(away_s)
        telemetry.AWAY_SECONDS.labels("database").set(0)
        self._saw_outage |= bool(self._away)
        if self._saw_outage:
            self._prolong_deadlines(now - self._well_at)
        if not self._away:
            self._well_at = now
            self._saw_outage = False
        self._may_judge = True

    def _prolong_deadlines(self, lasted_s: float) -> None:
        """Move the deadlines that an outage endangers, which has lasted for so long."""
        with transaction(self.database) as session:
            prolonged = sweeping.prolong_deadlines(session, lasted_s=lasted_s)
        telemetry.SWEPT.labels("deadline_prolonged").inc(prolonged)
        log.warning(
            "outage" if self._away else "outage_over",
            away=sorted(self._away),
            lasted_s=round(lasted_s, 1),
            prolonged=prolonged,
        )

    def _leases(self) -> None:
        """End expired leases: their jobs go back, or fail after the last allowed attempt."""
        with transaction(self.database) as session:
            expired = sweeping.expired_leases(session)
        for job_id in expired:
            lose = partial(leases.lose, job_id=job_id, max_attempts=self.settings.max_attempts)
            if self.ended.run_ending(self.database, lose) is not None:
                self._count("lease_expired", job_id)

    def _fleet_changes(self) -> bool:
        """Move or fail the queued jobs of which a new revision lacks something.

        Looks at the queue after each change, once more when every gateway has followed it, and
        whenever jobs wait in a pool that is gone: a worker that leaves puts its own back late.
        Decides nothing by a revision that is not in force. Returns whether all is decided.
        """
        now = time.monotonic()
        number = self.current.number
        if self._is_behind():
            return True
        settled = self._settled
        if number != settled.number:
            settled = _Settled(number, now)
        elif not settled.is_done and now >= settled.at + FOLLOWED_AFTER_S:
            settled = replace(settled, is_done=True)
        elif not self._has_jobs_in_lost_pools():
            return True
        if not self._settle_all(until=now + AT_MOST_S):
            return False
        self._settled = settled  # only now: what failed is done again at the next pass
        return True

    def _is_behind(self) -> bool:
        if not self.settings.follow_revisions:
            return False
        with transaction(self.database) as session:
            return revisions.newest_number(session) > self.current.number

    def _has_jobs_in_lost_pools(self) -> bool:
        with transaction(self.database) as session:
            queued = {pool for pool, _ in flows.with_queued_jobs(session)}
            lost = queued - self.fleet.pools.keys()
            return bool(lost) and revisions.has_queued_in(session, lost)

    def _settle_all(self, *, until: float) -> bool:
        """Decide on queued jobs by the fleet that runs now; tell whether all were looked at."""
        with transaction(self.database) as session:
            kinds = revisions.queued_kinds(session)
        for kind in kinds:
            decision = decide(kind, self.fleet)
            is_to_change = decision.fate is not Fate.STAYS
            if is_to_change and not self._settle(kind, decision, until=until):
                return False
        return True

    def _settle(self, kind: QueuedKind, decision: Decision, *, until: float) -> bool:
        """Move or fail the queued jobs of this kind; False: there are more."""
        while time.monotonic() < until:
            self.on_turn()
            with transaction(self.database) as session:
                job_ids = revisions.queued_of(session, kind, most=SETTLED_AT_ONCE)
            settled = [job_id for job_id in job_ids if self._settle_job(job_id, decision)]
            if not settled:
                return True
            log.warning(
                "fleet_lost",
                pool=kind.pool,
                model=kind.model,
                moved_to=decision.pool if decision.code is None else None,
                code=decision.code,
                jobs=len(settled),
            )
        return False

    def _settle_job(self, job_id: uuid.UUID, decision: Decision) -> bool:
        if decision.code is not None:
            code, detail = decision.code, decision.detail
            change = partial(jobs.fail_gone, job_id=job_id, code=code, detail=detail)
        else:
            change = partial(jobs.move, job_id=job_id, pool=decision.pool)
        return self.ended.run_ending(self.database, change) is not None

    def _deadlines(self) -> None:
        """End jobs past their start deadline, and waiting jobs past their run deadline."""
        if not self._may_judge:
            return
        with transaction(self.database) as session:
            missed = sweeping.missed_starts(session)
            overrun = sweeping.overruns(session)
        for why, end, job_ids in (
            ("start_deadline", jobs.expire, missed),
            ("run_deadline", jobs.fail_past_deadline, overrun),
        ):
            for job_id in job_ids:
                if self.ended.run_ending(self.database, partial(end, job_id=job_id)) is not None:
                    self._count(why, job_id)

    def _stores(self) -> None:
        """Announce again rendered jobs that nobody stored; render again those without pixels.

        A queue never gets more messages than there are jobs to be stored from it, however long
        nobody takes any.
        """
        with transaction(self.database) as session:
            overdue = sweeping.overdue_stores(session)
            storing = sweeping.storing_by_tier(session)
        missing: Counter[str] = Counter()  # messages, by queue
        for tier, count in storing.items():
            missing[queues.results_queue(self.fleet, tier)] += count
        for queue in {queues.results_queue(self.fleet, unstored.tier) for unstored in overdue}:
            missing[queue] -= self.broker.waiting(queue)
        for unstored in overdue:
            self.on_turn()
            queue = queues.results_queue(self.fleet, unstored.tier)
            if self._store_later(unstored, queue, may_announce=missing[queue] > 0):
                missing[queue] -= 1

    def _store_later(self, unstored: OverdueStore, queue: str, *, may_announce: bool) -> bool:
        """Have what is left of an overdue job stored; tell whether that took a message."""
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
        # Does nothing for a job that is to be rendered again, or has ended.
        run_transaction(self.database, postpone)
        is_announced = not has_ended and any(held.values()) and may_announce
        if is_announced:
            self.broker.announce(queues.STORE_IMAGES, queue, unstored.job_id)
        self._count("hand_off_lost" if gone else "store_overdue", unstored.job_id)
        return is_announced

    def _loses(self, unstored: OverdueStore, gone: Sequence[int]) -> bool:
        """Have these images rendered again; tell whether the job has ended by that."""
        job = lose_hand_off(
            self.database, self.ended, unstored.job_id, gone, attempt_of=unstored.attempt_of
        )
        return job is not None and job.state in FINAL_STATES

    def _overflows(self) -> None:
        """Move jobs that waited too long for their pool to another one that has room."""
        if "broker" in self._away:
            return
        for pool, shape in self.fleet.pools.items():
            for tier in self.fleet.tiers if shape.overflow_to is not None else ():
                self.on_turn()
                if moved := self.release.overflow(pool, tier):
                    telemetry.SWEPT.labels("overflowed").inc(moved)

    def _releases(self) -> None:
        """Release waiting jobs for which there is room: missed at accept, or put back since."""
        if "broker" in self._away:
            return
        for pool, tier in self._queues():
            self.on_turn()
            released = self.release.release(pool, tier)
            if released:
                telemetry.SWEPT.labels("released").inc(released)

    def _lost_messages(self) -> None:
        """Announce again the jobs whose message the broker lost.

        Announcing twice is harmless, so a guess is good enough.
        """
        for pool, tier in self._queues():
            self.on_turn()
            lost = self._lost(pool, tier)
            if lost:
                log.warning("messages_lost", pool=pool, tier=tier, jobs=len(lost))
                telemetry.SWEPT.labels("message_lost").inc(len(lost))
                self.release.reannounce(pool, tier, lost)

    def _queues(self) -> list[tuple[str, str]]:
        """List the pools with their tiers, and with tiers that are gone but have queued jobs."""
        with transaction(self.database) as session:
            queued = flows.with_queued_jobs(session)
        offered = [(pool, tier) for pool in self.fleet.pools for tier in self.fleet.tiers]
        return [*offered, *sorted(each for each in queued if each not in offered)]

    def _lost(self, pool: str, tier: str) -> list[uuid.UUID]:
        with transaction(self.database) as session:
            announced = releasing.announced(
                session, pool=pool, tier=tier, older_than_s=LOST_AFTER_S
            )
        lost = []
        for is_front in (True, False):
            here = [job for job in announced if job.is_front == is_front]
            if here:
                queue = queues.queue_of_jobs(self.fleet, pool, tier, is_front=is_front)
                lost += self._missing(here, queue)
        return lost

    def _missing(self, announced: Sequence[Announced], queue: str) -> list[uuid.UUID]:
        """List those of one queue's jobs whose message cannot be in it any more."""
        if self.broker.waiting(queue) == 0:
            return [job.job_id for job in announced]
        next_job = self.broker.next_job(queue)
        with transaction(self.database) as session:
            next_at = releasing.announced_at(session, next_job) if next_job else None
        if next_at is None:
            return []  # the next message is of an ended job and will be dropped: try again then

        def was_overtaken(job: Announced) -> bool:
            return gates.was_overtaken(job.announced_at, next_announced_at=next_at)

        return [job.job_id for job in announced if was_overtaken(job)]

    def _late_inputs(self) -> None:
        """Ask again for input pictures that did not come, unless the results queue is backed up."""
        for pool, tier in self._queues():
            waiting = self.broker.waiting(queues.results_queue(self.fleet, tier))
            if gates.is_backed_up(waiting):
                continue
            late_s = gates.inputs_late_after_s(waiting)
            late = self.release.ask_for_inputs_again(pool, tier, asked_before_s=late_s)
            if late:
                telemetry.SWEPT.labels("inputs_late").inc(late)

    def _webhooks(self) -> None:
        """Ask for due webhook deliveries: missed at the job's end, or to be tried again."""
        if gates.is_backed_up(self.broker.waiting(queues.WEBHOOKS)):
            return
        with transaction(self.database) as session:
            endpoints = webhooks.endpoints_with_pending(
                session, after=self._endpoints_after, limit=ENDPOINTS_AT_A_TIME
            )
            due = webhooks.due(session, endpoints)
        for delivery_id in due:
            self.broker.ask_to_deliver(delivery_id)
        # The next sweep starts where this one ended, so that no endpoint waits behind those that
        # always have something pending.
        self._endpoints_after = endpoints[-1] if len(endpoints) == ENDPOINTS_AT_A_TIME else None

    def _undeliverable(self) -> bool:
        """Give up deliveries too old to be tried: their endpoint was disabled all the time."""
        give_up = partial(webhooks.give_up_old, older_than_s=GIVE_UP_AFTER_S)
        return self._forget("webhook_given_up", give_up)

    def _budgets(self) -> None:
        """Tell tenants' endpoints which parts of their monthly budgets are spent."""
        with transaction(self.database) as session:
            reached = budgets.note_reached_thresholds(session, currency=self.fleet.currency)
            telemetry.TENANTS_OVER_BUDGET.set(budgets.count_over(session))
        for one in reached:
            log.info("budget_reached", tenant_id=str(one.tenant_id), percent=one.percent)

    def _objectives(self) -> None:
        """Count the jobs that met their tier's objectives, and show how far these are met."""
        with transaction(self.database) as session:
            objectives.count(session, self.fleet.tiers)
            known = objectives.attainments(session)
        for gauge in (telemetry.SLO_TARGET, telemetry.SLO_ATTAINMENT, telemetry.SLO_JOBS):
            gauge.clear()
        for one in known:
            telemetry.SLO_TARGET.labels(one.tier, one.objective).set(one.target)
            telemetry.SLO_ATTAINMENT.labels(one.tier, one.objective, one.span).set(one.ratio)
            telemetry.SLO_JOBS.labels(one.tier, one.objective, one.span).set(one.total)

    def _old_objectives(self) -> bool:
        """Remove what was counted more than a month ago."""
        return self._forget("objective_count", objectives.forget_old)

    def _gauges(self) -> None:
        """Set the gauges of the queues, for Prometheus."""
        with transaction(self.database) as session:
            rows = session.execute(_QUEUE_NOW).all()
            telemetry.WEBHOOKS_PENDING.set(webhooks.pending(session))
            known = workers.now(session, silent_for_s=self.settings.lease_ttl_s)
            quarantined = quarantine.count_by_pool(session)
            lacking = inputs.asked_and_lacking(session)
        telemetry.JOBS_LACKING_INPUTS.clear()
        for (pool, tier), jobs_lacking in lacking.items():
            telemetry.JOBS_LACKING_INPUTS.labels(pool, tier).set(jobs_lacking)
        _gauge_queues(rows)
        _gauge_workers(self.fleet.pools, known)
        for pool in {*self.fleet.pools, *quarantined}:
            telemetry.QUARANTINED_DEVICES.labels(pool).set(quarantined[pool])
        telemetry.HANDOFF_FILL.set(self.fill())

    def _etas(self) -> None:
        """Learn from newly ended jobs how far the gateway's estimates are off; count their times.

        Each is counted once, also over restarts: what was learnt last is in the database.
        """
        with transaction(self.database) as session:
            newly_ended = learning.newly_ended(session)
            for ended in newly_ended:
                row = learning.eta_of(session, pool=ended.pool, tier=ended.tier)
                known = EtaRatios(p50=row.ratio_p50, p90=row.ratio_p90) if row is not None else None
                ratios = learn_ratios(
                    known,
                    ended.taken_s / ended.guessed_s,
                    observed=row.observed if row is not None else 0,
                )
                learning.learn_eta(session, ended, ratio_p50=ratios.p50, ratio_p90=ratios.p90)
        for ended in newly_ended:
            _observe(ended)

    def _orphans(self) -> None:
        """Delete pixels, snapshots and pictures that nobody will read; have the store tidied."""
        kept = {
            (job_id, index, attempt): key for key, job_id, index, attempt in self.handoff.kept()
        }
        with_snapshots = self.snapshots.jobs()
        with_inputs = self.inputs.jobs()
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
        """Make the audit log's partitions for the months to come."""
        with transaction(self.database) as session:
            months_ahead = sweeping.ensure_audit_partitions(session)
        telemetry.AUDIT_MONTHS_AHEAD.set(months_ahead)
        if months_ahead < sweeping.AUDIT_MONTHS_AHEAD:
            # A query that reads the audit log holds a lock; in an hour it may have ended.
            log.warning("audit_partitions_postponed", months_ahead=months_ahead)

    def _retention(self) -> bool:
        """Erase job content that is older than its tier keeps it; False if there is more to do."""
        ends_at = time.monotonic() + AT_MOST_S
        kept = {
            name: timedelta(days=tier.retention_days)
            for name, tier in self.fleet.tiers.items()
            if tier.retention_days
        }
        return all(self._erase_old(tier, older_than, ends_at) for tier, older_than in kept.items())

    def _erase_old(self, tier: str, older_than: timedelta, ends_at: float) -> bool:
        """Erase a tier's old jobs as a tenant would; False if there is more to do.

        Begins after the last job up to which this process knows all to be erased; at the process's
        start it looks at all jobs.
        """
        after = self._erased_upto.get(tier, uuid.UUID(int=0))
        is_all_erased = True
        while True:
            with transaction(self.database) as session:
                some = sweeping.aged(session, older_than=older_than, after=after, limit=LOOKED_AT)
            for job in some:
                if time.monotonic() > ends_at:
                    return False
                if job.tier == tier and job.is_due:
                    self._erase(job)
                # False for a job of the tier whose time comes later.
                is_all_erased &= job.tier != tier or job.is_due or job.is_erased
                after = job.job_id
                if is_all_erased:
                    self._erased_upto[tier] = after
            if len(some) < LOOKED_AT:
                return True

    def _erase(self, job: OldJob) -> None:
        with transaction(self.database) as session:
            erasing.erase(session, job.job_id, tenant_id=job.tenant_id, actor=jobs.SWEEPER)
        self._count("retention", job.job_id)

    def _silent_workers(self) -> None:
        """Delete the rows of workers that never signed off."""
        with transaction(self.database) as session:
            workers.forget_the_silent(session, silent_for_s=HOURLY_S)

    def _old_deliveries(self) -> bool:
        """Delete webhook deliveries that ended a month ago."""
        return self._forget("webhook_delivery", webhooks.forget_old)

    def _old_idempotency_keys(self) -> bool:
        """Delete idempotency keys of the day before."""
        return self._forget("idempotency_key", idempotency.forget_old)

    def _forget(self, why: str, forget_old: Callable[..., int]) -> bool:
        """Delete what is too old, `PIECE` rows per transaction; False if there is more to do."""
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
    """Sweep every so many seconds in a thread of its own.

    No message from the broker starts a sweep, so that it also runs while the broker is away.
    """

    def __init__(
        self, sweep: Callable[[], None], *, every_s: float, on_turn: Callable[[], None]
    ) -> None:
        self._sweep = sweep
        self._every_s = every_s
        self._on_turn = on_turn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the pass that runs, and begin no other."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._on_turn()
            try:
                self._sweep()
            except Exception as error:  # nothing may end this loop
                log.error("sweep_failed", exc_info=error)
            self._stop.wait(self._every_s)


def _observe(ended: SucceededJob) -> None:
    """Count the times of a job that has succeeded, for Prometheus."""
    telemetry.JOB_SECONDS.labels(ended.tier).observe(ended.taken_s)
    telemetry.JOB_WAIT_SECONDS.labels(ended.tier).observe(ended.waited_s)
    if ended.previewed_s is not None:
        telemetry.JOB_PREVIEW_SECONDS.labels(ended.tier).observe(ended.previewed_s)
    if ended.promised_s:
        telemetry.JOB_ETA_RATIO.labels(ended.tier).observe(ended.taken_s / ended.promised_s)


def _gauge_queues(rows: Iterable[Row[Any]]) -> None:
    """Set the gauges of every pool's and tier's queue. rows: as _QUEUE_NOW names them."""
    telemetry.QUEUE_JOBS.clear()
    telemetry.OLDEST_WAIT.clear()
    for row in rows:
        for state in ("waiting", "announced", "running", "storing"):
            count = getattr(row, state)
            telemetry.QUEUE_JOBS.labels(row.pool, row.tier, state).set(count)
        telemetry.OLDEST_WAIT.labels(row.pool, row.tier).set(row.oldest_wait_s or 0)


def _gauge_workers(pools: Iterable[str], known: Sequence[WorkerNow]) -> None:
    """Set the gauges of every pool's workers."""
    live = Counter(worker.pool for worker in known if worker.is_live)
    failing = Counter(worker.pool for worker in known if keeps_failing(worker))
    for pool in {*pools, *failing}:
        telemetry.LIVE_WORKERS.labels(pool).set(live[pool])
        telemetry.FAILING_WORKERS.labels(pool).set(failing[pool])
    lacking = Counter(
        (worker.pool, checkpoint)
        for worker in known
        if worker.is_live
        for checkpoint in worker.failed or ()
    )
    telemetry.MODELS_NOT_LOADED.clear()
    for (pool, checkpoint), count in lacking.items():
        telemetry.MODELS_NOT_LOADED.labels(pool, checkpoint).set(count)


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
        return True
    except (BrokerUnavailable, HandoffUnavailable) as error:
        log.warning("part_not_reached", reason=str(error)[:300])
        return False
