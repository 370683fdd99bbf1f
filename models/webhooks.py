"""Webhook endpoints of tenants, and deliveries: one row per event and endpoint, written with the job's own transition.

So an event is told at least once, however many processes die on the way, and always under the same id. A delivery is claimed before it
is tried, by the database's clock; its number of attempts fences what is written afterwards.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import any_, func, literal, or_, select, text, update
from sqlalchemy.orm import Session

from models import audit
from models.database import AFRESH, now_once
from models.ids import new_id
from models.states import DeliveryState
from models.tables import Job, WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookSecret

AT_ONCE = 4  # deliveries of one endpoint: whoever hangs takes no more threads than that
CLAIM_S = 30.0  # longer than any attempt takes
KEPT_FOR_S = 30 * 86_400.0
GONE, OWN_WISH = "gone", "by the tenant"

_IS_LIVE = (WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.deleted_at.is_(None))
_IS_PENDING = WebhookDelivery.state == DeliveryState.PENDING

# The endpoints that have anything pending, one probe of the index each, and of each the deliveries that are due and nobody's.
_DUE = text(
    """
    WITH RECURSIVE waiting (id) AS (
        (SELECT endpoint_id FROM webhook_deliveries WHERE state = 'pending' ORDER BY endpoint_id LIMIT 1)
        UNION ALL
        SELECT (SELECT endpoint_id FROM webhook_deliveries d WHERE d.state = 'pending' AND d.endpoint_id > waiting.id
                ORDER BY endpoint_id LIMIT 1)
        FROM waiting WHERE waiting.id IS NOT NULL
    )
    SELECT due.id FROM waiting CROSS JOIN LATERAL (
        SELECT d.id FROM webhook_deliveries d
        WHERE d.endpoint_id = waiting.id AND d.state = 'pending' AND d.due_at <= (SELECT clock_timestamp())
              AND (d.claimed_until IS NULL OR d.claimed_until <= (SELECT clock_timestamp()))
        ORDER BY d.due_at LIMIT :of_each
    ) due LIMIT :limit
    """
)

_CLAIM = text(
    """
    UPDATE webhook_deliveries d SET claimed_until = clock_timestamp() + make_interval(secs => :claim_s), attempts = attempts + 1
    FROM webhook_endpoints e
    WHERE d.id = :id AND d.state = 'pending' AND d.due_at <= clock_timestamp() AND e.id = d.endpoint_id AND e.deleted_at IS NULL
          AND (e.disabled_at IS NULL OR d.event = 'webhook.test') AND (d.claimed_until IS NULL OR d.claimed_until <= clock_timestamp())
          AND :at_once > (SELECT count(*) FROM webhook_deliveries o
                          WHERE o.endpoint_id = d.endpoint_id AND o.claimed_until > clock_timestamp())
    RETURNING d.attempts, d.endpoint_id, d.tenant_id, d.event, d.job_id, e.url,
              extract(epoch FROM clock_timestamp() - d.created_at)::double precision AS age_s
    """
)


@dataclass(frozen=True)
class Claim:
    """A delivery that is to be tried now. secrets: all that are live, the newest first."""

    id: uuid.UUID
    attempt: int
    endpoint_id: uuid.UUID
    tenant_id: uuid.UUID
    event: str
    job_id: uuid.UUID | None
    age_s: float
    url: str
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Tried:
    """What an attempt came to. status: of the answer; None without one.  try_again_s: from now; None: never."""

    status: int | None
    error: str | None
    took_s: float
    try_again_s: float | None

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def create(
    session: Session, *, tenant_id: uuid.UUID, url: str, events: Sequence[str], description: str, secret: str, actor: str
) -> WebhookEndpoint:
    """A new endpoint, with its first secret."""
    endpoint = WebhookEndpoint(tenant_id=tenant_id, url=url, events=list(events), description=description)
    endpoint.secrets = [WebhookSecret(secret=secret)]
    session.add(endpoint)
    audit.append(session, "webhook:endpoint:created", chain=tenant_id, actor=actor, endpoint_id=str(endpoint.id), events=list(events))
    return endpoint


def count(session: Session, *, tenant_id: uuid.UUID) -> int:
    """The tenant's endpoints, disabled ones included; its row stays locked, so that nobody adds one meanwhile."""
    session.execute(text("SELECT 1 FROM tenants WHERE id = :id FOR NO KEY UPDATE"), {"id": tenant_id})  # jobs may name it
    query = select(func.count()).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(query) or 0


