"""Decide which jobs are accepted, and estimate how long they will wait."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from policy.fleet import Fleet
from policy.prediction import EtaRatios, QueuedFlow, TierQueue, raw_eta_s

# Shares of the hand-off's memory.
HANDOFF_FULL = 0.8  # workers take no more jobs
HANDOFF_OVERFULL = 0.9  # the gateway accepts no more jobs
# Below HANDOFF_FULL: pictures that wait for a worker must not keep it from taking their jobs.
HANDOFF_FULL_FOR_INPUTS = 0.7
HANDOFF_FULL_FOR_PREVIEWS = 0.5  # previews must not be able to stop workers
# Bound on p90 of actual / guessed: beyond it, that tells of an incident rather than of the queue.
MOST_PESSIMISM = 4.0
JITTER = 0.2  # of Retry-After, so that those refused together do not come back together
LONGEST_RETRY_S = 600
SHORTEST_RETRY_S = 1


@dataclass(frozen=True)
class RunningJobs:
    """Running jobs of one tier: predicted device seconds, and images."""

    cost_s: float = 0.0
    images: int = 0


@dataclass(frozen=True)
class TenantBacklog:
    """The jobs of the asking tenant that wait in one tier.

    counted: as the tier's queue counts them.  now: with those that the tenant adds right now.
    """

    counted: QueuedFlow
    now: QueuedFlow

    def added_before(self, lead_s: float) -> tuple[float, float]:
        """Count (device seconds, jobs) before a place that the queue does not count yet."""
        known_s, known = self.counted.before(lead_s)
        now_s, now = self.now.before(lead_s)
        return now_s - known_s, now - known


@dataclass(frozen=True)
class PoolSnapshot:
    """A pool at one moment, as one tenant sees it.

    devices: that work.  queues: waiting jobs, by tier.  running: running jobs, by tier.
    handoff_fill: 0 to 1.  own: the tenant's part of the queues, by tier.  slots: of all devices
    together; 0: as many on each as its pool says.
    """

    devices: int
    queues: Mapping[str, TierQueue] = field(default_factory=dict)
    running: Mapping[str, RunningJobs] = field(default_factory=dict)
    handoff_fill: float = 0.0
    own: Mapping[str, TenantBacklog] = field(default_factory=dict)
    held: Collection[str] | None = None
    slots: int = 0


@dataclass(frozen=True)
class QueuePosition:
    """A job's place in the queue.

    ahead_s, jobs_ahead: device seconds and jobs that go before it.  concurrent_images: that will
    share its device, its own included.
    """

    ahead_s: float
    jobs_ahead: int
    concurrent_images: float


@dataclass(frozen=True)
class Refusal:
    """The reason why a job is refused: unserved, tenant_queue_full, saturated or handoff_full."""

    reason: str
    detail: str
    retry_after_s: int


def queue_position(
    fleet: Fleet, snapshot: PoolSnapshot, *, pool: str, tier: str, num_images: int, lead_s: float
) -> QueuePosition:
    """Find the place of a job of `tier` whose start tag is `lead_s` ahead of virtual time.

    Before it go all jobs of better tiers, the running ones of its own tier, and those that fair
    order releases first. The minimum shares of lower tiers are left to the learnt ratios.
    """
    rank = fleet.tiers[tier].rank
    better = {name for name, other in fleet.tiers.items() if other.rank < rank}
    own = snapshot.own.get(tier)
    ahead_s, jobs = snapshot.queues.get(tier, TierQueue()).before(lead_s)
    added_s, added = own.added_before(lead_s) if own is not None else (0.0, 0.0)
    ahead_s += added_s + sum(
        snapshot.queues[name].cost_s for name in better & snapshot.queues.keys()
    )
    ahead_s += sum(
        work.now.cost_s - work.counted.cost_s
        for name, work in snapshot.own.items()
        if name in better
    )
    ahead_s += sum(
        work.cost_s for name, work in snapshot.running.items() if name in better or name == tier
    )
    devices = max(1, snapshot.devices)
    slots = snapshot.slots / devices or float(fleet.pools[pool].slots)  # of one device
    images = num_images + sum(work.images for work in snapshot.running.values())
    least_images = min(float(num_images), slots)
    return QueuePosition(
        ahead_s,
        round(jobs + added),
        concurrent_images=min(slots, max(least_images, images / devices)),
    )


def first_guess_s(
    place: QueuePosition, snapshot: PoolSnapshot, *, job_device_s: float, num_images: int
) -> float:
    """Estimate the seconds from now to the job's last image, by the queue alone.

    Learnt ratios correct it.
    """
    return raw_eta_s(
        ahead_s=place.ahead_s,
        image_device_s=job_device_s / num_images,
        devices=snapshot.devices,
        concurrent_images=place.concurrent_images,
    )


def refusal(
    fleet: Fleet,
    snapshot: PoolSnapshot,
    place: QueuePosition,
    ratios: EtaRatios | None,
    *,
    pool: str,
    tier: str,
    checkpoint: str,
    job_device_s: float,
    draw: float,
) -> Refusal | None:
    """Decide why a job must not be accepted now; None if it may.

    checkpoint: that it is rendered by.  job_device_s: its predicted device seconds.  draw: in
    [0, 1), for the jitter of Retry-After.
    """
    shape = fleet.pools[pool]
    if not snapshot.devices and not shape.warm_floor and not shape.scalable:
        detail = f"No worker of pool {pool} is alive, and nothing starts one."
        return Refusal("unserved", detail, _jittered(60, draw))
    if snapshot.devices and snapshot.held is not None and checkpoint not in snapshot.held:
        model, _, version = checkpoint.partition("@")
        detail = f"No live worker serves version {version} of model {model}."
        return Refusal("unserved", detail, _jittered(60, draw))
    full = _refuse_full_queue(fleet, snapshot, tier=tier, job_device_s=job_device_s, draw=draw)
    if full is not None:
        return full
    if snapshot.handoff_fill > HANDOFF_OVERFULL:
        detail = "Images are made faster than they can be stored."
        return Refusal("handoff_full", detail, _jittered(5, draw))
    return _refuse_late_start(fleet, snapshot, place, ratios, tier=tier, draw=draw)


def _refuse_full_queue(
    fleet: Fleet, snapshot: PoolSnapshot, *, tier: str, job_device_s: float, draw: float
) -> Refusal | None:
    """Refuse a job with which more of its tenant's work would wait than the tier allows.

    One that is larger than that alone is let in when nothing else of its tenant waits.
    """
    own = snapshot.own.get(tier)
    most_s = fleet.tiers[tier].max_queued_s_per_tenant
    if own is None or not own.now.jobs or own.now.cost_s + job_device_s <= most_s:
        return None
    counted_weight = own.counted.weight if own.counted.jobs else 0.0
    others = snapshot.queues.get(tier, TierQueue()).weights - counted_weight
    excess_s = min(own.now.cost_s, own.now.cost_s + job_device_s - most_s)
    wait_s = excess_s * (own.now.weight + others) / own.now.weight / max(1, snapshot.devices)
    detail = (
        f"Your jobs waiting in tier {tier} need {own.now.cost_s:.0f} device seconds;"
        f" at most {most_s:.0f} may wait."
    )
    return Refusal("tenant_queue_full", detail, _jittered(wait_s, draw))


def _refuse_late_start(
    fleet: Fleet,
    snapshot: PoolSnapshot,
    place: QueuePosition,
    ratios: EtaRatios | None,
    *,
    tier: str,
    draw: float,
) -> Refusal | None:
    """Refuse a job that would probably start after its deadline."""
    if not snapshot.devices:
        return None
    start_within_s = fleet.tiers[tier].start_within_s
    pessimism = min(MOST_PESSIMISM, max(1.0, ratios.p90 if ratios is not None else 1.0))
    wait_s = place.ahead_s / snapshot.devices * pessimism
    if wait_s <= start_within_s:
        return None
    detail = (
        f"A job of tier {tier} would wait about {wait_s:.0f} s"
        f" and must start within {start_within_s} s."
    )
    return Refusal("saturated", detail, _jittered(wait_s - start_within_s, draw))


def _jittered(seconds: float, draw: float) -> int:
    # Bounded before the jitter, so that those at the bounds are spread, too.
    bounded = min(LONGEST_RETRY_S / (1 + JITTER), max(SHORTEST_RETRY_S / (1 - JITTER), seconds))
    return math.ceil(bounded * (1 - JITTER + 2 * JITTER * draw))
