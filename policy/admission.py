"""Who is let in, and how long they will wait."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from policy.fleet import Fleet
from policy.prediction import EtaRatios, Line, Waiting, raw_eta_s

HANDOFF_FULL = (
    0.8  # of its memory: workers take no more jobs; a little above, the gateway accepts none
)
HANDOFF_OVERFULL = 0.9
# Below what closes the workers: pictures that wait for a worker must not keep it from taking their
# jobs.
HANDOFF_FULL_FOR_INPUTS = 0.7
HANDOFF_FULL_FOR_PREVIEWS = 0.5  # whoever watches must not be able to close anything
# P90 of past jobs / their guess: beyond this it says more about an incident than about the queue.
MOST_PESSIMISM = 4.0
JITTER = 0.2  # of Retry-After, so that those refused together do not come back together
LONGEST_RETRY_S, SHORTEST_RETRY_S = 600, 1


@dataclass(frozen=True)
class Running:
    """Running jobs of one tier: predicted device seconds, and images."""

    cost_s: float = 0.0
    images: int = 0


@dataclass(frozen=True)
class TenantBacklog:
    """What the asking tenant has waiting in one tier.

    counted: as the tier's line counts it.  now: with what the tenant adds right now.
    """

    counted: Waiting
    now: Waiting

    def added_before(self, lead_s: float) -> tuple[float, float]:
        """(device seconds, jobs) before a place, beyond what the line knows of."""
        (known_s, known), (now_s, now) = self.counted.before(lead_s), self.now.before(lead_s)
        return now_s - known_s, now - known


@dataclass(frozen=True)
class PoolSnapshot:
    """A pool at one moment, as one tenant sees it.

    devices: that work.  lines: what waits, by tier.  running: what runs, by tier.  handoff_fill: 0
    to 1.  own: what of the lines is the tenant's, by tier.
    """

    devices: int
    lines: Mapping[str, Line] = field(default_factory=dict)
    running: Mapping[str, Running] = field(default_factory=dict)
    handoff_fill: float = 0.0
    own: Mapping[str, TenantBacklog] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a job stands.

    ahead_s, jobs_ahead: device seconds and jobs that go before it.  concurrent_images: that will
    share its device, its own included.
    """

    ahead_s: float
    jobs_ahead: int
    concurrent_images: float


@dataclass(frozen=True)
class Refusal:
    """Why a job is not let in. reason: unserved, tenant_queue_full, saturated or handoff_full."""

    reason: str
    detail: str
    retry_after_s: int


def place_in(
    fleet: Fleet, snapshot: PoolSnapshot, *, pool: str, tier: str, num_images: int, lead_s: float
) -> Place:
    """Where a job of `tier` stands whose start tag is `lead_s` ahead of virtual time.

    Before it go all that better tiers have, what of its own tier runs, and what fair order releases first. The minimum shares
    of lower tiers are left to the learnt ratios.
    """
    rank = fleet.tiers[tier].rank
    better = {name for name, other in fleet.tiers.items() if other.rank < rank}
    line, own = snapshot.lines.get(tier, Line()), snapshot.own.get(tier)
    (ahead_s, jobs), (added_s, added) = (
        line.before(lead_s),
        own.added_before(lead_s) if own is not None else (0.0, 0.0),
    )
    ahead_s += added_s + sum(snapshot.lines[name].cost_s for name in better & snapshot.lines.keys())
    ahead_s += sum(
        work.now.cost_s - work.counted.cost_s
        for name, work in snapshot.own.items()
        if name in better
    )
    ahead_s += sum(
        work.cost_s for name, work in snapshot.running.items() if name in better or name == tier
    )
    slots = fleet.pools[pool].slots
    devices = max(1, snapshot.devices)
    images = num_images + sum(work.images for work in snapshot.running.values())
    return Place(
        ahead_s,
        round(jobs + added),
        concurrent_images=min(float(slots), max(float(min(num_images, slots)), images / devices)),
    )


def first_guess_s(
    place: Place, snapshot: PoolSnapshot, *, job_device_s: float, num_images: int
) -> float:
    """Seconds from now to the job's last image, as far as the queue tells; learnt ratios correct it."""
    return raw_eta_s(
        ahead_s=place.ahead_s,
        image_device_s=job_device_s / num_images,
        devices=snapshot.devices,
        concurrent_images=place.concurrent_images,
    )


def refusal(
    fleet: Fleet,
    snapshot: PoolSnapshot,
    place: Place,
    ratios: EtaRatios | None,
    *,
    pool: str,
    tier: str,
    job_device_s: float,
    draw: float,
) -> Refusal | None:
    """Why a job must not be let in now; None if it may.

    job_device_s: its predicted device seconds.  draw: in [0, 1), for the jitter of Retry-After.
    """
    shape, limits = fleet.pools[pool], fleet.tiers[tier]
    if not snapshot.devices and not shape.warm_floor and not shape.scalable:
        return Refusal(
            "unserved",
            f"No worker of pool {pool} is alive, and nothing starts one.",
            _jittered(60, draw),
        )
    own, most_s = snapshot.own.get(tier), limits.max_queued_s_per_tenant
    if own is not None and own.now.cost_s + job_device_s > most_s:
        others = snapshot.lines.get(tier, Line()).weights - (
            own.counted.weight if own.counted.jobs else 0.0
        )
        excess_s = own.now.cost_s + job_device_s - most_s
        wait_s = excess_s * (own.now.weight + others) / own.now.weight / max(1, snapshot.devices)
        detail = f"Your jobs waiting in tier {tier} need {own.now.cost_s:.0f} device seconds; at most {most_s:.0f} may wait."
        return Refusal("tenant_queue_full", detail, _jittered(wait_s, draw))
    if snapshot.handoff_fill > HANDOFF_OVERFULL:
        return Refusal(
            "handoff_full", "Images are made faster than they can be stored.", _jittered(5, draw)
        )
    if snapshot.devices:
        pessimism = min(MOST_PESSIMISM, max(1.0, ratios.p90 if ratios is not None else 1.0))
        wait_s = place.ahead_s / snapshot.devices * pessimism
        if wait_s > limits.start_within_s:
            detail = f"A job of tier {tier} would wait about {wait_s:.0f} s and must start within {limits.start_within_s} s."
            return Refusal("saturated", detail, _jittered(wait_s - limits.start_within_s, draw))
    return None


def _jittered(seconds: float, draw: float) -> int:
    # First: who waits longest is spread, too.
    bounded = min(LONGEST_RETRY_S / (1 + JITTER), max(SHORTEST_RETRY_S / (1 - JITTER), seconds))
    return math.ceil(bounded * (1 - JITTER + 2 * JITTER * draw))
