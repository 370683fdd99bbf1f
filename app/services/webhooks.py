"""Manage a tenant's webhook endpoints, their secrets and their deliveries."""

from collections.abc import Sequence
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import DeliveryNotFound, InvalidRequest, WebhookNotFound
from app.runtime import Runtime
from edges.broker import BrokerUnavailable
from edges.webhooks import new_secret
from models import webhooks
from models.database import run_transaction, transaction
from models.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from policy.states import DeliveryState
from policy.text import is_human
from policy.webhooks import EVENTS, MAX_ENDPOINTS, SECRET_GRACE_S, TEST_EVENT

log = structlog.get_logger(__name__)

MAX_DESCRIPTION_CHARS = 256


def create(
    runtime: Runtime,
    caller: Caller,
    *,
    url: str,
    events: Sequence[str],
    description: str,
) -> tuple[WebhookEndpoint, str]:
    """Add an endpoint; return it and its secret, which is not shown again.

    Raises InvalidRequest, also for more endpoints than a tenant may have.
    """
    _check(runtime, url, events, description)
    secret = new_secret()

    def add(session: Session) -> WebhookEndpoint:
        if webhooks.count(session, tenant_id=caller.tenant_id) >= MAX_ENDPOINTS:
            detail = f"Your tenant has {MAX_ENDPOINTS} endpoints, the most it may have. Delete one"
            " first."
            raise InvalidRequest(detail, accepted={"max_endpoints": MAX_ENDPOINTS})
        endpoint = webhooks.create(
            session,
            tenant_id=caller.tenant_id,
            url=url,
            events=_in_order(events),
            description=description,
            secret=secret,
            actor=caller.actor,
        )
        session.refresh(endpoint)
        return endpoint

    return run_transaction(runtime.database, add), secret


def list_endpoints(runtime: Runtime, caller: Caller) -> Sequence[WebhookEndpoint]:
    """List the caller's endpoints, oldest first; there are at most MAX_ENDPOINTS."""
    with transaction(runtime.database) as session:
        return webhooks.of_tenant(session, tenant_id=caller.tenant_id)


def find(runtime: Runtime, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    """Return the caller's endpoint. Raises WebhookNotFound, also for a deleted one."""
    with transaction(runtime.database) as session:
        return _find(session, caller, endpoint_id)


def change(
    runtime: Runtime,
    caller: Caller,
    endpoint_id: UUID,
    *,
    url: str | None,
    events: Sequence[str] | None,
    description: str | None,
    enabled: bool | None,
) -> WebhookEndpoint:
    """Change the caller's endpoint; None keeps a value.

    Raises InvalidRequest and WebhookNotFound.
    """
    _check(runtime, url, events, description)

    def apply(session: Session) -> WebhookEndpoint:
        endpoint = _lock(session, caller, endpoint_id)
        webhooks.change(
            session,
            endpoint,
            actor=caller.actor,
            url=url,
            events=None if events is None else _in_order(events),
            description=description,
            enabled=enabled,
        )
        session.refresh(endpoint)
        return endpoint

    return run_transaction(runtime.database, apply)


def delete(runtime: Runtime, caller: Caller, endpoint_id: UUID) -> None:
    """Delete the endpoint; waiting deliveries are not sent any more. Raises WebhookNotFound."""

    def end(session: Session) -> None:
        webhooks.delete(session, _lock(session, caller, endpoint_id), actor=caller.actor)

    run_transaction(runtime.database, end)


def rotate(runtime: Runtime, caller: Caller, endpoint_id: UUID) -> tuple[WebhookEndpoint, str]:
    """Give the endpoint a new secret; return both. The old one signs, too, for SECRET_GRACE_S.

    Raises WebhookNotFound.
    """
    secret = new_secret()

    def replace(session: Session) -> WebhookEndpoint:
        endpoint = _lock(session, caller, endpoint_id)
        webhooks.rotate(
            session, endpoint, secret=secret, grace_s=SECRET_GRACE_S, actor=caller.actor
        )
        return endpoint

    return run_transaction(runtime.database, replace), secret


def send_test(runtime: Runtime, caller: Caller, endpoint_id: UUID) -> WebhookDelivery:
    """Send an event that is about no job; return its delivery. Raises WebhookNotFound."""

    def note(session: Session) -> WebhookDelivery:
        endpoint = _find(session, caller, endpoint_id)
        delivery = webhooks.note_test(session, endpoint, TEST_EVENT)
        session.flush()
        session.refresh(delivery)
        return delivery

    delivery = run_transaction(runtime.database, note)
    _announce(runtime, delivery.id)
    return delivery


def deliveries(
    runtime: Runtime,
    caller: Caller,
    endpoint_id: UUID,
    *,
    limit: int,
    before: UUID | None,
    state: DeliveryState | None,
) -> list[tuple[WebhookDelivery, list[WebhookAttempt]]]:
    """List up to `limit` deliveries with their attempts, newest first, older than `before`.

    state: only deliveries in this state. Raises WebhookNotFound.
    """
    with transaction(runtime.database) as session:
        _find(session, caller, endpoint_id)
        return webhooks.page(session, endpoint_id, limit=limit, before=before, state=state)


def redeliver(runtime: Runtime, caller: Caller, delivery_id: UUID) -> WebhookDelivery:
    """Send a delivery again under the same id. Raises DeliveryNotFound."""

    def make_due(session: Session) -> WebhookDelivery | None:
        return webhooks.redeliver(
            session,
            delivery_id,
            tenant_id=caller.tenant_id,
            actor=caller.actor,
        )

    delivery = run_transaction(runtime.database, make_due)
    if delivery is None:
        raise DeliveryNotFound(f"There is no delivery {delivery_id}.")
    _announce(runtime, delivery_id)
    return delivery


def _announce(runtime: Runtime, delivery_id: UUID) -> None:
    try:
        runtime.broker.ask_to_deliver(delivery_id)
    except BrokerUnavailable as error:  # the sweeper will announce it
        log.info("delivery_not_announced", delivery_id=str(delivery_id), reason=str(error))


def _find(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    endpoint = webhooks.find(session, endpoint_id, tenant_id=caller.tenant_id)
    return _found(endpoint, endpoint_id)


def _lock(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    endpoint = webhooks.lock(session, endpoint_id, tenant_id=caller.tenant_id)
    return _found(endpoint, endpoint_id)


def _found(endpoint: WebhookEndpoint | None, endpoint_id: UUID) -> WebhookEndpoint:
    if endpoint is None:
        raise WebhookNotFound(f"There is no webhook {endpoint_id}.")
    return endpoint


def _check(
    runtime: Runtime,
    url: str | None,
    events: Sequence[str] | None,
    description: str | None,
) -> None:
    """Check the values, whose types are right already. Raises InvalidRequest."""
    if url is not None and (why := runtime.outbound.refusal(url)) is not None:
        raise InvalidRequest.at("url", why, accepted="an https URL of a public host")
    if events is not None and (not events or set(events) - set(EVENTS)):
        detail = "must name at least one event, and only known events"
        raise InvalidRequest.at("events", detail, accepted=list(EVENTS))
    if description is not None and not _is_description(description):
        length = f"text of at most {MAX_DESCRIPTION_CHARS} characters"
        detail = f"must be {length}, without control characters"
        accepted = {"max_chars": MAX_DESCRIPTION_CHARS}
        raise InvalidRequest.at("description", detail, accepted=accepted)


def _is_description(text: str) -> bool:
    return len(text) <= MAX_DESCRIPTION_CHARS and is_human(text)


def _in_order(events: Sequence[str]) -> list[str]:
    return [event for event in EVENTS if event in events]
