"""How many images of a (pool, tier) may be in the hands of Celery and its workers at once."""

from policy.fleet import Fleet


def announced_limit(fleet: Fleet, pool: str, live_slots: int) -> int:
    """Slots of the live workers plus one batch, in images: workers never run dry, and the backlog stays in Postgres, in fair order.

    live_slots: the sum over the pool's live workers; 0 counts as one worker, so that the first to come finds work.
    """
    shape = fleet.pools[pool]
    return (live_slots or shape.slots) + shape.max_batch_rows
