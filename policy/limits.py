"""What a tenant may use: rates, a budget, stocks, tiers and models. None is no limit."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

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
