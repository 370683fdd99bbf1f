"""Names of the Celery queues and of the tasks: the only words that rooms exchange through the broker."""

from policy.fleet import Fleet

WEBHOOKS = "webhooks"

RENDER_JOB = "tasks.render.render_job"
STORE_IMAGES = "tasks.store.store_images"
STAGE_INPUTS = "tasks.staging.stage_inputs"
TIDY_STORE = "tasks.store.tidy_store"
DELIVER_WEBHOOK = "tasks.deliver.deliver_webhook"

# Header of a job's render message: what it counts in a worker's hand until the lease tells.
NUM_IMAGES = "num_images"


def render_queue(pool: str, tier: str, *, is_front: bool = False) -> str:
    """Where jobs of `tier` wait for a worker of `pool`; the front queue is taken from first, and beyond a worker's slots."""
    return f"{pool}.{tier}.front" if is_front else f"{pool}.{tier}"


def render_queues(fleet: Fleet, pool: str) -> list[str]:
    """What a worker of `pool` consumes: in rank order, each tier's front queue before its own."""
    return [
        render_queue(pool, tier, is_front=is_front)
        for tier in fleet.tiers_by_rank
        for is_front in (True, False)
    ]


def tier_of(queue: str) -> tuple[str, bool]:
    """The tier of a render queue, and whether it is a front queue."""
    _, tier, *front = queue.split(".")
    return tier, bool(front)


def results_queue(fleet: Fleet, tier: str) -> str:
    """Where decoded images of `tier` wait to be stored; those of a tier that the catalogue no longer has, with the last in rank."""
    return f"results.{fleet.queue_tier(tier)}"


def results_queues(fleet: Fleet) -> list[str]:
    """What a results worker consumes, in rank order."""
    return [results_queue(fleet, tier) for tier in fleet.tiers_by_rank]


def all_queues(fleet: Fleet) -> list[str]:
    """Every queue of the house."""
    return [
        *(queue for pool in fleet.pools for queue in render_queues(fleet, pool)),
        *results_queues(fleet),
        WEBHOOKS,
    ]
