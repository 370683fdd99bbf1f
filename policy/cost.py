"""What an image cost, and what it counts before anybody knows."""

from decimal import ROUND_HALF_UP, ROUND_UP, Decimal

from policy.fleet import Fleet
from policy.params import Resolved

_MICRO = Decimal("0.000001")


def price(fleet: Fleet, *, pool: str, tier: str, device_seconds: float) -> Decimal:
    """Price of `device_seconds` in `fleet.currency`, to six decimals: device time x the pool's hourly price x the tier's weight.

    A pool that fleet.toml has no more costs nothing, a tier that it has no more weighs 1: the job was accepted and must end.
    """
    hourly_price = fleet.pools[pool].gpu_hour_price if pool in fleet.pools else 0.0
    weight = fleet.tiers[tier].price_weight if tier in fleet.tiers else 1.0
    hourly = Decimal(str(hourly_price)) * Decimal(str(weight))
    return (Decimal(str(device_seconds)) * hourly / 3600).quantize(_MICRO, rounding=ROUND_HALF_UP)


def megapixel_steps(fleet: Fleet, job: Resolved) -> Decimal:
    """What a job counts against budgets and quotas: megapixels x steps x images x the model's factor, rounded up to six decimals.

    A model that fleet.toml has no more counts with factor 1.
    """
    factor = fleet.models[job.model].cost_factor if job.model in fleet.models else 1.0
    exact = Decimal(job.width_px * job.height_px * job.num_steps * job.num_images) / 1_000_000 * Decimal(str(factor))
    return exact.quantize(_MICRO, rounding=ROUND_UP)
