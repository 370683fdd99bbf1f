"""Whether a tenant's stocks cover what it has used, and when there may be more."""

from decimal import Decimal

import pytest

from policy.limits import JOBS_RETRY_AFTER_S, Limits, StockExceeded, UsageTotals, exceeded_stock

USED = UsageTotals(
    used_today=Decimal("10"),
    used_this_month=Decimal("100"),
    active_jobs=4,
    day_ends_in_s=3600.2,
    month_ends_in_s=86_400.0,
)


def test_stocks_that_are_no_limit_cover_everything():
    assert exceeded_stock(Limits(), USED) is None


def test_stocks_that_are_used_up_exactly_cover_it():
    limits = Limits(
        max_concurrent_jobs=4,
        daily_megapixel_steps=Decimal(10),
        monthly_megapixel_steps=Decimal(100),
    )

    assert exceeded_stock(limits, USED) is None


def test_stocks_of_jobs_are_exceeded_by_one_more():
    assert exceeded_stock(Limits(max_concurrent_jobs=3), USED) == StockExceeded(
        "jobs", Decimal(4), Decimal(3), JOBS_RETRY_AFTER_S
    )


@pytest.mark.parametrize(
    ("limit", "exceeded"),
    [
        (
            {"daily_megapixel_steps": Decimal("9.999999")},
            StockExceeded("day", Decimal(10), Decimal("9.999999"), 3601),
        ),
        (
            {"monthly_megapixel_steps": Decimal("99.999999")},
            StockExceeded("month", Decimal(100), Decimal("99.999999"), 86_400),
        ),
    ],
)
def test_stocks_of_a_period_tell_when_that_period_ends(limit, exceeded):
    assert exceeded_stock(Limits(**limit), USED) == exceeded


def test_stocks_are_told_of_jobs_first_then_of_the_day_then_of_the_month():
    everything = {
        "max_concurrent_jobs": 1,
        "daily_megapixel_steps": Decimal(1),
        "monthly_megapixel_steps": Decimal(1),
    }
    told = []
    for name in everything:
        told.append(exceeded_stock(Limits(**everything), USED).stock)
        everything = {**everything, name: None}

    assert told == ["jobs", "day", "month"]
