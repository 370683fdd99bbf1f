"""Who is let in, how long they will wait, and how much may be in the hands of Celery and its workers at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from policy.fleet import Fleet
from policy.prediction import EtaRatios, Line, Waiting, raw_eta_s

HANDOFF_FULL = 0.8  # of its memory: workers take no more jobs; a little above, the gateway accepts none
HANDOFF_OVERFULL = 0.9
HANDOFF_FULL_FOR_INPUTS = 0.7  # below what closes the workers: pictures that wait for a worker must not keep it from taking their jobs
HANDOFF_FULL_FOR_PREVIEWS = 0.5  # whoever watches must not be able to close anything
MOST_PESSIMISM = 4.0  # p90 of past jobs / their guess: beyond this it says more about an incident than about the queue
JITTER = 0.2  # of Retry-After, so that those refused together do not come back together
LONGEST_RETRY_S, SHORTEST_RETRY_S = 600, 1


def announced_limit(fleet: Fleet, pool: str, live_slots: int) -> int:
    """Slots of the live workers plus one batch, in images: workers never run dry, and the backlog stays in Postgres, in fair order.

    live_slots: the sum over the pool's live workers; 0 counts as one worker, so that the first to come finds work.
    """
    shape = fleet.pools[pool]
    return (live_slots or shape.slots) + shape.max_batch_rows


def tier_slots(fleet: Fleet, tier: str, live_slots: int) -> int:
    """Slots of the live workers that jobs of `tier` may take, in images: all but what is guaranteed to better tiers."""
    rank = fleet.tiers[tier].rank if tier in fleet.tiers else 0
    kept = sum(other.guaranteed_share for other in fleet.tiers.values() if other.rank < rank)
    return max(1, round(live_slots * (1 - kept)))


def least_share(fleet: Fleet, pool: str) -> int:
    """Images that a tenant may always have in hand, however many share the tier: enough for one person at work."""
    return min(4, fleet.pools[pool].slots)


@dataclass(frozen=True)
class Running:
    """Running jobs of one tier: predicted device seconds, and images."""

    cost_s: float = 0.0
    images: int = 0


@dataclass(frozen=True)
class Own:
    """What the asking tenant has waiting in one tier: as its line counts it, and with what it adds right now."""

    counted: Waiting
    now: Waiting

    def added_before(self, lead_s: float) -> tuple[float, float]:
        """(device seconds, jobs) before a place, beyond what the line knows of."""
        (known_s, known), (now_s, now) = self.counted.before(lead_s), self.now.before(lead_s)
        return now_s - known_s, now - known


@dataclass(frozen=True)
class Outlook:
    """A pool at one moment: its working devices, what waits by tier, what runs, how full the hand-off is; and the asking tenant's own."""

    devices: int
    lines: Mapping[str, Line] = field(default_factory=dict)
    running: Mapping[str, Running] = field(default_factory=dict)
    handoff_fill: float = 0.0
    own: Mapping[str, Own] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a job stands: device seconds and jobs that go before it, and how many images will share its device."""

    ahead_s: float
    jobs_ahead: int
    company: float


@dataclass(frozen=True)
class Refusal:
    """Why a job is not let in. reason: unserved, tenant_queue_full, saturated or handoff_full."""

    reason: str
    detail: str
    retry_after_s: int


def place_in(fleet: Fleet, outlook: Outlook, *, pool: str, tier: str, num_images: int, lead_s: float) -> Place:
    """Where a job of `tier` stands whose start tag is `lead_s` ahead of virtual time.

    Before it go all that better tiers have, what of its own tier runs, and what fair order releases first. The minimum shares
    of lower tiers are left to the learnt ratios.
    """
    rank = fleet.tiers[tier].rank
    better = {name for name, other in fleet.tiers.items() if other.rank < rank}
    line, own = outlook.lines.get(tier, Line()), outlook.own.get(tier)
    (ahead_s, jobs), (added_s, added) = line.before(lead_s), own.added_before(lead_s) if own is not None else (0.0, 0.0)
    ahead_s += added_s + sum(outlook.lines[name].cost_s for name in better & outlook.lines.keys())
    ahead_s += sum(work.now.cost_s - work.counted.cost_s for name, work in outlook.own.items() if name in better)
    ahead_s += sum(work.cost_s for name, work in outlook.running.items() if name in better or name == tier)
    slots = fleet.pools[pool].slots
    devices = max(1, outlook.devices)
    images = num_images + sum(work.images for work in outlook.running.values())
    return Place(ahead_s, round(jobs + added), company=min(float(slots), max(float(min(num_images, slots)), images / devices)))


def first_guess_s(place: Place, outlook: Outlook, *, own_s: float, num_images: int) -> float:
    """Seconds from now to the job's last image, as far as the queue tells; learnt ratios correct it."""
    return raw_eta_s(ahead_s=place.ahead_s, own_s=own_s / num_images, devices=outlook.devices, company=place.company)


def refusal(
    fleet: Fleet,
    outlook: Outlook,
    place: Place,
    ratios: EtaRatios | None,
    *,
    pool: str,
    tier: str,
    own_s: float,
    draw: float,
) -> Refusal | None:
    """Why a job must not be let in now; None if it may.

    own_s: its predicted device seconds.  draw: in [0, 1), for the jitter of Retry-After.
    """
    shape, limits = fleet.pools[pool], fleet.tiers[tier]
    if not outlook.devices and not shape.warm_floor and not shape.scalable:
        return Refusal("unserved", f"No worker of pool {pool} is alive, and nothing starts one.", _jittered(60, draw))
    own, most_s = outlook.own.get(tier), limits.max_queued_s_per_tenant
    if own is not None and own.now.cost_s + own_s > most_s:
        others = outlook.lines.get(tier, Line()).weights - (own.counted.weight if own.counted.jobs else 0.0)
        excess_s = own.now.cost_s + own_s - most_s
        wait_s = excess_s * (own.now.weight + others) / own.now.weight / max(1, outlook.devices)
        detail = f"Your jobs waiting in tier {tier} need {own.now.cost_s:.0f} device seconds; at most {most_s:.0f} may wait."
        return Refusal("tenant_queue_full", detail, _jittered(wait_s, draw))
    if outlook.handoff_fill > HANDOFF_OVERFULL:
        return Refusal("handoff_full", "Images are made faster than they can be stored.", _jittered(5, draw))
    if outlook.devices:
        pessimism = min(MOST_PESSIMISM, max(1.0, ratios.p90 if ratios is not None else 1.0))
        wait_s = place.ahead_s / outlook.devices * pessimism
        if wait_s > limits.start_within_s:
            detail = f"A job of tier {tier} would wait about {wait_s:.0f} s and must start within {limits.start_within_s} s."
            return Refusal("saturated", detail, _jittered(wait_s - limits.start_within_s, draw))
    return None


def _jittered(seconds: float, draw: float) -> int:
    bounded = min(LONGEST_RETRY_S / (1 + JITTER), max(SHORTEST_RETRY_S / (1 - JITTER), seconds))  # first: who waits longest is spread, too
    return math.ceil(bounded * (1 - JITTER + 2 * JITTER * draw))
