"""How tiers share one worker's slots: a lower tier never takes the last ones, and a guaranteed share is never taken away."""

from collections.abc import Mapping

from policy.fleet import Fleet


def guaranteed_slots(fleet: Fleet, tier: str, slots: int) -> int:
    """The images of `tier` that a worker with `slots` always has room for."""
    return round(fleet.tiers[tier].guaranteed_share * slots)


def may_take(fleet: Fleet, tier: str, held: Mapping[str, int], slots: int) -> bool:
    """Whether a worker that holds `held` images by tier takes another job of `tier`.

    Yes while it holds less than its slots minus what is guaranteed to higher ranks, or less than the tier's own guarantee.
    """
    total = sum(held.values())
    if total >= slots:
        return False
    rank = fleet.tiers[tier].rank
    kept = sum(guaranteed_slots(fleet, name, slots) for name, other in fleet.tiers.items() if other.rank < rank)
    return total < max(1, slots - kept) or held.get(tier, 0) < guaranteed_slots(fleet, tier, slots)
