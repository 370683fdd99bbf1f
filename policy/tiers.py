"""How tiers share one worker's slots: a lower tier never takes the last ones."""

from policy.fleet import Fleet


def slot_caps(fleet: Fleet, slots: int) -> dict[str, int]:
    """How many of `slots` images each tier may hold on one worker: all, less what higher ranks are guaranteed; at least 1."""
    caps, kept = {}, 0
    for name in fleet.tiers_by_rank:
        caps[name] = max(1, slots - kept)
        kept += round(fleet.tiers[name].guaranteed_share * slots)
    return caps
