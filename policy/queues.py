"""Names of the Celery queues and of the tasks: the only words that rooms exchange through the broker."""

from policy.fleet import Fleet

MAINTENANCE = "maintenance"

RENDER_JOB = "tasks.render.render_job"
STORE_IMAGES = "tasks.store.store_images"
SWEEP = "tasks.sweep.sweep"


def render_queue(pool: str, tier: str) -> str:
    """Where jobs of `tier` wait for a worker of `pool`."""
    return f"{pool}.{tier}"


def results_queue(tier: str) -> str:
    """Where decoded images of `tier` wait to be stored."""
    return f"results.{tier}"


def render_queues(fleet: Fleet, pool: str) -> list[str]:
    """What a worker of `pool` consumes, in rank order."""
    return [render_queue(pool, tier) for tier in fleet.tiers_by_rank]


def results_queues(fleet: Fleet) -> list[str]:
    """What a results worker consumes, in rank order."""
    return [results_queue(tier) for tier in fleet.tiers_by_rank]


def all_queues(fleet: Fleet) -> list[str]:
    """Every queue of the house."""
    return [*(queue for pool in fleet.pools for queue in render_queues(fleet, pool)), *results_queues(fleet), MAINTENANCE]
