"""Serve /v1/webhooks: a tenant's endpoints with their secrets, and what became of each delivery."""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from flask import Blueprint, Request, request, url_for
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ConfigDict

from app.http.answers import answer, answer_page, whole_list
from app.http.auth import require_key
from app.http.body import parse, read_object
from app.http.context import caller, runtime
from app.http.pages import read_cursor, read_limit
from app.problems import InvalidQuery
from app.schemas import webhooks as schemas
from app.schemas.base import one_of, says
from app.services import webhooks
from app.services.webhooks import MAX_DESCRIPTION_CHARS
from models.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from policy.states import DeliveryState
from policy.webhooks import ENDED_EVENTS, EVENTS, SECRET_GRACE_S

bp = Blueprint("webhooks", __name__, url_prefix="/v1/webhooks")
bp.before_request(require_key)

Url = Annotated[str, says("The URL to which events are sent: https, on a public host.")]
Events = Annotated[list[Annotated[str, one_of(EVENTS)]], says("The events to send.", minItems=1)]
Description = Annotated[str, says("Your own description of it.", maxLength=MAX_DESCRIPTION_CHARS)]


class EndpointBody(BaseModel):
    """The body of POST /v1/webhooks."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: Url
    events: Events = list(ENDED_EVENTS)
    description: Description = ""


class EndpointChange(BaseModel):
    """The body of PATCH /v1/webhooks/{id}; a missing field stays as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: Annotated[Url | None, says("The URL to which events are sent.")] = None
    events: Annotated[Events | None, says("The events to send.")] = None
    description: Annotated[Description | None, says("Your own description of it.")] = None
    enabled: Annotated[bool | None, says("false: send nothing to it; true: send again.")] = None


@bp.post("")
def create_webhook() -> ResponseReturnValue:
    """Add an endpoint: 201 and the endpoint with its secret, which is shown only this once."""
    body = parse(EndpointBody, read_object(request))
    endpoint, secret = webhooks.create(
        runtime(),
        caller(),
        url=body.url,
        events=body.events,
        description=body.description,
    )
    view = _endpoint_view(endpoint, schemas.NewWebhook, secret=secret)
    return answer(view, 201, {"Location": view.urls.self})


@bp.get("")
def list_webhooks() -> ResponseReturnValue:
    """List the tenant's endpoints, oldest first, on one page: their number is limited."""
    found = webhooks.list_endpoints(runtime(), caller())
    return whole_list(schemas.WebhookPage, [_endpoint_view(endpoint) for endpoint in found])


@bp.get("/<uuid:endpoint_id>")
def show_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Show one endpoint, without its secret."""
    return answer(_endpoint_view(webhooks.find(runtime(), caller(), endpoint_id)))


@bp.patch("/<uuid:endpoint_id>")
def change_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Change what the body names.

    An endpoint that was disabled by a 410 is enabled again with `enabled: true`.
    """
    body = parse(EndpointChange, read_object(request))
    endpoint = webhooks.change(
        runtime(),
        caller(),
        endpoint_id,
        url=body.url,
        events=body.events,
        description=body.description,
        enabled=body.enabled,
    )
    return answer(_endpoint_view(endpoint))


@bp.delete("/<uuid:endpoint_id>")
def delete_webhook(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Delete the endpoint; events that wait for it are not sent any more."""
    webhooks.delete(runtime(), caller(), endpoint_id)
    return "", 204


@bp.post("/<uuid:endpoint_id>/rotate")
def rotate_secret(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Give the endpoint a new secret, which is shown only this once.

    For a day the old secret signs, too, so that receivers have time to change over.
    """
    endpoint, secret = webhooks.rotate(runtime(), caller(), endpoint_id)
    shown = _endpoint_view(
        endpoint,
        schemas.RotatedWebhook,
        secret=secret,
        former_secret_signs_for_s=int(SECRET_GRACE_S),
    )
    return answer(shown)


@bp.post("/<uuid:endpoint_id>/test")
def send_test(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """Send an event of the type `webhook.test` to the endpoint: 202 and the delivery."""
    delivery = webhooks.send_test(runtime(), caller(), endpoint_id)
    return answer(_delivery_view(delivery, []), 202)


@bp.get("/<uuid:endpoint_id>/deliveries")
def list_deliveries(endpoint_id: uuid.UUID) -> ResponseReturnValue:
    """List what was sent to the endpoint, newest first, with the attempts of each delivery.

    Takes `limit` (1 to 100), `cursor` and `state`.
    """
    limit = read_limit(request)
    before = read_cursor(request)
    state = _read_state(request)
    rows = webhooks.deliveries(
        runtime(), caller(), endpoint_id, limit=limit + 1, before=before, state=state
    )
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
    """Send the delivery again under the same id: 202 and the delivery."""
    delivery = webhooks.redeliver(runtime(), caller(), delivery_id)
    return answer(_delivery_view(delivery, []), 202)


def _read_state(asked: Request) -> DeliveryState | None:
    """Read the state to filter deliveries by; None for any state. Raises InvalidQuery."""
    text = asked.args.get("state")
    if text is None:
        return None
    try:
        return DeliveryState(text)
    except ValueError:
        accepted = [each.value for each in DeliveryState]
        detail = f"state {text[:32]!r} is not the state of a delivery."
        raise InvalidQuery(detail, parameter="state", accepted=accepted) from None


def _endpoint_view(
    endpoint: WebhookEndpoint, kind: type[schemas.Webhook] = schemas.Webhook, **more: Any
) -> schemas.Webhook:
    """Show an endpoint as a document of this kind; `more`: members that only this kind has."""
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


def _delivery_view(
    delivery: WebhookDelivery, attempts: Sequence[WebhookAttempt]
) -> schemas.Delivery:
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
