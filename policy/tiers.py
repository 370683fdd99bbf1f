"""How tiers share one worker's slots: a lower tier never takes the last ones, and a guaranteed share is never taken away."""

from collections.abc import Mapping

from policy.fleet import Fleet

FRONT_FULL = 2  # times its slots a worker takes from front queues at most: what is beyond them is parked, where it costs memory alone
OVERFULL = 3  # and at all: the best tier has every slot, though lower ones had taken theirs before


def guaranteed_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """The images of `tier` that a worker with `slots` always has room for."""
    return round(fleet.tiers[tier].guaranteed_share * slots)


def may_take(fleet: Fleet, tier: str, held: Mapping[str, int], slots: int, *, is_front: bool = False) -> bool:
    """Whether a worker that holds `held` images by tier takes another job of `tier`.

    Yes while all it holds of this and of better tiers is less than its slots minus what is guaranteed to the better ones, or while
    it holds less than the tier's own guarantee. What it holds of lower tiers is in nobody's way: their images are parked at the next
    step. From the front queue it takes beyond its slots, too, as long as there is room left for what is guaranteed to the others.
    """
    shares = {name: guaranteed_slots(fleet, name, slots) for name in fleet.tiers}
    promised = sum(max(0, share - held.get(name, 0)) for name, share in shares.items() if name != tier)
    total = sum(held.values())
    if held.get(tier, 0) < shares[tier]:
        return total < OVERFULL * slots
    if total + promised >= (FRONT_FULL if is_front else OVERFULL) * slots:
        return False
    if is_front:
        return True
    rank = fleet.tiers[tier].rank
    kept = sum(shares[name] for name, other in fleet.tiers.items() if other.rank < rank)
    before = sum(images for name, images in held.items() if name not in fleet.tiers or fleet.tiers[name].rank <= rank)
    return before < max(1, slots - kept)
