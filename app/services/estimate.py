"""Estimate what a job would be, cost and wait for. Nothing is written, not even a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from app.caller import Caller
from app.live.forecast import QueuePlace
from app.runtime import Runtime
from app.services import inputs, submit
from app.services.inputs import Intake
from app.services.submit import JobRequest
from policy.admission import Refusal
from policy.cost import megapixel_steps
from policy.params import Resolved


@dataclass(frozen=True)
class Estimate:
    """The estimate for one job.

    start_within_s: its start deadline. device_s: device seconds. cost: in `currency`. place: the
    queue position that it would get. refusal: why it would be refused now, if so.
    """

    params: Resolved
    start_within_s: float
    warnings: Sequence[Mapping[str, Any]]
    megapixel_steps: Decimal
    device_s: float
    cost: Decimal
    currency: str
    place: QueuePlace
    refusal: Refusal | None


def estimate(runtime: Runtime, caller: Caller, asked: JobRequest) -> Estimate:
    """Estimate the job that `submit` would make of this request.

    Raises InvalidImageRequest, Forbidden.
    """
    fleet = runtime.fleet
    requested = replace(asked.unseen(), **_known(runtime, caller, asked.pictures))
    resolved = submit.resolve(runtime, caller, requested)
    deadline_s = submit.start_deadline_s(
        asked.start_within_s, fleet.tiers[resolved.tier].start_within_s
    )
    expected = runtime.forecaster.expect(resolved, caller.tenant_id)
    return Estimate(
        params=resolved,
        start_within_s=deadline_s,
        warnings=runtime.expected_warnings(resolved),
        megapixel_steps=megapixel_steps(fleet, resolved),
        device_s=expected.predicted_s,
        cost=expected.cost,
        currency=fleet.currency,
        place=expected.place,
        refusal=expected.refusal,
    )


def _known(runtime: Runtime, caller: Caller, fields: Mapping[str, str | None]) -> dict[str, Any]:
    """Look up the pictures that are stored files; of new ones only their presence matters here."""
    given = {field: value for field, value in fields.items() if value is not None}
    stored = {field: value for field, value in given.items() if not inputs.is_new(value)}
    return {field: file.id for field, file in Intake(runtime, caller).files(stored).items()}
