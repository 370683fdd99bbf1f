"""/v1/webhooks: where a tenant wants to hear of its jobs, with what secret, and what became of every delivery."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog
from flask import Blueprint, jsonify, request, url_for
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from app.auth import caller, require_key
from app.body import parse, read_object
from app.gateway import gateway
from app.pages import next_page, read_cursor, read_limit
from app.problems import DeliveryNotFound, InvalidQuery, InvalidRequest, WebhookNotFound
from edges.broker import BrokerUnavailable
from edges.webhooks import new_secret
from models import webhooks
from models.database import run_transaction, transaction
from models.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from policy.states import DeliveryState
from policy.text import is_human
from policy.webhooks import EVENTS, MAX_ENDPOINTS, SECRET_GRACE_S, TEST_EVENT

log = structlog.get_logger(__name__)

bp = Blueprint("webhooks", __name__, url_prefix="/v1/webhooks")
bp.before_request(require_key)

MAX_DESCRIPTION_CHARS = 256


class EndpointBody(BaseModel):
    """The body of POST /v1/webhooks."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: str
    events: list[str] = list(EVENTS)
    description: str = ""


class EndpointChange(BaseModel):
    """The body of PATCH /v1/webhooks/{id}; what is not there stays as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: str | None = None
    events: list[str] | None = None
    description: str | None = None
    enabled: bool | None = None


@bp.post("")
def create_webhook() -> ResponseReturnValue:
    """Add an endpoint: 201 and the endpoint with its secret, which is shown this once."""
    body = parse(EndpointBody, read_object(request))
    _check(body.url, body.events, body.description)
    secret = new_secret()

    def create(session: Session) -> dict[str, Any]:
        if webhooks.count(session, tenant_id=caller().tenant_id) >= MAX_ENDPOINTS:
            raise InvalidRequest(f"There are {MAX_ENDPOINTS} endpoints; delete one first.", accepted={"max_endpoints": MAX_ENDPOINTS})
        by = {"tenant_id": caller().tenant_id, "actor": caller().actor}
        endpoint = webhooks.create(session, url=body.url, events=_in_order(body.events), description=body.description, secret=secret, **by)
        session.refresh(endpoint)
        return _endpoint_view(endpoint)

    view = run_transaction(gateway().database, create)
    return jsonify(view | {"secret": secret}), 201, {"Location": url_for(".show_webhook", endpoint_id=view["id"])}


@bp.get("")
def list_webhooks() -> ResponseReturnValue:
    """The tenant's endpoints, oldest first; there are never many."""
    with transaction(gateway().database) as session:
        found = [_endpoint_view(endpoint) for endpoint in webhooks.of_tenant(session, tenant_id=caller().tenant_id)]
    return jsonify(object="list", data=found, has_more=False, next_cursor=None)


@bp.get("/<uuid:endpoint_id>")
def show_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """One endpoint, without its secret."""
    with transaction(gateway().database) as session:
        return jsonify(_endpoint_view(_found(session, endpoint_id)))


@bp.patch("/<uuid:endpoint_id>")
def change_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Change what the body names. An endpoint that was disabled by a 410 is enabled again with `enabled: true`."""
    body = parse(EndpointChange, read_object(request))
    _check(body.url, body.events, body.description)
    events = None if body.events is None else _in_order(body.events)
    changes = {"url": body.url, "events": events, "description": body.description, "enabled": body.enabled}

    def change(session: Session) -> dict[str, Any]:
        endpoint = _locked(session, endpoint_id)
        webhooks.change(session, endpoint, actor=caller().actor, **changes)
        session.refresh(endpoint)
        return _endpoint_view(endpoint)

    return jsonify(run_transaction(gateway().database, change))


@bp.delete("/<uuid:endpoint_id>")
def delete_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Send nothing there any more, not even what waits."""
    actor = caller().actor
    run_transaction(gateway().database, lambda session: webhooks.delete(session, _locked(session, endpoint_id), actor=actor))
    return "", 204


