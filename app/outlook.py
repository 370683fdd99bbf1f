"""What the gateway knows of the queues: for admission, and for honest answers about when a job will be done.

Read at most a few times a second per pool, however many clients ask; nothing here scans a backlog.
"""

import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar, cast

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.documents import JobDocument
from edges.handoff import Gauge
from models import flows, inputs, learning, releasing, workers
from models.database import transaction
from models.flows import Standing
from models.releasing import Hands, Room
from models.states import JobState
from models.tables import Job
from policy import admission, prediction
from policy.admission import Outlook, Own, Refusal, Running
from policy.fleet import Fleet
from policy.params import Resolved, pictures_of
from policy.prediction import Cost, Eta, EtaRatios, Line, Waiting

Read = TypeVar("Read")
FRESH_FOR_S = 0.5
LEARNT_FOR_S = 2.0


@dataclass(frozen=True)
class QueuePlace:
    """Where a job that is not finished stands: jobs of its tier before it (None once it runs), and when it will be done, from now."""

    jobs_ahead: int | None
    eta: Eta


@dataclass(frozen=True)
class Expected:
    """What is expected of a job at accept: device seconds, and the first guess of its end, from now; `place` is where it would stand."""

    predicted_s: float
    eta_raw_s: float
    place: QueuePlace
    refusal: Refusal | None


class WayOut(Enum):
    """What a job that is accepted now can hope for."""

    AT_ONCE = auto()  # nobody waits, and there is room: it may be announced as it is written
    TO_BE_SEEN = auto()  # a release has to look
    IN_TURN = auto()  # many wait before it: the releases of jobs that end will come to it


@dataclass(frozen=True)
class Booked:
    """Jobs of the caller's that are as good as accepted, and nowhere to be read yet: those before one in its batch."""

    jobs: int = 0
    cost_s: float = 0.0

    def and_one(self, cost_s: float) -> "Booked":
        return Booked(self.jobs + 1, self.cost_s + cost_s)


Bookings = Mapping[tuple[str, str], Booked]
NOTHING: Mapping[str, Booked] = {}


@dataclass(frozen=True)
class _Seen:
    """A pool as it was read. flows: by tier and tenant.  sharing: by tier, the tenants that have any in hand or waiting."""

    devices: int
    slots: int
    flows: Mapping[tuple[str, uuid.UUID], Standing]
    lines: Mapping[str, Line]
    running: Mapping[str, Running]
    clocks: Mapping[str, float]
    hands: Mapping[str, Hands]
    sharing: Mapping[str, frozenset[uuid.UUID]]
    lacking_inputs: frozenset[str]  # tiers with jobs that wait for their pictures, not for workers


