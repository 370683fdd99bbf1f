"""Check a tenant's limits: which refusal each one means, and when to try again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal

from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import (
    BudgetSpent,
    Forbidden,
    QuotaExceeded,
    StorageQuotaExceeded,
    TooManyJobs,
    invalid_param,
)
from app.runtime import Runtime
from edges import telemetry
from edges.limits import BudgetResult
from models import files, usage
from models.database import transaction
from policy.limits import Limits, UsageTotals, exceeded_stock, stock_never_enough
from policy.offers import offered_models, offered_tiers
from policy.params import Resolved
from policy.refusals import InvalidParam


def check_allowed(runtime: Runtime, caller: Caller, resolved: Resolved) -> None:
    """Raise Forbidden for a tier or model that the caller's tenant may not use."""
    limits = caller.limits
    if limits.allows(tier=resolved.tier, model=resolved.model):
        return
    asker = runtime.asker(caller)
    accepted = {}
    if limits.allowed_tiers is not None:
        accepted["tiers"] = list(offered_tiers(runtime.fleet, asker))
    if limits.allowed_models is not None:
        accepted["models"] = list(offered_models(runtime.fleet, asker))
    detail = f"Your tenant may not use tier {resolved.tier} with model {resolved.model}."
    raise Forbidden(detail, accepted=accepted)


@contextmanager
def budget_charge(
    runtime: Runtime, caller: Caller, amount: Decimal, *, jobs: int = 1
) -> Iterator[None]:
    """Charge the caller's budget with `amount` megapixel-steps; an error within gives them back.

    jobs: that need so much together.  Raises BudgetSpent, or InvalidImageRequest and Forbidden when
    no waiting would help.
    """
    limits = caller.limits
    _check_ever(limits, amount, jobs)
    per_minute = limits.megapixel_steps_per_minute
    burst = limits.burst_megapixel_steps
    if per_minute is None or burst is None:
        yield
        return
    _check_burst(amount, burst)
    charge = float(amount)
    taken = runtime.budgets.take(
        caller.tenant_id, per_minute=per_minute, burst=burst, amount=charge
    )
    caller.used.budget = taken
    if not taken.passes:
        raise _budget_spent(amount, taken, per_minute)
    try:
        yield
    except BaseException:
        runtime.budgets.give_back(
            caller.tenant_id, per_minute=per_minute, burst=burst, amount=charge
        )
        raise


def foresee(runtime: Runtime, caller: Caller, amount: Decimal, *, jobs: int = 1) -> None:
    """Raise what so many jobs of so many megapixel-steps together would be refused for now.

    Takes and locks nothing. Call it before expensive work that a refusal would waste; the decision
    is made by `budget_charge` and `check_stocks`.
    """
    _check_ever(caller.limits, amount, jobs)
    _foresee_budget(runtime, caller, amount)
    if caller.limits.has_stocks:
        _foresee_stocks(runtime, caller, amount, jobs)


def _foresee_budget(runtime: Runtime, caller: Caller, amount: Decimal) -> None:
    per_minute = caller.limits.megapixel_steps_per_minute
    burst = caller.limits.burst_megapixel_steps
    if per_minute is None or burst is None:
        return
    _check_burst(amount, burst)
    held = runtime.budgets.take(caller.tenant_id, per_minute=per_minute, burst=burst, amount=0.0)
    if held.left < float(amount):
        wait_s = (float(amount) - held.left) / per_minute * 60
        raise _budget_spent(amount, replace(held, wait_s=wait_s), per_minute)


def _foresee_stocks(runtime: Runtime, caller: Caller, amount: Decimal, jobs: int) -> None:
    limits = caller.limits
    with transaction(runtime.database) as session:
        totals = usage.usage_totals(
            session, tenant_id=caller.tenant_id, count_jobs_to=limits.max_concurrent_jobs
        )
    after = replace(
        totals,
        used_today=totals.used_today + amount,
        used_this_month=totals.used_this_month + amount,
        active_jobs=totals.active_jobs + jobs,
    )
    _check_totals(limits, after)


