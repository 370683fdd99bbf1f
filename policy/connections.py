"""Count the connections to Postgres that each kind of process opens at most.

An operator compares their sum with `max_connections`. A pool keeps `size` of them and opens as many
again under load.
"""

WORKER = 4  # a task holds one for a statement or two
WORKER_BEATS = 1  # the renewal of leases never waits for a task's connection
RESULTS = 5
SWEEPER = 3
WEBHOOKS = 8
GATEWAY_ASIDE = 2  # keys and queues are read while all others are busy writing
GATEWAY_READINESS = 1  # /readyz answers while all others are busy


def at_most(kind: str, *, gateway_pool_size: int = 10, web_concurrency: int = 1) -> int:
    """Count the connections of one process of that kind; for the gateway, of all its processes."""
    if kind == "gateway":
        return web_concurrency * 2 * (gateway_pool_size + GATEWAY_ASIDE + GATEWAY_READINESS)
    sizes = {
        "worker": WORKER + WORKER_BEATS,
        "results": RESULTS,
        "sweeper": SWEEPER,
        "webhooks": WEBHOOKS,
    }
    return 2 * sizes[kind]