def of_tenant(session: Session, *, tenant_id: uuid.UUID) -> Sequence[WebhookEndpoint]:
    """The tenant's endpoints, oldest first."""
    own = (WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalars(select(WebhookEndpoint).where(*own).order_by(WebhookEndpoint.id)).all()


def find(session: Session, endpoint_id: uuid.UUID, *, tenant_id: uuid.UUID) -> WebhookEndpoint | None:
    """The tenant's endpoint; None also for another tenant's and for one that was deleted."""
    own = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(select(WebhookEndpoint).where(*own))


def lock(session: Session, endpoint_id: uuid.UUID, *, tenant_id: uuid.UUID) -> WebhookEndpoint | None:
    """Find the endpoint as `find` does and keep it from others until commit; by the order of locks, before its secrets and deliveries."""
    own = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(select(WebhookEndpoint).where(*own).with_for_update(key_share=True), execution_options=AFRESH)


def change(
    session: Session,
    endpoint: WebhookEndpoint,
    *,
    actor: str,
    url: str | None = None,
    events: Sequence[str] | None = None,
    description: str | None = None,
    enabled: bool | None = None,
) -> None:
    """Give the endpoint other values; None leaves one as it is. What waits for one that is disabled waits until it is enabled again."""
    endpoint.url = endpoint.url if url is None else url
    endpoint.events = endpoint.events if events is None else list(events)
    endpoint.description = endpoint.description if description is None else description
    if enabled is not None:
        endpoint.disabled_at = None if enabled else endpoint.disabled_at or session.scalar(select(now_once()))
        endpoint.disabled_reason = None if enabled else endpoint.disabled_reason or OWN_WISH
    changed = [
        name for name, value in (("url", url), ("events", events), ("description", description), ("enabled", enabled)) if value is not None
    ]
    facts: dict[str, Any] = {"endpoint_id": str(endpoint.id), "changed": changed}
    audit.append(session, "webhook:endpoint:changed", chain=endpoint.tenant_id, actor=actor, **facts)


def delete(session: Session, endpoint: WebhookEndpoint, *, actor: str) -> None:
    """Send nothing there any more, not even what waits."""
    endpoint.deleted_at = session.scalar(select(now_once()))
    _end_pending(session, endpoint.id)
    audit.append(session, "webhook:endpoint:deleted", chain=endpoint.tenant_id, actor=actor, endpoint_id=str(endpoint.id))


def rotate(session: Session, endpoint: WebhookEndpoint, *, secret: str, grace_s: float, actor: str) -> None:
    """Sign with `secret` from now on, and with the one before it for `grace_s` more; older ones end at once."""
    ends_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, grace_s)
    older = update(WebhookSecret).where(WebhookSecret.endpoint_id == endpoint.id)
    session.execute(older.where(WebhookSecret.expires_at.is_not(None)).values(expires_at=func.clock_timestamp()))
    session.execute(older.where(WebhookSecret.expires_at.is_(None)).values(expires_at=ends_at))
    session.add(WebhookSecret(endpoint_id=endpoint.id, secret=secret))
    audit.append(session, "webhook:secret:rotated", chain=endpoint.tenant_id, actor=actor, endpoint_id=str(endpoint.id))


def note(session: Session, job: Job, event: str) -> None:
    """Write a delivery of `event` for every live endpoint of the job's tenant that wants it; it is due at once."""
    wants = select(WebhookEndpoint.id).where(
        WebhookEndpoint.tenant_id == job.tenant_id, *_IS_LIVE, literal(event) == any_(WebhookEndpoint.events)
    )
    for endpoint_id in session.scalars(wants):
        session.add(WebhookDelivery(endpoint_id=endpoint_id, tenant_id=job.tenant_id, event=event, job_id=job.id))


def note_test(session: Session, endpoint: WebhookEndpoint, event: str) -> WebhookDelivery:
    """A delivery of an event that is about no job, also while the endpoint is disabled."""
    delivery = WebhookDelivery(id=new_id(), endpoint_id=endpoint.id, tenant_id=endpoint.tenant_id, event=event)
    session.add(delivery)
    return delivery


def due(session: Session, *, limit: int) -> list[uuid.UUID]:
    """Deliveries that should be tried now and that nobody has claimed, a few of each endpoint."""
    return list(session.scalars(_DUE, {"of_each": AT_ONCE, "limit": limit}))


def due_of_job(session: Session, job_id: uuid.UUID) -> list[uuid.UUID]:
    """The job's deliveries that wait for their first attempt."""
    query = select(WebhookDelivery.id).where(WebhookDelivery.job_id == job_id, _IS_PENDING, WebhookDelivery.attempts == 0)
    return list(session.scalars(query))


def next_of_endpoint(session: Session, endpoint_id: uuid.UUID) -> uuid.UUID | None:
    """Another delivery that is due there."""
    is_free = or_(WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until <= now_once())
    here = (WebhookDelivery.endpoint_id == endpoint_id, _IS_PENDING, WebhookDelivery.due_at <= now_once(), is_free)
    return session.scalar(select(WebhookDelivery.id).where(*here).order_by(WebhookDelivery.due_at).limit(1))


