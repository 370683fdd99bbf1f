"""POST /v1/estimate: what a job would be, cost and wait for. Nothing is written, not even a picture."""

import uuid
from collections.abc import Mapping
from typing import cast

from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.auth import require_key
from app.http.body import read_job, wish_of
from app.http.context import caller, runtime
from app.http.views import params_view, queue_view
from app.schemas import jobs as schemas
from app.schemas.problems import Refusal as RefusalView
from app.services import inputs, submit
from policy import warnings
from policy.admission import Refusal
from policy.catalog import RANDOM_SEED
from policy.cost import megapixel_steps, price

bp = Blueprint("estimates", __name__)
bp.before_request(require_key)


@bp.post("/v1/estimate")
def estimate() -> ResponseReturnValue:
    """Every resolved parameter of the job that POST /v1/jobs would make of this body, its price and its wait; or its problem."""
    parts = runtime()
    request.max_content_length = parts.settings.max_job_body_bytes
    body = read_job(request)
    resolved = submit.resolve(wish_of(body, _pictures(body.pictures)))
    tier = parts.fleet.tiers[resolved.tier]
    deadline_s = submit.start_deadline_s(body.start_deadline_s, tier.start_within_s)
    expected = parts.forecaster.expect(resolved, caller().tenant_id)
    cost = price(parts.fleet, pool=resolved.pool, tier=resolved.tier, device_seconds=expected.predicted_s)
    expected_warnings = warnings.expected(parts.fleet.models[resolved.model], resolved)
    params = params_view(resolved) | {
        field: uuid.UUID(value) if value and _is_id(value) else None for field, value in body.pictures.items()
    }
    if body.seed in (None, RANDOM_SEED):
        params["seed"] = None  # one that was not asked for is drawn for the job
    shown = schemas.Estimate(
        **params,
        metadata=body.metadata,
        start_deadline_s=deadline_s,
        warnings=cast("list[schemas.JobWarning]", expected_warnings),
        megapixel_steps=float(megapixel_steps(parts.fleet, resolved)),
        cost=schemas.Cost(
            gpu_seconds=round(expected.predicted_s, 6),
            amount=str(cost),
            currency=parts.fleet.currency,
        ),
        queue=queue_view(expected.place),
        can_be_served=expected.refusal is None,
        refusal=_refusal_view(expected.refusal) if expected.refusal else None,
    )
    return answer(shown)


def _pictures(fields: Mapping[str, str | None]) -> dict[str, uuid.UUID]:
    """Those that are files already are looked up; of the others it only counts that there is one."""
    said = {field: value for field, value in fields.items() if value is not None}
    files = inputs.Intake().files({field: value for field, value in said.items() if not inputs.is_new(value)})
    return inputs.unseen(said) | {field: file.id for field, file in files.items()}


def _is_id(value: str) -> bool:
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True


def _refusal_view(refusal: Refusal) -> RefusalView:
    summary = submit.problem_of(refusal).summary()
    return RefusalView(**summary, retry_after_s=refusal.retry_after_s)
