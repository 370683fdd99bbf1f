"""What a tenant may use: rates, a budget, stocks, tiers and models. None is no limit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

SCOPES = ("generate", "read", "admin")
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1e6  # of a tenant: virtual time is device seconds divided by it, and has to stay a number
KEY_GRACE_S = 86_400.0  # how long a key lives on after it was rotated


@dataclass(frozen=True, kw_only=True)
class Limits:
    """One tenant's. A megapixel-step is one denoise step of a million pixels, times the model's factor (policy/cost.py)."""

    requests_per_minute: int | None = None
    megapixel_steps_per_minute: float | None = None  # at which its budget fills again
    burst_megapixel_steps: float | None = None  # what its budget holds at most; set together with the rate
    max_concurrent_jobs: int | None = None  # that have not ended
    daily_megapixel_steps: Decimal | None = None  # of UTC days and months
    monthly_megapixel_steps: Decimal | None = None
    allowed_tiers: tuple[str, ...] | None = None
    allowed_models: tuple[str, ...] | None = None
    max_stored_bytes: int | None = None  # of pictures that it brought and did not erase
    url_inputs: bool = False  # may the gateway fetch pictures for it?

    @property
    def has_stocks(self) -> bool:
        """Is there one that the database has to count?"""
        return self.max_concurrent_jobs is not None or self.daily_megapixel_steps is not None or self.monthly_megapixel_steps is not None

    def allows(self, *, tier: str, model: str) -> bool:
        """May the tenant have jobs of the tier, of the model?"""
        return (self.allowed_tiers is None or tier in self.allowed_tiers) and (self.allowed_models is None or model in self.allowed_models)


def limits_of(values: Mapping[str, Any]) -> Limits:
    """From the columns of a tenant's row."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Limits(**plain)


@dataclass(frozen=True)
class UsageTotals:
    """What a tenant has used, and has under way.

    used_today, used_this_month: megapixel-steps reserved, settled and abandoned, by the UTC day and
    month.  day_ends_in_s, month_ends_in_s: seconds until these end.
    """

    used_today: Decimal
    used_this_month: Decimal
    active_jobs: int
    day_ends_in_s: float
    month_ends_in_s: float


@dataclass(frozen=True)
class StockExceeded:
    """A stock of a tenant's that does not cover what it has used.

    used, limit: jobs, or megapixel-steps of the day or the month.  retry_after_s: when there may be
    more of it.
    """

    stock: Literal["jobs", "day", "month"]
    used: Decimal
    limit: Decimal
    retry_after_s: int


JOBS_RETRY_AFTER_S = 2  # one of them may have ended by then


def exceeded_stock(limits: Limits, totals: UsageTotals) -> StockExceeded | None:
    """Find the first stock that does not cover the totals; None if all do. What is used up exactly is covered."""
    most_jobs = limits.max_concurrent_jobs
    if most_jobs is not None and totals.active_jobs > most_jobs:
        return StockExceeded("jobs", Decimal(totals.active_jobs), Decimal(most_jobs), JOBS_RETRY_AFTER_S)
    today, this_month = limits.daily_megapixel_steps, limits.monthly_megapixel_steps
    if today is not None and totals.used_today > today:
        return StockExceeded("day", totals.used_today, today, math.ceil(totals.day_ends_in_s))
    if this_month is not None and totals.used_this_month > this_month:
        return StockExceeded("month", totals.used_this_month, this_month, math.ceil(totals.month_ends_in_s))
    return None
