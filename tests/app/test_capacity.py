"""What one process has only so much of.

Taken, given back, and counted right whoever comes at once.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, Gauge

from app.live.capacity import Capacity


def test_capacity_that_is_released_can_be_taken_again():
    capacity, tenant = Capacity(1), uuid.uuid4()

    holding = capacity.take(tenant)
    assert capacity.take(tenant) is None
    holding.release()

    assert capacity.take(tenant) is not None


def test_releasing_twice_gives_back_once():
    capacity, tenant, other = Capacity(2), uuid.uuid4(), uuid.uuid4()
    holding = capacity.take(tenant)
    assert capacity.take(other) is not None

    holding.release()
    holding.release()

    assert capacity.take(tenant) is not None
    assert capacity.take(uuid.uuid4()) is None


def test_one_tenant_does_not_take_the_last_from_another():
    capacity, greedy = Capacity(8), uuid.uuid4()

    holdings = [capacity.take(greedy) for _ in range(8)]

    assert sum(holding is not None for holding in holdings) == 6
    assert capacity.held_by(greedy) == 6
    assert capacity.take(uuid.uuid4()) is not None


def test_a_crowd_neither_loses_nor_gains_any():
    capacity, tenants = Capacity(16), [uuid.uuid4() for _ in range(4)]

    def come_and_go(number):
        holding = capacity.take(tenants[number % 4])
        if holding is not None:
            holding.release()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(come_and_go, range(2000)))

    assert [capacity.held_by(tenant) for tenant in tenants] == [0] * 4
    assert capacity.take(tenants[0], 16) is not None


def test_a_gauge_shows_what_is_held_now():
    registry = CollectorRegistry()
    capacity = Capacity(10, Gauge("held", "How much is held.", registry=registry))
    seen = []

    with capacity.take(uuid.uuid4(), 4):
        seen.append(registry.get_sample_value("held"))
        assert capacity.take(uuid.uuid4(), 7) is None
        seen.append(registry.get_sample_value("held"))
    seen.append(registry.get_sample_value("held"))

    assert seen == [4, 4, 0]
