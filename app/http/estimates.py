"""Serve POST /v1/estimate: what a job would be, cost and wait for."""

import uuid
from collections.abc import Mapping
from typing import Any, cast

from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.auth import require_key
from app.http.body import job_request, read_job
from app.http.context import caller, runtime
from app.http.views import params_view, queue_view
from app.schemas import jobs as schemas
from app.schemas.problems import Refusal as RefusalView
from app.services import submit
from app.services.estimate import Estimate, estimate
from policy.admission import Refusal
from policy.catalog import RANDOM_SEED

bp = Blueprint("estimates", __name__)
bp.before_request(require_key)


@bp.post("/v1/estimate", endpoint="estimate")
def show_estimate() -> ResponseReturnValue:
    """Show what POST /v1/jobs would make of this body, or its problem.

    Shows every resolved parameter, the price and the wait.
    """
    request.max_content_length = runtime().settings.max_job_body_bytes
    body = read_job(request)
    asked = job_request(body)
    expected = estimate(runtime(), caller(), asked)
    params = params_view(expected.params) | {
        field: uuid.UUID(value) if value and _is_id(value) else None
        for field, value in body.pictures.items()
    }
    if asked.requested.seed in (None, RANDOM_SEED):
        params["seed"] = None  # without a requested seed, the job will draw its own
    return answer(_estimate_view(expected, params, body.metadata))


def _estimate_view(
    expected: Estimate, params: Mapping[str, Any], metadata: dict[str, str]
) -> schemas.Estimate:
    return schemas.Estimate(
        **params,
        metadata=metadata,
        start_deadline_s=expected.start_within_s,
        warnings=cast("list[schemas.JobWarning]", expected.warnings),
        megapixel_steps=float(expected.megapixel_steps),
        cost=schemas.Cost(
            gpu_seconds=round(expected.device_s, 6),
            amount=str(expected.cost),
            currency=expected.currency,
        ),
        queue=queue_view(expected.place),
        can_be_served=expected.refusal is None,
        refusal=_refusal_view(expected.refusal) if expected.refusal else None,
    )


def _is_id(value: str) -> bool:
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True


def _refusal_view(refusal: Refusal) -> RefusalView:
    summary = submit.problem_of(refusal).summary()
    return RefusalView(**summary, retry_after_s=refusal.retry_after_s)
