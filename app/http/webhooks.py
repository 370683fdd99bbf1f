"""/v1/webhooks: where a tenant wants to hear of its jobs, with what secret, and what became of every delivery."""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import structlog
from flask import Blueprint, request, url_for
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from app.http.answers import answer, answer_page, whole_list
from app.http.auth import require_key
from app.http.body import parse, read_object
from app.http.context import caller, runtime
from app.http.pages import read_cursor, read_limit
from app.problems import DeliveryNotFound, InvalidQuery, InvalidRequest, WebhookNotFound
from app.schemas import webhooks as schemas
from app.schemas.base import one_of, says
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


Url = Annotated[str, says("Where to send events: an https URL of a public host.")]
Events = Annotated[list[Annotated[str, one_of(EVENTS)]], says("What to hear of.", minItems=1)]
Description = Annotated[str, says("Your own words.", maxLength=MAX_DESCRIPTION_CHARS)]


class EndpointBody(BaseModel):
    """The body of POST /v1/webhooks."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: Url
    events: Events = list(EVENTS)
    description: Description = ""


class EndpointChange(BaseModel):
    """The body of PATCH /v1/webhooks/{id}; what is not there stays as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: Annotated[Url | None, says("Where to send events.")] = None
    events: Annotated[Events | None, says("What to hear of.")] = None
    description: Annotated[Description | None, says("Your own words.")] = None
    enabled: Annotated[bool | None, says("False: send nothing there; true: send again.")] = None


@bp.post("")
def create_webhook() -> ResponseReturnValue:
    """Add an endpoint: 201 and the endpoint with its secret, which is shown this once."""
    body = parse(EndpointBody, read_object(request))
    _check(body.url, body.events, body.description)
    secret = new_secret()

    def create(session: Session) -> schemas.Webhook:
        if webhooks.count(session, tenant_id=caller().tenant_id) >= MAX_ENDPOINTS:
            raise InvalidRequest(f"There are {MAX_ENDPOINTS} endpoints; delete one first.", accepted={"max_endpoints": MAX_ENDPOINTS})
        endpoint = webhooks.create(
            session,
            tenant_id=caller().tenant_id,
            url=body.url,
            events=_in_order(body.events),
            description=body.description,
            secret=secret,
            actor=caller().actor,
        )
        session.refresh(endpoint)
        return _endpoint_view(endpoint, schemas.NewWebhook, secret=secret)

    view = run_transaction(runtime().database, create)
    return answer(view, 201, {"Location": view.urls.self})


@bp.get("")
def list_webhooks() -> ResponseReturnValue:
    """The tenant's endpoints, oldest first; there are never many."""
    with transaction(runtime().database) as session:
        found = [_endpoint_view(endpoint) for endpoint in webhooks.of_tenant(session, tenant_id=caller().tenant_id)]
    return whole_list(schemas.WebhookPage, found)


@bp.get("/<uuid:endpoint_id>")
def show_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Show one endpoint, without its secret."""
    with transaction(runtime().database) as session:
        return answer(_endpoint_view(_found(session, endpoint_id)))


@bp.patch("/<uuid:endpoint_id>")
def change_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Change what the body names. An endpoint that was disabled by a 410 is enabled again with `enabled: true`."""
    body = parse(EndpointChange, read_object(request))
    _check(body.url, body.events, body.description)
    events = None if body.events is None else _in_order(body.events)
    changes = {"url": body.url, "events": events, "description": body.description, "enabled": body.enabled}

    def change(session: Session) -> schemas.Webhook:
        endpoint = _locked(session, endpoint_id)
        webhooks.change(session, endpoint, actor=caller().actor, **changes)
        session.refresh(endpoint)
        return _endpoint_view(endpoint)

    return answer(run_transaction(runtime().database, change))


@bp.delete("/<uuid:endpoint_id>")
def delete_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Send nothing there any more, not even what waits."""
    actor = caller().actor
    run_transaction(runtime().database, lambda session: webhooks.delete(session, _locked(session, endpoint_id), actor=actor))
    return "", 204


@bp.post("/<uuid:endpoint_id>/rotate")
def rotate_secret(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """A new secret, shown this once. For a day the one before it signs, too: receivers may change over at their leisure."""
    secret = new_secret()

    def rotate(session: Session) -> schemas.Webhook:
        endpoint = _locked(session, endpoint_id)
        webhooks.rotate(session, endpoint, secret=secret, grace_s=SECRET_GRACE_S, actor=caller().actor)
        return _endpoint_view(
            endpoint,
            schemas.RotatedWebhook,
            secret=secret,
            former_secret_signs_for_s=int(SECRET_GRACE_S),
        )

    return answer(run_transaction(runtime().database, rotate))


@bp.post("/<uuid:endpoint_id>/test")
def send_test(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Send an event of the type `webhook.test` there: 202 and the delivery."""

    def note(session: Session) -> WebhookDelivery:
        delivery = webhooks.note_test(session, _found(session, endpoint_id), TEST_EVENT)
        session.flush()
        session.refresh(delivery)
        return delivery

    delivery = run_transaction(runtime().database, note)
    _hand_out(delivery.id)
    return answer(_delivery_view(delivery, []), 202)


