"""/healthz: the process answers. /readyz: every part it needs answers, or the name of the one that does not."""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.gateway import Gateway, gateway
from edges.broker import BrokerUnavailable
from edges.handoff import HandoffUnavailable
from edges.objectstore import StoreUnavailable
from models import workers
from models.database import transaction

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> ResponseReturnValue:
    return jsonify(status="alive")


@bp.get("/readyz")
def readyz() -> ResponseReturnValue:
    """200 if every part is ready, else 503; `parts` says which is not and why."""
    parts = gateway()
    checks: dict[str, Callable[[Gateway], dict[str, Any]]] = {
        "database": _database,
        "broker": lambda p: _pinged(p.broker.ping),
        "handoff": lambda p: _pinged(p.handoff.ping),
        "object_store": lambda p: _pinged(p.store.ping),
        "workers": _workers,
    }
    found = {name: _checked(check, parts) for name, check in checks.items()}
    ready = all(part["ready"] for part in found.values())
    headers = {} if ready else {"Retry-After": "2"}
    return jsonify(status="ready" if ready else "not_ready", parts=found), 200 if ready else 503, headers


def _checked(check: Callable[[Gateway], dict[str, Any]], parts: Gateway) -> dict[str, Any]:
    try:
        return check(parts)
    except (SQLAlchemyError, BrokerUnavailable, HandoffUnavailable, StoreUnavailable) as error:
        return {"ready": False, "detail": type(error).__name__}


def _pinged(ping: Callable[[], None]) -> dict[str, Any]:
    ping()
    return {"ready": True}


def _database(parts: Gateway) -> dict[str, Any]:
    with transaction(parts.database) as session:
        session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
    return {"ready": True}


def _workers(parts: Gateway) -> dict[str, Any]:
    """Every pool with a warm floor needs that many live workers; jobs for the others wait in Postgres."""
    with transaction(parts.database) as session:
        live = [worker.pool for worker in workers.live(session, silent_for_s=parts.settings.lease_ttl_s)]
    short = [name for name, pool in parts.fleet.pools.items() if live.count(name) < pool.warm_floor]
    detail = {"detail": f"too few workers in pool {', '.join(short)}"} if short else {}
    return {"ready": not short, "live": len(live), **detail}
