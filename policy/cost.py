"""Price device time, and count jobs against quotas before their device time is known."""

from decimal import ROUND_HALF_UP, ROUND_UP, Decimal

from policy.fleet import Fleet
from policy.params import Resolved
from policy.steps import denoising_of

_MICRO = Decimal("0.000001")


def price(fleet: Fleet, *, pool: str, tier: str, device_seconds: float) -> Decimal:
    """Price device time in `fleet.currency`, to six decimals.

    `device_seconds` x the pool's hourly price x the tier's weight. A pool or a tier that the
    catalogue no longer has counts as `fleet.RETIRED_POOL` or `RETIRED_TIER`: the job was accepted
    and must end.
    """
    hourly_price = fleet.pool_or_retired(pool).gpu_hour_price
    hourly = Decimal(str(hourly_price)) * Decimal(str(fleet.tier_or_retired(tier).price_weight))
    return (Decimal(str(device_seconds)) * hourly / 3600).quantize(_MICRO, rounding=ROUND_HALF_UP)


def megapixel_steps(fleet: Fleet, job: Resolved) -> Decimal:
    """Count a job against budgets and quotas, rounded up to six decimals.

    Megapixels x steps x images x the model's factor. Steps are those that the images really make: a
    picture to start from spares some. Rows are not counted: a guided image is one image.
    """
    factor = Decimal(str(fleet.model_or_retired(job.model).cost_factor))
    steps = denoising_of(fleet, job).steps * job.num_images
    exact = Decimal(job.width_px * job.height_px * steps) / 1_000_000 * factor
    return exact.quantize(_MICRO, rounding=ROUND_UP)
