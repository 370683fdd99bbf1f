"""Price device time, and count jobs against quotas before their device time is known."""

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, ROUND_UP, Decimal

from policy.fleet import Fleet, Pool
from policy.params import Resolved
from policy.steps import denoising_of

_MICRO = Decimal("0.000001")
_PICO = Decimal("1e-12")  # of amounts that are added up before they are rounded


def device_cost(device_seconds: float, gpu_hour_price: float) -> Decimal:
    """Return what device time costs the operator, to twelve decimals."""
    exact = Decimal(str(device_seconds)) * Decimal(str(gpu_hour_price)) / 3600
    return exact.quantize(_PICO, rounding=ROUND_HALF_UP)


def pool_cost(fleet: Fleet, pool: str, device_seconds: float) -> Decimal:
    """Return what device time costs that no capacity class has a price for.

    A pool that the catalogue no longer has counts as `fleet.RETIRED_POOL`: the job was accepted and
    must end.
    """
    return device_cost(device_seconds, fleet.pool_or_retired(pool).gpu_hour_price)


def price(fleet: Fleet, *, tier: str, cost: Decimal) -> Decimal:
    """Return what a tenant pays for device time, in `fleet.currency`, to six decimals.

    cost: of the device time, to the operator. It is weighed as the tier says; one that the
    catalogue no longer has counts as `fleet.RETIRED_TIER`.
    """
    weight = Decimal(str(fleet.tier_or_retired(tier).price_weight))
    return (cost * weight).quantize(_MICRO, rounding=ROUND_HALF_UP)


def class_shares(pool: Pool, live_slots: Mapping[str, int]) -> dict[str, float]:
    """Tell which share of a pool's images each of its capacity classes is expected to render.

    live_slots: of its live workers, by class. Without any, its classes count alike.
    """
    slots = {name: number for name, number in live_slots.items() if number > 0}
    slots = slots or dict.fromkeys(pool.classes, 1) or {"": 1}
    return {name: number / sum(slots.values()) for name, number in slots.items()}


def megapixel_steps(fleet: Fleet, job: Resolved) -> Decimal:
    """Count a job against budgets and quotas, rounded up to six decimals.

    Megapixels x steps x images x the model's factor. Steps are those that the images really make: a
    picture to start from spares some. Rows are not counted: a guided image is one image.
    """
    factor = Decimal(str(fleet.model_or_retired(job.model).cost_factor))
    steps = denoising_of(fleet, job).steps * job.num_images
    exact = Decimal(job.width_px * job.height_px * steps) / 1_000_000 * factor
    return exact.quantize(_MICRO, rounding=ROUND_UP)