def claim(session: Session, delivery_id: uuid.UUID) -> Claim | None:
    """Take the delivery for `CLAIM_S`; None if it is over, not due, somebody else's, or its endpoint has enough under way."""
    row = session.execute(_CLAIM, {"id": delivery_id, "claim_s": CLAIM_S, "at_once": AT_ONCE}).one_or_none()
    if row is None:
        return None
    is_live = or_(WebhookSecret.expires_at.is_(None), WebhookSecret.expires_at > now_once())
    query = select(WebhookSecret.secret).where(WebhookSecret.endpoint_id == row.endpoint_id, is_live)
    secrets = session.scalars(query.order_by(WebhookSecret.created_at.desc()))
    return Claim(delivery_id, row.attempts, row.endpoint_id, row.tenant_id, row.event, row.job_id, row.age_s, row.url, tuple(secrets))


def record(session: Session, claim: Claim, tried: Tried, *, actor: str) -> DeliveryState | None:
    """Note what the attempt came to, and what comes of the delivery; None if another attempt has begun since.

    A 410 disables the endpoint.
    """
    is_gone = tried.status == 410
    endpoint = session.get(WebhookEndpoint, claim.endpoint_id, with_for_update={"key_share": True}) if is_gone else None
    delivery = session.get(WebhookDelivery, claim.id, with_for_update=True)
    if delivery is None or delivery.attempts != claim.attempt or delivery.state != DeliveryState.PENDING:
        return None
    session.add(
        WebhookAttempt(delivery_id=claim.id, attempt=claim.attempt, status=tried.status, error=tried.error, took_s=round(tried.took_s, 4))
    )
    delivery.claimed_until = None
    if tried.is_delivered or is_gone or tried.try_again_s is None:
        gone = DeliveryState.GONE if is_gone else DeliveryState.FAILED
        delivery.state = DeliveryState.DELIVERED if tried.is_delivered else gone
        delivery.due_at, delivery.ended_at = None, func.clock_timestamp()
    else:
        delivery.due_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, tried.try_again_s)
    state = DeliveryState(delivery.state)
    session.flush()
    if endpoint is not None:
        endpoint.disabled_at, endpoint.disabled_reason = endpoint.disabled_at or func.clock_timestamp(), GONE
        _end_pending(session, endpoint.id)
        audit.append(session, "webhook:endpoint:disabled", chain=claim.tenant_id, actor=actor, endpoint_id=str(endpoint.id), reason=GONE)
    return state


def page(
    session: Session, endpoint_id: uuid.UUID, *, limit: int, before: uuid.UUID | None, state: str | None
) -> list[tuple[WebhookDelivery, list[WebhookAttempt]]]:
    """Up to `limit` of the endpoint's deliveries, newest first, older than `before`, each with its attempts."""
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    query = query if before is None else query.where(WebhookDelivery.id < before)
    query = query if state is None else query.where(WebhookDelivery.state == state)
    deliveries = session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit)).all()
    tried = select(WebhookAttempt).where(WebhookAttempt.delivery_id.in_([delivery.id for delivery in deliveries]))
    attempts = session.scalars(tried.order_by(WebhookAttempt.attempt)).all()
    return [(delivery, [attempt for attempt in attempts if attempt.delivery_id == delivery.id]) for delivery in deliveries]


def redeliver(session: Session, delivery_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str) -> WebhookDelivery | None:
    """Make the tenant's delivery due now, under the id it has, whatever came of it; None if it is not there, or its endpoint is not."""
    query = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.tenant_id == tenant_id)
    delivery = session.scalar(query.with_for_update())
    if delivery is None or find(session, delivery.endpoint_id, tenant_id=tenant_id) is None:
        return None
    delivery.state, delivery.due_at, delivery.ended_at = DeliveryState.PENDING.value, func.clock_timestamp(), None
    session.flush()
    session.refresh(delivery)
    facts: dict[str, Any] = {"delivery_id": str(delivery_id), "endpoint_id": str(delivery.endpoint_id)}
    audit.append(session, "webhook:delivery:redelivered", chain=tenant_id, actor=actor, **facts)
    return delivery


def pending(session: Session) -> int:
    """Deliveries that are not over."""
    return session.scalar(select(func.count()).where(_IS_PENDING)) or 0


def forget_old(session: Session, *, limit: int) -> int:
    """Delete up to `limit` deliveries that ended long ago, with their attempts; how many there were."""
    old = select(WebhookDelivery.id).where(
        WebhookDelivery.created_at < now_once() - func.make_interval(0, 0, 0, 0, 0, 0, KEPT_FOR_S), WebhookDelivery.ended_at.is_not(None)
    )
    ids = list(session.scalars(old.order_by(WebhookDelivery.created_at).limit(limit)))
    session.execute(text("DELETE FROM webhook_deliveries WHERE id = ANY(:ids)"), {"ids": ids})
    return len(ids)


def _end_pending(session: Session, endpoint_id: uuid.UUID) -> None:
    over = {"state": DeliveryState.GONE.value, "due_at": None, "claimed_until": None, "ended_at": func.clock_timestamp()}
    here = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id, _IS_PENDING)
    session.execute(here.values(**over).execution_options(synchronize_session=False))
