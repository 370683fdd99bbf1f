"""Forecast when jobs start and finish, and decide on admission by that.

Reads each pool at most a few times a second, however many clients ask; nothing here scans a
backlog.
"""

import random
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.documents import JobDocument
from app.live.cache import Cache
from edges.handoff import Gauge
from models import flows, inputs, learning, releasing, workers
from models.database import transaction
from models.flows import FlowBacklog
from models.inputs import MissingInputs
from models.tables import Job
from policy import admission, prediction
from policy.admission import PoolSnapshot, QueuePosition, Refusal, RunningJobs, TenantBacklog
from policy.cost import class_shares, device_cost, price
from policy.current import CurrentFleet
from policy.fleet import checkpoint_name
from policy.params import Resolved, pictures_of
from policy.prediction import DeviceCost, Eta, EtaRatios, QueuedFlow, TierQueue
from policy.release import Outstanding, ReleaseHint, ReleaseLimits, release_hint
from policy.routing import LivePool
from policy.states import JobState
from policy.steps import denoising_of, image_steps
from policy.workers import class_key

FRESH_FOR_S = 0.5
LEARNT_FOR_S = 2.0
# How much longer a value serves while it is read again, so that no request waits for a slow read.
STALE_FOR_S = 5.0
MOST_KEPT = 10_000  # entries of each cache: pools; pools and tiers; models with their sizes
# How long one job waits for pictures until jobs that need none may pass all that wait for theirs.
PICTURES_LATE_S = 3.0


@dataclass(frozen=True)
class QueuePlace:
    """The queue position of an unfinished job.

    jobs_ahead: jobs of its tier before it; None once it runs. eta: its end, from now.
    """

    jobs_ahead: int | None
    eta: Eta


@dataclass(frozen=True)
class JobForecast:
    """The estimate for a job at accept.

    predicted_s: device seconds. cost: what the tenant would pay for them. eta_raw_s: the first
    guess of its end, from now. place: the queue position that it would get. refusal: why to refuse
    it, if so.
    """

    predicted_s: float
    cost: Decimal
    eta_raw_s: float
    place: QueuePlace
    refusal: Refusal | None


@dataclass(frozen=True)
class BookedJobs:
    """Jobs of the caller that will be accepted, but are not in the database yet.

    These are the earlier jobs of the same batch.
    """

    jobs: int = 0
    cost_s: float = 0.0

    def with_job(self, cost_s: float) -> "BookedJobs":
        return BookedJobs(self.jobs + 1, self.cost_s + cost_s)


Bookings = Mapping[tuple[str, str], BookedJobs]
NOTHING: Mapping[str, BookedJobs] = {}


@dataclass(frozen=True)
class _PoolState:
    """A pool as it was read from the database.

    held: the checkpoints that a live worker serves at least; None: all of the pool.
    flows: by tier and tenant. sharing: by tier, the tenants with outstanding or waiting jobs.
    lacking_inputs: tiers with jobs that wait for their pictures, not for workers.
    """

    devices: int
    slots: int
    slots_by_class: Mapping[str, int]
    held: frozenset[str] | None
    flows: Mapping[tuple[str, uuid.UUID], FlowBacklog]
    queues: Mapping[str, TierQueue]
    running: Mapping[str, RunningJobs]
    clocks: Mapping[str, float]
    outstanding: Mapping[str, Outstanding]
    sharing: Mapping[str, frozenset[uuid.UUID]]
    lacking_inputs: frozenset[str]


def _queued_flow(flow: FlowBacklog) -> QueuedFlow:
    return QueuedFlow(flow.weight, flow.queued_jobs, flow.queued_s)


def _pool_state(
    capacity: workers.Capacity,
    backlogs: Sequence[FlowBacklog],
    outstanding: Mapping[str, Outstanding],
    *,
    clocks: Mapping[str, float],
    lacking_inputs: frozenset[str],
) -> _PoolState:
    """Combine what was read about a pool."""
    by_tier: dict[str, list[FlowBacklog]] = defaultdict(list)
    sharing: dict[str, set[uuid.UUID]] = defaultdict(set)
    for flow in backlogs:
        by_tier[flow.tier].append(flow)
        sharing[flow.tier].add(flow.tenant_id)
    for tier, work in outstanding.items():
        sharing[tier] |= work.images.keys()
    return _PoolState(
        devices=capacity.devices,
        slots=capacity.slots,
        slots_by_class=capacity.slots_by_class,
        held=capacity.held,
        flows={(flow.tier, flow.tenant_id): flow for flow in backlogs},
        queues={tier: TierQueue(map(_queued_flow, here)) for tier, here in by_tier.items()},
        running={
            tier: RunningJobs(work.running_s, work.running.total())
            for tier, work in outstanding.items()
            if work.running
        },
        clocks=clocks,
        outstanding=outstanding,
        sharing={tier: frozenset(tenants) for tier, tenants in sharing.items()},
        lacking_inputs=lacking_inputs,
    )


