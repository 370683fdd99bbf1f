"""How many connections to Postgres each kind of process opens at most: what an operator adds up against `max_connections`.

A pool keeps `size` of them and opens as many again under load.
"""

# A task holds one for a statement or two; the renewal of leases never waits for a task's.
WORKER, WORKER_BEATS = (
    4,
    1,
)
RESULTS, SWEEPER, WEBHOOKS = 5, 3, 8
GATEWAY_ASIDE = 2  # keys and queues are read beside whatever writes
GATEWAY_READINESS = 1  # /readyz looks however many write


def at_most(kind: str, *, gateway_pool_size: int = 10, web_concurrency: int = 1) -> int:
    """Connections of one process of that kind; of the gateway, of all its processes together."""
    if kind == "gateway":
        return web_concurrency * 2 * (gateway_pool_size + GATEWAY_ASIDE + GATEWAY_READINESS)
    sizes = {
        "worker": WORKER + WORKER_BEATS,
        "results": RESULTS,
        "sweeper": SWEEPER,
        "webhooks": WEBHOOKS,
    }
    return 2 * sizes[kind]
