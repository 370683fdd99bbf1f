"""List what a tenant may use, and what a key may do.

That is rates, a budget, stocks, tiers and models. `Limits` is the one list of limits. The body that
changes them, the columns that keep them, the command line's parsing and every look-up of a key are
made from its fields; tests/test_params.py compares the rest with it. None is no limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Field

Scope = Literal["generate", "read", "admin", "versions"]
NAMES_VERSIONS: Scope = "versions"  # may ask for `model@version`
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "read")
# Of a tenant: virtual time is device seconds divided by it, and has to stay a number.
MIN_WEIGHT = 0.001
MAX_WEIGHT = 1e6
KEY_GRACE_S = 86_400.0  # how long a key lives on after it was rotated
BUDGET_THRESHOLDS = (50, 80, 100)  # per cent of a monthly budget at which its tenant is told
_MICRO = Decimal("0.000001")


@dataclass(frozen=True)
class Offered:
    """The note of a limit that names tiers or models: those of fleet.toml under `section`."""

    section: Literal["tiers", "models"]


Count = Annotated[int, Field(gt=0, le=1_000_000_000)]
# A budget that needs longer than Redis keeps anything would never fill.
Amount = Annotated[float, Field(ge=0.001, le=1e11)]
Quota = Annotated[Decimal, Field(ge=0, le=1e11)]
Bytes = Annotated[int, Field(ge=0, le=10**15)]
TierNames = Annotated[tuple[str, ...], Offered("tiers")]
ModelNames = Annotated[tuple[str, ...], Offered("models")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """One tenant's limits.

    A megapixel-step is one denoise step of a million pixels, times the model's factor
    (policy/cost.py).
    """

    requests_per_minute: Count | None = None
    megapixel_steps_per_minute: Amount | None = None  # at which its budget fills again
    burst_megapixel_steps: Amount | None = None  # what its budget holds at most
    max_concurrent_jobs: Count | None = None  # that have not ended
    daily_megapixel_steps: Quota | None = None  # of UTC days and months
    monthly_megapixel_steps: Quota | None = None
    monthly_budget: Quota | None = None  # money; it is told of, and refuses nothing
    allowed_tiers: TierNames | None = None
    allowed_models: ModelNames | None = None
    max_stored_bytes: Bytes | None = None  # of pictures that it brought and did not erase
    url_inputs: bool = False  # may the gateway fetch pictures for it?

    @property
    def has_stocks(self) -> bool:
        """Tell whether there is a limit for which the database has to count."""
        stocks = (
            self.max_concurrent_jobs,
            self.daily_megapixel_steps,
            self.monthly_megapixel_steps,
        )
        return any(stock is not None for stock in stocks)

    def allows(self, *, tier: str, model: str) -> bool:
        """Tell whether the tenant may have jobs of this tier and of this model."""
        may_tier = self.allowed_tiers is None or tier in self.allowed_tiers
        may_model = self.allowed_models is None or model in self.allowed_models
        return may_tier and may_model


class InvalidLimits(Exception):
    """Limits that do not go together; `field` is one that has to change, `detail` says why."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


LIMITS = tuple(field.name for field in fields(Limits))  # the columns of `tenants` that are limits


def _note_and_kind(hint: Any) -> tuple[Any, Offered | None]:
    """Return the type of a limit, without its None and its bounds, and its `Offered` note."""
    (hint,) = (kind for kind in get_args(hint) or (hint,) if kind is not type(None))
    kind, *notes = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    return kind, next((note for note in notes if isinstance(note, Offered)), None)


_NOTED = {
    name: _note_and_kind(hint) for name, hint in get_type_hints(Limits, include_extras=True).items()
}
KINDS: Mapping[str, Any] = {name: kind for name, (kind, _) in _NOTED.items()}
OFFERED: Mapping[str, Offered] = {name: note for name, (_, note) in _NOTED.items() if note}


def limits_of(values: Mapping[str, Any]) -> Limits:
    """Read the columns of a tenant's row."""
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Limits(**plain)


def as_column(name: str, value: Any) -> Any:
    """Give a limit, as JSON or a command line says it, the type of its column.

    None takes a limit away: of what a tenant may or may not do, the permission.
    """
    kind = KINDS[name]
    if kind is bool:
        return bool(value)
    if value is None:
        return None
    if kind is Decimal:
        return Decimal(str(value)).quantize(_MICRO)
    return list(value) if kind == tuple[str, ...] else value


def check(limits: Limits) -> None:
    """Raise InvalidLimits for a budget that has a rate and no burst, or a burst and no rate."""
    if (limits.megapixel_steps_per_minute is None) != (limits.burst_megapixel_steps is None):
        both = "megapixel_steps_per_minute and burst_megapixel_steps"
        raise InvalidLimits("burst_megapixel_steps", f"{both} are set, and taken away, together")


@dataclass(frozen=True)
class UsageTotals:
    """A tenant's usage: jobs under way, and megapixel-steps of the day and the month.

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


def stock_never_enough(limits: Limits, *, amount: Decimal, jobs: int) -> StockExceeded | None:
    """Find the first stock that a request exceeds by itself; None if waiting may let it pass."""
    alone = UsageTotals(
        used_today=amount,
        used_this_month=amount,
        active_jobs=jobs,
        day_ends_in_s=0.0,
        month_ends_in_s=0.0,
    )
    return exceeded_stock(limits, alone)


JOBS_RETRY_AFTER_S = 2  # one of them may have ended by then


def exceeded_stock(limits: Limits, totals: UsageTotals) -> StockExceeded | None:
    """Find the first stock that does not cover the totals; None if all do.

    A stock that is used up exactly covers them.
    """
    most_jobs = limits.max_concurrent_jobs
    if most_jobs is not None and totals.active_jobs > most_jobs:
        return StockExceeded(
            "jobs", Decimal(totals.active_jobs), Decimal(most_jobs), JOBS_RETRY_AFTER_S
        )
    today = limits.daily_megapixel_steps
    this_month = limits.monthly_megapixel_steps
    if today is not None and totals.used_today > today:
        return StockExceeded("day", totals.used_today, today, math.ceil(totals.day_ends_in_s))
    if this_month is not None and totals.used_this_month > this_month:
        return StockExceeded(
            "month", totals.used_this_month, this_month, math.ceil(totals.month_ends_in_s)
        )
    return None
