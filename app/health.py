"""/healthz: the process answers. /readyz: it can accept jobs; and which parts of the house are away, by name."""

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from app.gateway import gateway
from app.readiness import NEEDED

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> ResponseReturnValue:
    return jsonify(status="alive")


@bp.get("/readyz")
def readyz() -> ResponseReturnValue:
    """200 while jobs can be accepted, else 503; `degraded` names the parts that are away, and `parts` says why."""
    parts = gateway().readiness.parts()
    is_ready = parts[NEEDED]["ready"]
    degraded = [name for name, part in parts.items() if not part["ready"]]
    headers = {} if is_ready else {"Retry-After": "2"}
    return jsonify(status="ready" if is_ready else "not_ready", degraded=degraded, parts=parts), 200 if is_ready else 503, headers
