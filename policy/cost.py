"""What an image cost."""

from decimal import ROUND_HALF_UP, Decimal

from policy.fleet import Fleet

_MICRO = Decimal("0.000001")


def price(fleet: Fleet, *, pool: str, tier: str, device_seconds: float) -> Decimal:
    """Price of `device_seconds` in `fleet.currency`, to six decimals: device time x the pool's hourly price x the tier's weight.

    A pool that fleet.toml has no more costs nothing, a tier that it has no more weighs 1: the job was accepted and must end.
    """
    hourly_price = fleet.pools[pool].gpu_hour_price if pool in fleet.pools else 0.0
    weight = fleet.tiers[tier].price_weight if tier in fleet.tiers else 1.0
    hourly = Decimal(str(hourly_price)) * Decimal(str(weight))
    return (Decimal(str(device_seconds)) * hourly / 3600).quantize(_MICRO, rounding=ROUND_HALF_UP)
