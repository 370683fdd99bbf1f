"""Serve /healthz (the process answers) and /readyz (it can accept jobs; what is away, by name)."""

from typing import cast

from flask import Blueprint
from flask.typing import ResponseReturnValue

from app.http.answers import answer
from app.http.context import runtime
from app.live.readiness import NEEDED
from app.schemas import health as schemas

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> ResponseReturnValue:
    return answer(schemas.Health())


@bp.get("/readyz")
def readyz() -> ResponseReturnValue:
    """Answer 200 while jobs can be accepted, else 503.

    `degraded` names the parts that are away; `parts` gives the reason for each.
    """
    parts = runtime().readiness.parts()
    is_ready = parts[NEEDED]["ready"]
    degraded = [name for name, part in parts.items() if not part["ready"]]
    headers = {} if is_ready else {"Retry-After": "2"}
    shown = schemas.Readiness(
        status="ready" if is_ready else "not_ready",
        degraded=degraded,
        parts=cast("dict[str, schemas.Part]", parts),
    )
    return answer(shown, 200 if is_ready else 503, headers)
