"""What an image cost."""

from decimal import ROUND_HALF_UP, Decimal

from policy.fleet import Fleet

_MICRO = Decimal("0.000001")


def price(fleet: Fleet, *, pool: str, tier: str, device_seconds: float) -> Decimal:
    """Price of `device_seconds` in `fleet.currency`, to six decimals: device time x the pool's hourly price x the tier's weight."""
    hourly = Decimal(str(fleet.pools[pool].gpu_hour_price)) * Decimal(str(fleet.tiers[tier].price_weight))
    return (Decimal(str(device_seconds)) * hourly / 3600).quantize(_MICRO, rounding=ROUND_HALF_UP)