@bp.post("/<uuid:endpoint_id>/rotate")
def rotate_secret(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """A new secret, shown this once. For a day the one before it signs, too: receivers may change over at their leisure."""
    secret = new_secret()

    def rotate(session: Session) -> dict[str, Any]:
        endpoint = _locked(session, endpoint_id)
        webhooks.rotate(session, endpoint, secret=secret, grace_s=SECRET_GRACE_S, actor=caller().actor)
        return _endpoint_view(endpoint)

    view = run_transaction(gateway().database, rotate)
    return jsonify(view | {"secret": secret, "former_secret_signs_for_s": int(SECRET_GRACE_S)})


@bp.post("/<uuid:endpoint_id>/test")
def send_test(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Send an event of the type `webhook.test` there: 202 and the delivery."""

    def note(session: Session) -> WebhookDelivery:
        delivery = webhooks.note_test(session, _found(session, endpoint_id), TEST_EVENT)
        session.flush()
        session.refresh(delivery)
        return delivery

    delivery = run_transaction(gateway().database, note)
    _hand_out(delivery.id)
    return jsonify(_delivery_view(delivery, [])), 202


@bp.get("/<uuid:endpoint_id>/deliveries")
def list_deliveries(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """What was sent there, newest first, each with its attempts: `limit` (1 to 100), `cursor`, `state`."""
    limit, before, state = read_limit(request), read_cursor(request), request.args.get("state")
    if state is not None and state not in list(DeliveryState):
        accepted = [each.value for each in DeliveryState]
        raise InvalidQuery(f"state {state[:32]!r} is not the state of a delivery.", parameter="state", accepted=accepted)
    with transaction(gateway().database) as session:
        _found(session, endpoint_id)
        rows = webhooks.page(session, endpoint_id, limit=limit + 1, before=before, state=state)
    cursor, link = next_page(request, ".list_deliveries", [delivery.id for delivery, _ in rows], limit)
    data = [_delivery_view(delivery, attempts) for delivery, attempts in rows[:limit]]
    return jsonify(object="list", data=data, has_more=cursor is not None, next_cursor=cursor), 200, link


@bp.post("/deliveries/<uuid:delivery_id>/redeliver")
def redeliver(delivery_id: uuid.UUID) -> ResponseReturnValue:
    """Send it again, under the id that it has: 202 and the delivery."""
    own = {"tenant_id": caller().tenant_id, "actor": caller().actor}
    delivery = run_transaction(gateway().database, lambda session: webhooks.redeliver(session, delivery_id, **own))
    if delivery is None:
        raise DeliveryNotFound(f"There is no delivery {delivery_id}.")
    _hand_out(delivery_id)
    return jsonify(_delivery_view(delivery, [])), 202


def _hand_out(delivery_id: uuid.UUID) -> None:
    try:
        gateway().broker.ask_to_deliver(delivery_id)
    except BrokerUnavailable as error:
        log.info("delivery_not_announced", delivery_id=str(delivery_id), reason=str(error))  # the sweeper will


def _found(session: Session, endpoint_id: uuid.UUID) -> WebhookEndpoint:
    endpoint = webhooks.find(session, endpoint_id, tenant_id=caller().tenant_id)
    if endpoint is None:
        raise WebhookNotFound(f"There is no webhook {endpoint_id}.")
    return endpoint


def _locked(session: Session, endpoint_id: uuid.UUID) -> WebhookEndpoint:
    endpoint = webhooks.lock(session, endpoint_id, tenant_id=caller().tenant_id)
    if endpoint is None:
        raise WebhookNotFound(f"There is no webhook {endpoint_id}.")
    return endpoint


def _check(url: str | None, events: Sequence[str] | None, description: str | None) -> None:
    """Raises InvalidRequest for what is of the right type and of no use."""
    if url is not None and (why := gateway().outbound.refusal(url)) is not None:
        raise _refused("url", why, "an https URL of a public host")
    if events is not None and (not events or set(events) - set(EVENTS)):
        raise _refused("events", "must name at least one event, and only those there are", list(EVENTS))
    if description is not None and not (len(description) <= MAX_DESCRIPTION_CHARS and is_human(description)):
        detail = f"must be text of at most {MAX_DESCRIPTION_CHARS} characters, without control characters"
        raise _refused("description", detail, {"max_chars": MAX_DESCRIPTION_CHARS})


def _refused(field: str, detail: str, accepted: object) -> InvalidRequest:
    return InvalidRequest(f"{field} {detail}.", errors=[{"pointer": f"/{field}", "detail": detail, "accepted": accepted}])


def _in_order(events: Sequence[str]) -> list[str]:
    return [event for event in EVENTS if event in events]


def _endpoint_view(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": str(endpoint.id),
        "object": "webhook",
        "url": endpoint.url,
        "events": endpoint.events,
        "description": endpoint.description,
        "created_at": _instant(endpoint.created_at),
        "disabled_at": _instant(endpoint.disabled_at),
        "disabled_reason": endpoint.disabled_reason,
        "urls": {
            "self": url_for("webhooks.show_webhook", endpoint_id=endpoint.id),
            "deliveries": url_for("webhooks.list_deliveries", endpoint_id=endpoint.id),
        },
    }


def _delivery_view(delivery: WebhookDelivery, attempts: Sequence[WebhookAttempt]) -> dict[str, Any]:
    tried = [{"attempt": a.attempt, "at": _instant(a.at), "status": a.status, "error": a.error, "took_s": a.took_s} for a in attempts]
    return {
        "id": str(delivery.id),
        "object": "webhook.delivery",
        "event": delivery.event,
        "job_id": str(delivery.job_id) if delivery.job_id else None,
        "state": delivery.state,
        "created_at": _instant(delivery.created_at),
        "due_at": _instant(delivery.due_at),
        "ended_at": _instant(delivery.ended_at),
        "attempts": tried,
    }


def _instant(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
