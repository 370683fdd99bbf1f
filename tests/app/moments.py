"""What gateways say of this very moment, though they look at their queues a few times a second.

Apart from conftest.py, of which pytest and the tests that import it have one each.
"""

from app.runtime import Runtime

# The gateways of the test that runs, each with the pool whose queues it is asked about.
OPEN: list[tuple[Runtime, str]] = []


def of_this_moment(ask):
    """What `ask()` says where every gateway has to look at its queues again."""
    for parts, pool in OPEN:
        parts.forecaster._pools.forget(pool)
    return ask()