def check_room(session: Session, caller: Caller, size_bytes: int = 0) -> None:
    """Check that the tenant may store so many bytes more. Raises StorageQuotaExceeded.

    It is exact after a file was written in this session, with `size_bytes` 0.
    """
    most = caller.limits.max_stored_bytes
    if most is None:
        return
    _, now = files.stored(session, tenant_id=caller.tenant_id)
    if now + size_bytes > most:
        telemetry.SHED.labels("storage_quota_exceeded").inc()
        detail = (
            f"With this picture, {now + size_bytes} bytes would be stored, of at most {most};"
            " delete pictures that are not needed."
        )
        raise StorageQuotaExceeded(detail, max_stored_bytes=most, stored_bytes=now + size_bytes)


def lock_tenant_usage(session: Session, caller: Caller) -> None:
    """Lock the tenant's usage until commit, if it has stocks, so that its jobs are written in turn.

    Call it first in the transaction. Waiting here later would hold locks that others need: those of
    a tier's releases, or the row of a key.
    """
    if caller.limits.has_stocks:
        usage.lock(session, tenant_id=caller.tenant_id)


def check_stocks(session: Session, caller: Caller) -> None:
    """Check the caller's stocks, with what this session has just written.

    Raises QuotaExceeded, TooManyJobs.
    """
    limits = caller.limits
    if not limits.has_stocks:
        return
    totals = usage.usage_totals(
        session, tenant_id=caller.tenant_id, count_jobs_to=limits.max_concurrent_jobs
    )
    _check_totals(limits, totals)


def _check_ever(limits: Limits, amount: Decimal, jobs: int) -> None:
    """Refuse a request that a stock could not cover even if nothing else were used."""
    exceeded = stock_never_enough(limits, amount=amount, jobs=jobs)
    if exceeded is None:
        return
    if exceeded.stock == "jobs":
        detail = f"are {jobs}; your tenant may have at most {exceeded.limit} unfinished"
        raise invalid_param(InvalidParam("jobs", detail, {"max_items": int(exceeded.limit)}))
    if exceeded.limit == 0:
        raise Forbidden(f"Your tenant's quota of megapixel-steps per {exceeded.stock} is 0.")
    most = float(exceeded.limit)
    detail = f"make {amount} megapixel-steps; your quota of a {exceeded.stock} is {most:g}"
    raise invalid_param(InvalidParam("steps", detail, {"max_megapixel_steps": most}))


def _check_burst(amount: Decimal, burst: float) -> None:
    if amount > Decimal(str(burst)):
        detail = f"make {amount} megapixel-steps; your budget never holds more than {burst:g}"
        raise invalid_param(InvalidParam("steps", detail, {"max_megapixel_steps": burst}))


def _budget_spent(amount: Decimal, held: BudgetResult, per_minute: float) -> BudgetSpent:
    telemetry.SHED.labels("budget_spent").inc()
    detail = (
        f"The request needs {amount} megapixel-steps, and your budget has {held.left:.2f} left; it"
        f" regains {per_minute:g} each minute."
    )
    retry_after_s = max(1, math.ceil(held.wait_s))
    return BudgetSpent(detail, retry_after_s=retry_after_s, policy="megapixel-steps")


def _check_totals(limits: Limits, totals: UsageTotals) -> None:
    exceeded = exceeded_stock(limits, totals)
    if exceeded is None:
        return
    if exceeded.stock == "jobs":
        telemetry.SHED.labels("too_many_jobs").inc()
        detail = f"Your tenant may have at most {exceeded.limit} unfinished jobs."
        raise TooManyJobs(
            detail, retry_after_s=exceeded.retry_after_s, max_concurrent_jobs=int(exceeded.limit)
        )
    telemetry.SHED.labels("quota_exceeded").inc()
    used = f"{exceeded.used} megapixel-steps of this {exceeded.stock} (UTC)"
    raise QuotaExceeded(
        f"With this request, {used} would be used, of at most {exceeded.limit}.",
        retry_after_s=exceeded.retry_after_s,
        period=exceeded.stock,
        quota=float(exceeded.limit),
    )