class Lookout:
    """One per gateway process."""

    def __init__(
        self,
        database: Engine,
        fleet: Fleet,
        gauge: Gauge,
        room: Callable[[str, str, int], Room],
        refresher: Executor,
        *,
        worker_silence_s: float,
    ) -> None:
        """room: of a (pool, tier) whose live workers hold so many images (Release.room).  refresher: reads again what grows old."""
        self._database, self._fleet, self._gauge, self._room = database, fleet, gauge, room
        self._worker_silence_s = worker_silence_s
        self._refresher = refresher
        self._remembered: dict[tuple[object, ...], tuple[float, float, object]] = {}  # when it was read, and last asked for
        self._lock = threading.Lock()

    def expect(self, wish: Resolved, tenant_id: uuid.UUID, booked: Bookings | None = None) -> Expected:
        """What to expect of a job that this tenant would submit now, and whether it should be refused.

        booked: what it is about to submit before this one, by pool and tier.
        """
        seen, before = self._seen(wish.pool), {tier: work for (pool, tier), work in (booked or {}).items() if pool == wish.pool}
        own = seen.flows.get((wish.tier, tenant_id))
        lead_s = max(0.0, own.finish_tag - seen.clocks.get(wish.tier, own.finish_tag)) if own else 0.0
        lead_s += before.get(wish.tier, Booked()).cost_s / (own.weight if own else 1.0)
        outlook = self._outlook(seen, tenant_id, before)
        own_s = prediction.predicted_s(
            self._cost((wish.pool, wish.model, wish.width_px, wish.height_px)),
            width_px=wish.width_px,
            height_px=wish.height_px,
            num_steps=prediction.steps_to_do(wish.num_steps, wish.strength),
            is_guided=wish.guidance > 1,
            num_images=wish.num_images,
        )
        place = admission.place_in(self._fleet, outlook, pool=wish.pool, tier=wish.tier, num_images=wish.num_images, lead_s=lead_s)
        raw_s = admission.first_guess_s(place, outlook, own_s=own_s, num_images=wish.num_images)
        ratios = self._ratios(wish.pool, wish.tier)
        refused = admission.refusal(self._fleet, outlook, place, ratios, pool=wish.pool, tier=wish.tier, own_s=own_s, draw=random.random())
        return Expected(own_s, raw_s, QueuePlace(place.jobs_ahead, prediction.corrected(raw_s, ratios)), refused)

    def way_out(self, wish: Resolved, tenant_id: uuid.UUID) -> tuple[WayOut, Room]:
        """What a job of the tenant's can hope for, by what was seen of the queue at most `FRESH_FOR_S` ago; and the room there is.

        Only IN_TURN is a promise that nothing need be done, so it takes a backlog that cannot be gone by now: more than all workers hold.
        """
        seen = self._seen(wish.pool)
        room, hands = self._room(wish.pool, wish.tier, seen.slots), seen.hands.get(wish.tier, Hands())
        if pictures_of(wish) or wish.tier in seen.lacking_inputs:
            return WayOut.TO_BE_SEEN, room  # its pictures are to be asked for; or how many of those that wait are before it is not known
        line = seen.lines.get(wish.tier)
        waiting = (line.jobs if line is not None else 0) - hands.announced_jobs
        if waiting <= 0 and hands.images.total() + wish.num_images <= room.slots:
            return WayOut.AT_ONCE, room
        others = seen.sharing.get(wish.tier, frozenset())
        sharing = len(others) + (tenant_id not in others)
        is_behind = releasing.is_behind(tenant_id, wish.num_images, hands.images, hands.running, room, sharing)
        return (WayOut.TO_BE_SEEN if is_behind or waiting <= room.limit_images else WayOut.IN_TURN), room

    def place_of(self, job: Job | JobDocument, steps_done: int = 0) -> QueuePlace | None:
        """Where an unfinished job stands; None for one whose tier or pool is not in fleet.toml any more."""
        if job.tier not in self._fleet.tiers or job.pool not in self._fleet.pools:
            return None
        seen = self._seen(job.pool)
        outlook, ratios = self._outlook(seen, job.tenant_id), self._ratios(job.pool, job.tier)
        queued = job.state == JobState.QUEUED
        lead_s = max(0.0, job.release_tag - seen.clocks.get(job.tier, job.release_tag)) if queued else 0.0
        place = admission.place_in(self._fleet, outlook, pool=job.pool, tier=job.tier, num_images=job.num_images, lead_s=lead_s)
        if queued:
            raw_s = admission.first_guess_s(place, outlook, own_s=job.predicted_s, num_images=job.num_images)
            return QueuePlace(place.jobs_ahead, prediction.corrected(raw_s, ratios))
        left = 1 - min(1.0, steps_done / (prediction.steps_to_do(job.num_steps, job.strength) * job.num_images))
        raw_s = left * job.predicted_s / job.num_images * place.company
        return QueuePlace(None, prediction.corrected(raw_s, ratios))

    def _outlook(self, seen: _Seen, tenant_id: uuid.UUID, booked: Mapping[str, Booked] = NOTHING) -> Outlook:
        """The pool as policy sees it; `booked` is what the tenant adds to it, by tier. Its weight there counts as 1 if it is not known."""
        own = {}
        for tier in self._fleet.tiers:
            flow, more = seen.flows.get((tier, tenant_id)), booked.get(tier)
            counted = Waiting(flow.weight, flow.queued_jobs, flow.queued_s) if flow is not None else Waiting(1.0, 0, 0.0)
            if flow is not None or more is not None:
                own[tier] = Own(
                    counted, counted if more is None else Waiting(counted.weight, counted.jobs + more.jobs, counted.cost_s + more.cost_s)
                )
        return Outlook(seen.devices, seen.lines, seen.running, self._gauge.fill(), own)

    def _seen(self, pool: str) -> _Seen:
        def read(session: Session) -> _Seen:
            slots, devices = workers.capacity(session, pool=pool, silent_for_s=self._worker_silence_s)
            standings, hands = flows.standings(session, pool=pool), releasing.hands(session, pool=pool)
            by_tier = {tier: [flow for flow in standings if flow.tier == tier] for tier in {flow.tier for flow in standings}}
            lines = {tier: Line(Waiting(flow.weight, flow.queued_jobs, flow.queued_s) for flow in here) for tier, here in by_tier.items()}
            sharing = {
                tier: frozenset(
                    {flow.tenant_id for flow in by_tier.get(tier, ())} | (hands[tier].images.keys() if tier in hands else set())
                )
                for tier in by_tier.keys() | hands.keys()
            }
            return _Seen(
                devices=devices,
                slots=slots,
                flows={(flow.tier, flow.tenant_id): flow for flow in standings},
                lines=lines,
                running={tier: Running(work.running_s, work.running.total()) for tier, work in hands.items() if work.running},
                clocks=flows.clocks(session, pool=pool),
                hands=hands,
                sharing=sharing,
                lacking_inputs=inputs.tiers_lacking(session, pool=pool, tiers=list(self._fleet.tiers)),
            )

        return self._recalled(("seen", pool), FRESH_FOR_S, read)

    def _cost(self, key: learning.CostKey) -> Cost | None:
        def read(session: Session) -> Cost | None:
            row = learning.cost_of(session, key)
            return Cost(row.row_step_s, row.fixed_s) if row is not None else None

        return self._recalled(("cost", *key), LEARNT_FOR_S, read)

    def _ratios(self, pool: str, tier: str) -> EtaRatios | None:
        def read(session: Session) -> EtaRatios | None:
            row = learning.eta_of(session, pool=pool, tier=tier)
            return EtaRatios(row.ratio_p50, row.ratio_p90) if row is not None else None

        return self._recalled(("ratios", pool, tier), LEARNT_FOR_S, read)

    def _recalled(self, key: tuple[object, ...], fresh_for_s: float, read: Callable[[Session], Read]) -> Read:
        """What `read(session)` gave within the last `fresh_for_s`; else read anew, by one thread while others take the old answer.

        Half way there it is read again behind the requests' back, so that under load no request waits for it.
        """
        now = time.monotonic()
        with self._lock:
            read_at, asked_at, known = self._remembered.get(key, (-math.inf, -math.inf, None))
            if now - asked_at < fresh_for_s / 2:
                return cast("Read", known)
            if key in self._remembered:
                self._remembered[key] = (read_at, now, known)
        if now - read_at < fresh_for_s:
            self._refresher.submit(self._read, key, read)
            return cast("Read", known)
        return self._read(key, read)

    def _read(self, key: tuple[object, ...], read: Callable[[Session], Read]) -> Read:
        began = time.monotonic()
        with transaction(self._database) as session:
            answer = read(session)
        with self._lock:
            self._remembered[key] = (began, began, answer)
        return answer
