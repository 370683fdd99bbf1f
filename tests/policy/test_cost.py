"""What an image cost."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.cost import megapixel_steps, price
from tests.builders import a_fleet, resolved


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
def test_the_price_is_device_time_at_the_pool_s_hour_and_the_tier_s_weight(tier, device_seconds, amount):
    assert str(price(a_fleet(), pool="local", tier=tier, device_seconds=device_seconds)) == amount


def test_a_pool_without_a_price_costs_nothing():
    assert price(a_fleet(), pool="big", tier="fast", device_seconds=3600) == 0


@given(st.floats(0, 1e6))
def test_a_price_fits_its_column_and_is_within_half_a_millionth(device_seconds):
    amount = price(a_fleet(), pool="local", tier="fast", device_seconds=device_seconds)

    assert amount == amount.quantize(Decimal("0.000001"))
    assert abs(float(amount) - device_seconds * 2.4 / 3600) <= 0.51e-6


def test_a_price_is_rounded_half_up_and_never_to_even():
    a_millionth_s = 3600 / 1.2 / 1_000_000

    rounded = [str(price(a_fleet(), pool="local", tier="quality", device_seconds=n / 2 * a_millionth_s)) for n in (1, 3, 5)]

    assert rounded == ["0.000001", "0.000002", "0.000003"]


@pytest.mark.parametrize(
    ("cost_factor", "counted"),
    [
        (1.0, "1.966080"),  # 128 x 192 pixels, 20 steps, 4 images
        (2.5, "4.915200"),
        (0.333333, "0.655360"),  # 0.655359344..., and never less than that
        (1e-6, "0.000002"),
    ],
)
def test_megapixel_steps_are_weighted_by_the_model_s_factor_and_rounded_up(cost_factor, counted):
    fleet = a_fleet({"models.pocket.cost_factor": cost_factor})
    job = resolved(fleet, tier="quality", size="128x192", steps=20, n=4)

    assert str(megapixel_steps(fleet, job)) == counted


def test_a_tier_and_a_pool_that_the_catalogue_no_longer_has_weigh_one_and_cost_nothing():
    assert str(price(a_fleet(), pool="local", tier="gone", device_seconds=3600)) == "1.200000"
    assert price(a_fleet(), pool="gone", tier="fast", device_seconds=3600) == 0


def test_a_model_that_the_catalogue_no_longer_has_counts_with_factor_one():
    fleet = a_fleet({"models.pocket.cost_factor": 2.5})
    job = resolved(fleet, steps=10)
    without = fleet.model_copy(update={"models": {"large": fleet.models["large"]}})

    assert megapixel_steps(without, job) * 5 == megapixel_steps(fleet, job) * 2
