"""What an image cost."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.cost import megapixel_steps, pool_cost, price
from tests.builders import a_fleet, resolved


def paid(fleet, *, pool="local", tier, device_seconds):
    return price(fleet, tier=tier, cost=pool_cost(fleet, pool, device_seconds))


@pytest.mark.parametrize(
    ("tier", "device_seconds", "amount"),
    [
        ("quality", 3600, "1.200000"),
        ("fast", 3600, "2.400000"),
        ("batch", 3600, "0.600000"),
        ("quality", 1, "0.000333"),
        ("quality", 0, "0.000000"),
        ("quality", 0.0015, "0.000001"),  # half a millionth is rounded up
        ("quality", 0.00149, "0.000000"),
    ],
)
def test_the_price_is_device_time_at_the_pool_s_hour_and_the_tier_s_weight(
    tier, device_seconds, amount
):
    assert str(paid(a_fleet(), tier=tier, device_seconds=device_seconds)) == amount


def test_a_pool_without_a_price_costs_nothing():
    assert paid(a_fleet(), pool="big", tier="fast", device_seconds=3600) == 0


@given(st.floats(0, 1e6))
def test_a_price_fits_its_column_and_is_within_half_a_millionth(device_seconds):
    amount = paid(a_fleet(), tier="fast", device_seconds=device_seconds)

    assert amount == amount.quantize(Decimal("0.000001"))
    assert abs(float(amount) - device_seconds * 2.4 / 3600) <= 0.51e-6


@pytest.mark.parametrize(
    ("factor", "params", "counts"),
    [
        (1.0, {}, "0.065536"),  # 128 x 128 pixels, 4 steps
        (1.0, {"n": 3}, "0.196608"),
        (1.0, {"size": "128x192"}, "0.098304"),
        (1.0, {"steps": 20}, "0.327680"),
        (2.5, {}, "0.163840"),
        (2.5, {"n": 3, "steps": 20, "size": "128x192"}, "3.686400"),
        (0.3333333, {}, "0.021846"),  # 0.0218453311...
        (0.0000001, {}, "0.000001"),
    ],
)
def test_megapixel_steps_are_all_that_a_job_asks_for_rounded_up(factor, params, counts):
    fleet = a_fleet({"models.pocket.cost_factor": factor})

    assert str(megapixel_steps(fleet, resolved(fleet, tier="fast", **params))) == counts


def test_a_price_is_rounded_half_up_and_never_to_even():
    a_millionth_s = 3600 / 1.2 / 1_000_000

    rounded = [
        str(paid(a_fleet(), tier="quality", device_seconds=n / 2 * a_millionth_s))
        for n in (1, 3, 5)
    ]

    assert rounded == ["0.000001", "0.000002", "0.000003"]


def test_a_tier_and_a_pool_that_the_catalogue_no_longer_has_weigh_one_and_cost_nothing():
    assert str(paid(a_fleet(), tier="gone", device_seconds=3600)) == "1.200000"
    assert paid(a_fleet(), pool="gone", tier="fast", device_seconds=3600) == 0


def test_a_model_that_the_catalogue_no_longer_has_counts_with_factor_one():
    fleet = a_fleet({"models.pocket.cost_factor": 2.5})
    job = resolved(fleet, steps=10)
    without = fleet.model_copy(update={"models": {"large": fleet.models["large"]}})

    assert megapixel_steps(without, job) * 5 == megapixel_steps(fleet, job) * 2
