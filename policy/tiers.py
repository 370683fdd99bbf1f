"""How tiers share one worker's slots: lower tiers are in no better one's way, and a guaranteed share is never taken away.

The gate in front of a worker's queues. It counts images, also those of messages that were taken and have no lease yet. A job is taken
while its tier has room for one image more and so may stick out over the edge: nobody knows how large the next message is, and a large
job that had to wait until all of it fits would wait for ever behind small ones. What sticks out is parked by the engine; it is less than
one job of a tier, and counts against the tier's next one.
"""

from collections.abc import Mapping

from policy.fleet import Fleet

# x slots: what a worker takes from front queues at most. What is beyond its slots is parked, where it
# costs memory alone.
MAX_FRONT_LOAD = 2


def guaranteed_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """The images of `tier` that a worker with `slots` always has room for: its share, and one at least if it has a share at all."""
    share = fleet.tiers[tier].guaranteed_share
    return max(1, round(share * slots)) if share else 0


def own_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """How many images of `tier` and of better ones keep more of `tier` out: all slots but those guaranteed to better tiers.

    slots: of one worker, or of all live ones together.
    """
    rank = fleet.tier_or_retired(tier).rank
    kept = sum(
        guaranteed_slots(fleet, name, slots)
        for name, other in fleet.tiers.items()
        if other.rank < rank
    )
    return max(1, slots - kept)


def may_take(
    fleet: Fleet, tier: str, held: Mapping[str, int], slots: int, *, is_front: bool = False
) -> bool:
    """Whether a worker that holds `held` images by tier takes another job of `tier`.

    Yes while it holds less than the tier's own guarantee, whatever it holds of others, or while all it holds of this and of better tiers
    is less than its slots minus what is guaranteed to the better ones. What it holds of lower tiers is in nobody's way: their images are
    parked at the next step. From the front queue it takes beyond its slots, too, as long as there is room left for what is guaranteed to
    the others.
    """
    if held.get(tier, 0) < guaranteed_slots(fleet, tier, slots):
        return True
    rank = fleet.tiers[tier].rank
    before = sum(
        images for name, images in held.items() if fleet.tier_or_retired(name).rank <= rank
    )
    if before < own_slots(fleet, tier, slots):
        return True
    promised = sum(
        max(0, guaranteed_slots(fleet, name, slots) - held.get(name, 0))
        for name in fleet.tiers
        if name != tier
    )
    return is_front and sum(held.values()) + promised < MAX_FRONT_LOAD * slots


def most_jobs(fleet: Fleet, slots: int) -> int:
    """Jobs that a worker with `slots` has at once at most, however they come: each needs a thread, or a better tier finds none free."""
    return MAX_FRONT_LOAD * slots + sum(
        _most_of_its_own(fleet, tier, slots) for tier in fleet.tiers
    )


def _most_of_its_own(fleet: Fleet, tier: str, slots: int) -> int:
    """Images of `tier` below which its own queue may be open."""
    return max(guaranteed_slots(fleet, tier, slots), own_slots(fleet, tier, slots))
