"""Share one worker's slots between tiers.

Lower tiers never block better ones, and a guaranteed share is never taken away. These functions
decide which of a worker's queues are open. They count images, also those of messages that were
taken and have no lease yet. A job is taken while its tier has room for one image more, so it may
exceed the limit: the size of the next message is not known, and a large job that had to wait until
all of it fits would wait for ever behind small ones. The engine parks the excess; it is less than
one job of a tier, and counts against the tier's next one.
"""

from collections.abc import Mapping

from policy.fleet import Fleet

# Times its slots: the images up to which a worker takes from front queues. Those beyond its slots
# are parked, where they cost memory alone.
MAX_FRONT_LOAD = 2


def guaranteed_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """Count the images of `tier` that a worker with `slots` always has room for.

    Its share, and at least one if it has a share at all.
    """
    share = fleet.tiers[tier].guaranteed_share
    return max(1, round(share * slots)) if share else 0


def own_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """Count the images of `tier` and of better ones at which no more of `tier` are taken.

    All slots but those guaranteed to better tiers. slots: of one worker, or of all live ones
    together.
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
    """Tell whether a worker that holds `held` images by tier takes another job of `tier`.

    Yes while it holds less than the tier's own guarantee, whatever it holds of others. Yes also
    while its images of this and of better tiers are fewer than its slots without those guaranteed
    to the better ones. Images of lower tiers do not count: they are parked at the next step. From
    the front queue it takes beyond its slots, too, as long as there is room left for what is
    guaranteed to the others.
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
    """Count the jobs that a worker with `slots` has at once at most, in whatever order they come.

    Each needs a thread: with fewer threads a better tier might find none free. A tier's own queue
    is open below all slots at most, whatever the shares: they may change while it works.
    """
    return (MAX_FRONT_LOAD + len(fleet.tiers)) * slots