@bp.get("/<uuid:endpoint_id>/deliveries")
def list_deliveries(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """What was sent there, newest first, each with its attempts: `limit` (1 to 100), `cursor`, `state`."""
    limit, before, state = read_limit(request), read_cursor(request), request.args.get("state")
    if state is not None and state not in list(DeliveryState):
        accepted = [each.value for each in DeliveryState]
        raise InvalidQuery(f"state {state[:32]!r} is not the state of a delivery.", parameter="state", accepted=accepted)
    with transaction(runtime().database) as session:
        _found(session, endpoint_id)
        rows = webhooks.page(session, endpoint_id, limit=limit + 1, before=before, state=state)
    return answer_page(
        request,
        schemas.DeliveryPage,
        rows,
        lambda row: _delivery_view(*row),
        limit=limit,
        id_of=lambda row: row[0].id,
    )


@bp.post("/deliveries/<uuid:delivery_id>/redeliver")
def redeliver(delivery_id: uuid.UUID) -> ResponseReturnValue:
    """Send it again, under the id that it has: 202 and the delivery."""
    own = {"tenant_id": caller().tenant_id, "actor": caller().actor}
    delivery = run_transaction(runtime().database, lambda session: webhooks.redeliver(session, delivery_id, **own))
    if delivery is None:
        raise DeliveryNotFound(f"There is no delivery {delivery_id}.")
    _hand_out(delivery_id)
    return answer(_delivery_view(delivery, []), 202)


def _hand_out(delivery_id: uuid.UUID) -> None:
    try:
        runtime().broker.ask_to_deliver(delivery_id)
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
    if url is not None and (why := runtime().outbound.refusal(url)) is not None:
        raise InvalidRequest.at("url", why, accepted="an https URL of a public host")
    if events is not None and (not events or set(events) - set(EVENTS)):
        detail = "must name at least one event, and only those there are"
        raise InvalidRequest.at("events", detail, accepted=list(EVENTS))
    if description is not None and not (len(description) <= MAX_DESCRIPTION_CHARS and is_human(description)):
        detail = f"must be text of at most {MAX_DESCRIPTION_CHARS} characters, without control characters"
        raise InvalidRequest.at("description", detail, accepted={"max_chars": MAX_DESCRIPTION_CHARS})


def _in_order(events: Sequence[str]) -> list[str]:
    return [event for event in EVENTS if event in events]


def _endpoint_view(endpoint: WebhookEndpoint, kind: type[schemas.Webhook] = schemas.Webhook, **more: Any) -> schemas.Webhook:
    """Show an endpoint as a document of the kind; `more`: the members that it has beside."""
    return kind(
        id=endpoint.id,
        url=endpoint.url,
        events=endpoint.events,
        description=endpoint.description,
        created_at=endpoint.created_at,
        disabled_at=endpoint.disabled_at,
        disabled_reason=endpoint.disabled_reason,
        urls=schemas.WebhookUrls(
            self=url_for("webhooks.show_webhook", endpoint_id=endpoint.id),
            deliveries=url_for("webhooks.list_deliveries", endpoint_id=endpoint.id),
        ),
        **more,
    )


def _delivery_view(delivery: WebhookDelivery, attempts: Sequence[WebhookAttempt]) -> schemas.Delivery:
    return schemas.Delivery(
        id=delivery.id,
        event=delivery.event,
        job_id=delivery.job_id,
        state=delivery.state,
        created_at=delivery.created_at,
        due_at=delivery.due_at,
        ended_at=delivery.ended_at,
        attempts=[_attempt_view(attempt) for attempt in attempts],
    )


def _attempt_view(attempt: WebhookAttempt) -> schemas.DeliveryAttempt:
    return schemas.DeliveryAttempt(
        attempt=attempt.attempt,
        at=attempt.at,
        status=attempt.status,
        error=attempt.error,
        took_s=attempt.took_s,
    )
