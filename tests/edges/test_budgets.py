"""Token buckets in Redis: what is taken, given back and filled again; none is kept for ever."""

import uuid

import pytest

from edges.limits import Budgets
from tests.builders import a_closed_port

PLENTY = {"per_minute": 60.0, "burst": 10.0}  # one a second


@pytest.fixture
def budgets(settings, handoff_redis) -> Budgets:
    return Budgets(settings.handoff_url)


def test_a_budget_is_taken_until_it_holds_no_more_and_then_says_how_long_to_wait(budgets):
    tenant = uuid.uuid4()

    first = budgets.take(tenant, **PLENTY, amount=7)
    second = budgets.take(tenant, **PLENTY, amount=7)

    assert (first.passes, first.left, first.wait_s) == (True, pytest.approx(3, abs=0.2), 0)
    assert (second.passes, second.left) == (False, pytest.approx(3, abs=2))
    assert second.wait_s == pytest.approx(7 - second.left, abs=0.01)  # at one a second


def test_a_refusal_takes_nothing(budgets):
    tenant, slow = uuid.uuid4(), {"per_minute": 0.06, "burst": 10.0}
    budgets.take(tenant, **slow, amount=7)

    refused = [budgets.take(tenant, **slow, amount=7).passes for _ in range(3)]

    assert (refused, budgets.take(tenant, **slow, amount=2.9).passes) == ([False] * 3, True)


def test_a_budget_is_never_filled_beyond_its_burst_by_what_is_given_back(budgets):
    tenant, slow = uuid.uuid4(), {"per_minute": 0.06, "burst": 10.0}
    budgets.take(tenant, **slow, amount=4)

    budgets.give_back(tenant, **slow, amount=100)

    assert budgets.take(tenant, **slow, amount=0).left == pytest.approx(10, abs=0.1)
    assert not budgets.take(tenant, **slow, amount=10.5).passes


def test_a_budget_fills_with_time_up_to_its_burst(budgets, handoff_redis):
    tenant = uuid.uuid4()
    budgets.take(tenant, **PLENTY, amount=10)
    key = f"budget:{tenant}"

    handoff_redis.hincrbyfloat(key, "at", -4)  # as if it had been so long ago
    assert budgets.take(tenant, **PLENTY, amount=0).left == pytest.approx(4, abs=1)
    handoff_redis.hincrbyfloat(key, "at", -1000)
    assert budgets.take(tenant, **PLENTY, amount=0).left == 10


def test_a_budget_is_forgotten_once_it_is_full_again(budgets, handoff_redis):
    tenant = uuid.uuid4()

    budgets.take(tenant, per_minute=6.0, burst=10.0, amount=1)

    assert 100 < handoff_redis.ttl(f"budget:{tenant}") <= 160  # 100 s to fill, and a minute


def test_each_tenant_has_a_budget_of_its_own(budgets):
    budgets.take(uuid.uuid4(), **PLENTY, amount=10)

    assert budgets.take(uuid.uuid4(), **PLENTY, amount=10).passes


def test_without_redis_everything_passes():
    away = Budgets(f"redis://127.0.0.1:{a_closed_port()}/0")

    taken = away.take(uuid.uuid4(), **PLENTY, amount=1000)

    assert (taken.passes, taken.wait_s) == (True, 0)
