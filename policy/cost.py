"""What an image cost, and what it counts before anybody knows."""

from decimal import ROUND_HALF_UP, ROUND_UP, Decimal

from policy.catalog import Resolved
from policy.fleet import Fleet

_MICRO = Decimal("0.000001")


def price(fleet: Fleet, *, pool: str, tier: str, device_seconds: float) -> Decimal:
    """Price of `device_seconds` in `fleet.currency`, to six decimals: device time x the pool's hourly price x the tier's weight.

    A pool that fleet.toml has no more costs nothing, a tier that it has no more weighs 1: the job was accepted and must end.
    """
    hourly_price = fleet.pool_or_retired(pool).gpu_hour_price
    hourly = Decimal(str(hourly_price)) * Decimal(str(fleet.tier_or_retired(tier).price_weight))
    return (Decimal(str(device_seconds)) * hourly / 3600).quantize(_MICRO, rounding=ROUND_HALF_UP)


def megapixel_steps(fleet: Fleet, job: Resolved) -> Decimal:
    """What a job counts against budgets and quotas: megapixels x steps x images x the model's factor, rounded up to six decimals.

    A model that fleet.toml has no more counts with factor 1.
    """
    factor = fleet.model_or_retired(job.model).cost_factor
    exact = Decimal(job.width_px * job.height_px * job.num_steps * job.num_images) / 1_000_000 * Decimal(str(factor))
    return exact.quantize(_MICRO, rounding=ROUND_UP)