def _without(
    backlogs: Sequence[FlowBacklog], lacking: Mapping[tuple[str, uuid.UUID], MissingInputs]
) -> list[FlowBacklog]:
    """Subtract from the flows the jobs whose pictures are missing."""
    left = []
    for flow in backlogs:
        out = lacking.get((flow.tier, flow.tenant_id), MissingInputs(0, 0.0))
        jobs = max(0, flow.queued_jobs - out.jobs)
        queued_s = max(0.0, flow.queued_s - out.queued_s)
        left.append(replace(flow, queued_jobs=jobs, queued_s=queued_s))
    return left


def _lead_s(state: _PoolState, tier: str, tenant_id: uuid.UUID, booked: BookedJobs) -> float:
    """Return by how many virtual seconds the tenant's next job would start after virtual time."""
    own = state.flows.get((tier, tenant_id))
    if own is None:
        return booked.cost_s
    lead_s = max(0.0, own.finish_tag - state.clocks.get(tier, own.finish_tag))
    return lead_s + booked.cost_s / own.weight


class QueueForecaster:
    """Estimates how long a job would wait and whether to accept it. One per gateway process."""

    def __init__(
        self,
        database: Engine,
        current: CurrentFleet,
        gauge: Gauge,
        limits: Callable[[str, str, int], ReleaseLimits],
        refresher: Executor,
        *,
        worker_silence_s: float,
    ) -> None:
        """Make a forecaster that reads nothing yet.

        limits: `Release.limits`. refresher: rereads values before they are too old.
        """
        self._database = database
        self._current = current
        self._gauge = gauge
        self._limits = limits
        self._worker_silence_s = worker_silence_s
        self._pools: Cache[str, tuple[_PoolState, _PoolState]] = _cache(FRESH_FOR_S, refresher)
        self._costs: Cache[learning.CostKey, DeviceCost | None] = _cache(LEARNT_FOR_S, refresher)
        self._learnt: Cache[tuple[str, str], EtaRatios | None] = _cache(LEARNT_FOR_S, refresher)
        # By pool: the oldest job that waits for requested pictures, and since when that is so.
        self._waits_for_pictures: dict[str, tuple[uuid.UUID, float]] = {}
        self._lock = threading.Lock()

    def expect(
        self, params: Resolved, tenant_id: uuid.UUID, booked: Bookings | None = None
    ) -> JobForecast:
        """Estimate when a job that the tenant submits now would end, and whether to refuse it.

        booked: what the tenant submits before this job in the same request, by pool and tier.
        """
        state = self._pool_state(params.pool, needs_pictures=bool(pictures_of(params)))
        pool_bookings = {
            tier: work for (pool, tier), work in (booked or {}).items() if pool == params.pool
        }
        snapshot = self._snapshot(state, tenant_id, pool_bookings)
        job_device_s, job_cost = self._predicted(params, state)
        lead_s = _lead_s(
            state, params.tier, tenant_id, pool_bookings.get(params.tier, BookedJobs())
        )
        place = self._place(snapshot, params, lead_s=lead_s)
        raw_s = admission.first_guess_s(
            place, snapshot, job_device_s=job_device_s, num_images=params.num_images
        )
        ratios = self._ratios(params.pool, params.tier)
        refused = admission.refusal(
            self._current.fleet,
            snapshot,
            place,
            ratios,
            pool=params.pool,
            tier=params.tier,
            checkpoint=checkpoint_name(params.model, params.model_version),
            job_device_s=job_device_s,
            draw=random.random(),
        )
        queue_place = QueuePlace(place.jobs_ahead, prediction.corrected(raw_s, ratios))
        return JobForecast(job_device_s, job_cost, raw_s, queue_place, refused)

    def live_pool(self, pool: str) -> LivePool:
        """Tell what the live workers of the pool serve, as it was at most `FRESH_FOR_S` ago."""
        state = self._pool_state(pool, needs_pictures=True)
        return LivePool(state.devices, state.held)

    def _predicted(self, params: Resolved, state: _PoolState) -> tuple[float, Decimal]:
        """Predict the device seconds of all images of the job, and their price.

        Both are means over the capacity classes that may render it. A class of which nothing is
        learnt yet counts as one of which something is.
        """
        fleet = self._current.fleet
        pool = fleet.pools[params.pool]
        shares = class_shares(pool, state.slots_by_class)
        learnt = {name: self._cost(params, name) for name in [*shares, ""]}
        any_class = next(filter(None, learnt.values()), None)
        whole_s = 0.0
        cost = Decimal(0)
        for name, share in shares.items():
            seconds = share * prediction.predicted_s(
                learnt[name] or any_class,
                width_px=params.width_px,
                height_px=params.height_px,
                denoising=denoising_of(fleet, params),
                num_images=params.num_images,
            )
            whole_s += seconds
            cost += device_cost(seconds, pool.of_class(name).gpu_hour_price)
        return whole_s, price(fleet, tier=params.tier, cost=cost)

    def release_hint(
        self, params: Resolved, tenant_id: uuid.UUID
    ) -> tuple[ReleaseHint, ReleaseLimits]:
        """Tell how to release a new job, with the limits that apply.

        Uses what was read at most `FRESH_FOR_S` ago.
        """
        state = self._pool_state(params.pool, needs_pictures=bool(pictures_of(params)))
        limits = self._limits(params.pool, params.tier, state.slots)
        if pictures_of(params) or params.tier in state.lacking_inputs:
            # Its pictures must be requested first; or the number of jobs before it is not known.
            return ReleaseHint.TRY_RELEASE, limits
        outstanding = state.outstanding.get(params.tier, Outstanding())
        queued_jobs = state.queues.get(params.tier, TierQueue()).jobs
        hint = release_hint(
            outstanding,
            limits,
            tenant_id=tenant_id,
            num_images=params.num_images,
            waiting_jobs=queued_jobs - outstanding.announced_jobs,
            sharing=len(state.sharing.get(params.tier, frozenset()) | {tenant_id}),
        )
        return hint, limits

    def place_of(self, job: Job | JobDocument, steps_done: int = 0) -> QueuePlace | None:
        """Estimate the queue position of an unfinished job.

        None if the catalogue no longer has its tier or pool. steps_done: denoise steps of all its
        images.
        """
        if job.tier not in self._current.fleet.tiers or job.pool not in self._current.fleet.pools:
            return None
        state = self._pool_state(job.pool, needs_pictures=bool(pictures_of(job)))
        snapshot = self._snapshot(state, job.tenant_id)
        ratios = self._ratios(job.pool, job.tier)
        is_queued = job.state == JobState.QUEUED
        clock = state.clocks.get(job.tier, job.release_tag)
        lead_s = max(0.0, job.release_tag - clock) if is_queued else 0.0
        place = self._place(snapshot, job, lead_s=lead_s)
        if is_queued:
            raw_s = admission.first_guess_s(
                place, snapshot, job_device_s=job.predicted_s, num_images=job.num_images
            )
            return QueuePlace(place.jobs_ahead, prediction.corrected(raw_s, ratios))
        steps_to_do = image_steps(job) * job.num_images
        left = 1 - min(1.0, steps_done / steps_to_do)
        raw_s = left * job.predicted_s / job.num_images * place.concurrent_images
        return QueuePlace(None, prediction.corrected(raw_s, ratios))

    def _place(
        self, snapshot: PoolSnapshot, job: Resolved | Job | JobDocument, *, lead_s: float
    ) -> QueuePosition:
        return admission.queue_position(
            self._current.fleet,
            snapshot,
            pool=job.pool,
            tier=job.tier,
            num_images=job.num_images,
            lead_s=lead_s,
        )

    def _snapshot(
        self, state: _PoolState, tenant_id: uuid.UUID, booked: Mapping[str, BookedJobs] = NOTHING
    ) -> PoolSnapshot:
        """Build the pool's snapshot for one tenant; an unknown weight counts as 1.

        booked: what the tenant is about to add, by tier.
        """
        own = {}
        for tier in self._current.fleet.tiers:
            flow = state.flows.get((tier, tenant_id))
            more = booked.get(tier)
            if flow is None and more is None:
                continue
            counted = _queued_flow(flow) if flow is not None else QueuedFlow(1.0, 0, 0.0)
            added = more or BookedJobs()
            now = QueuedFlow(
                counted.weight, counted.jobs + added.jobs, counted.cost_s + added.cost_s
            )
            own[tier] = TenantBacklog(counted, now)
        return PoolSnapshot(
            devices=state.devices,
            queues=state.queues,
            running=state.running,
            handoff_fill=self._gauge.fill(),
            own=own,
            held=state.held,
            slots=state.slots,
        )

    def _pool_state(self, pool: str, *, needs_pictures: bool) -> _PoolState:
        """Return the pool as this job sees it, as it was at most `FRESH_FOR_S` ago.

        While no pictures arrive, a job that needs none passes the jobs that wait for theirs.
        """
        whole, passing = self._pools.get(pool, lambda: self._read_pool(pool))
        return whole if needs_pictures else passing

    def _read_pool(self, pool: str) -> tuple[_PoolState, _PoolState]:
        """Read the pool twice: as jobs with pictures see it, and as jobs without pictures do."""
        tiers = list(self._current.fleet.tiers)
        with transaction(self._database) as session:
            backlogs = flows.backlogs(session, pool=pool)
            whole = _pool_state(
                workers.capacity(session, pool=pool, silent_for_s=self._worker_silence_s),
                backlogs,
                releasing.outstanding_by_tier(session, pool=pool),
                clocks=flows.clocks(session, pool=pool),
                lacking_inputs=inputs.tiers_lacking(session, pool=pool, tiers=tiers),
            )
            if not self._pictures_are_late(session, pool):
                return whole, whole
            passing = _without(backlogs, inputs.lacking_by_flow(session, pool=pool))
        by_tier = {tier: [flow for flow in passing if flow.tier == tier] for tier in whole.queues}
        return whole, replace(
            whole,
            flows={(flow.tier, flow.tenant_id): flow for flow in passing},
            queues={tier: TierQueue(map(_queued_flow, here)) for tier, here in by_tier.items()},
        )

    def _pictures_are_late(self, session: Session, pool: str) -> bool:
        """Tell whether the pool's pictures seem not to arrive at all.

        That is so when the same job has been the oldest to wait for requested pictures for
        PICTURES_LATE_S.
        """
        now = time.monotonic()
        oldest = inputs.oldest_asked(session, pool=pool)
        with self._lock:
            known, since = self._waits_for_pictures.get(pool, (None, now))
            if oldest is None:
                self._waits_for_pictures.pop(pool, None)
                return False
            if known != oldest:
                self._waits_for_pictures[pool] = (oldest, now)
                return False
        return now - since >= PICTURES_LATE_S

    def _cost(self, params: Resolved, capacity_class: str) -> DeviceCost | None:
        group = class_key(params.pool, capacity_class)
        key = (group, params.model, params.width_px, params.height_px)
        return self._costs.get(key, lambda: self._read_cost(key))

    def _read_cost(self, key: learning.CostKey) -> DeviceCost | None:
        with transaction(self._database) as session:
            row = learning.cost_of(session, key)
            return DeviceCost(row.row_step_s, row.fixed_s) if row is not None else None

    def _ratios(self, pool: str, tier: str) -> EtaRatios | None:
        return self._learnt.get((pool, tier), lambda: self._read_ratios(pool, tier))

    def _read_ratios(self, pool: str, tier: str) -> EtaRatios | None:
        with transaction(self._database) as session:
            row = learning.eta_of(session, pool=pool, tier=tier)
            return EtaRatios(row.ratio_p50, row.ratio_p90) if row is not None else None


def _cache(fresh_for_s: float, refresher: Executor) -> Cache[Any, Any]:
    """Make a cache that refreshes at half its age, so that under load no request waits for a read.

    While a read takes long, the old value serves for up to `STALE_FOR_S` more.
    """
    return Cache(
        "forecast",
        MOST_KEPT,
        keep_for_s=fresh_for_s,
        stale_for_s=STALE_FOR_S,
        refresh_after_s=fresh_for_s / 2,
        refresher=refresher,
    )
