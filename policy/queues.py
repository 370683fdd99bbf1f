"""Name the Celery queues and the tasks.

These names are all that rooms share with each other through the broker.
"""

from policy.fleet import Fleet

WEBHOOKS = "webhooks"

RENDER_JOB = "tasks.render.render_job"
STORE_IMAGES = "tasks.store.store_images"
STAGE_INPUTS = "tasks.staging.stage_inputs"
TIDY_STORE = "tasks.store.tidy_store"
DELIVER_WEBHOOK = "tasks.deliver.deliver_webhook"

# Header of a render message: the job's images, which a worker counts until it has the lease.
NUM_IMAGES = "num_images"


def render_queue(pool: str, tier: str, *, is_front: bool = False) -> str:
    """Name the queue where jobs of `tier` wait for a worker of `pool`.

    is_front: the front queue, from which workers take first, and beyond their slots.
    """
    return f"{pool}.{tier}.front" if is_front else f"{pool}.{tier}"


def queue_of_jobs(fleet: Fleet, pool: str, tier: str, *, is_front: bool) -> str:
    """Name the queue where jobs of `tier` wait now.

    Those of a tier that the catalogue no longer has wait with the last in rank.
    """
    return render_queue(pool, fleet.queue_tier(tier), is_front=is_front)


def render_queues(fleet: Fleet, pool: str) -> list[str]:
    """List the queues that a worker of `pool` consumes.

    In rank order, each tier's front queue before its own.
    """
    return [
        render_queue(pool, tier, is_front=is_front)
        for tier in fleet.tiers_by_rank
        for is_front in (True, False)
    ]


def tier_of(queue: str) -> tuple[str, bool]:
    """Return the tier of a render queue, and whether it is a front queue."""
    _, tier, *front = queue.split(".")
    return tier, bool(front)


def results_queue(fleet: Fleet, tier: str) -> str:
    """Name the queue where decoded images of `tier` wait to be stored.

    Those of a tier that the catalogue no longer has wait with the last in rank.
    """
    return f"results.{fleet.queue_tier(tier)}"


def results_queues(fleet: Fleet) -> list[str]:
    """List the queues that a results worker consumes, in rank order."""
    return [results_queue(fleet, tier) for tier in fleet.tiers_by_rank]


def all_queues(fleet: Fleet) -> list[str]:
    """List every queue."""
    return [
        *(queue for pool in fleet.pools for queue in render_queues(fleet, pool)),
        *results_queues(fleet),
        WEBHOOKS,
    ]
