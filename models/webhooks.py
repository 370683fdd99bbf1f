"""Keep tenants' webhook endpoints, and deliveries: one row per event and endpoint.

A delivery is written in the transaction of the job's own transition. So an event is delivered at
least once, however many processes die on the way, and always under the same id. A delivery is
claimed before it is tried, by the database's clock; its number of attempts fences later writes.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any

from sqlalchemy import any_, func, literal, or_, select, text, update
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.database import AFRESH, statement_time
from models.ids import new_id
from models.tables import Job, WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookSecret
from policy.states import DeliveryState

# Attempts under way at once, over all processes of the role; each holds a thread for up to 10 s.
AT_ONCE_PER_ENDPOINT = 4
AT_ONCE_PER_TENANT = 4
SLOW_AT_ONCE = 4  # at endpoints whose last attempt was slow, over all tenants; of each tenant one
CLAIM_S = 30.0  # longer than any attempt takes
KEPT_FOR_S = 30 * 86_400.0
OVERDUE_S = 3600.0  # due for so long and not tried: its endpoint is disabled
PENDING_COUNTED = 10_000  # with a receiver away for days there may be a million
GONE = "gone"
DISABLED_BY_TENANT = "by the tenant"

_IS_LIVE = (WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.deleted_at.is_(None))
_IS_PENDING = WebhookDelivery.state == DeliveryState.PENDING

# The next endpoints with pending deliveries, by ascending id: one probe of the index for each.
_WITH_PENDING = text(
    """
    WITH RECURSIVE waiting (id) AS (
        (SELECT endpoint_id FROM webhook_deliveries
         WHERE state = 'pending' AND endpoint_id > :after ORDER BY endpoint_id LIMIT 1)
        UNION ALL
        SELECT (SELECT endpoint_id FROM webhook_deliveries d
                WHERE d.state = 'pending' AND d.endpoint_id > waiting.id
                ORDER BY endpoint_id LIMIT 1)
        FROM waiting WHERE waiting.id IS NOT NULL
    )
    SELECT id FROM waiting WHERE id IS NOT NULL LIMIT :limit
    """
)

# Deliveries of these endpoints that are due and not claimed, as many as may be tried at once.
_DUE = text(
    """
    SELECT id FROM (
        SELECT due.id, e.is_slow,
               row_number() OVER (PARTITION BY e.tenant_id, e.is_slow ORDER BY due.due_at) AS nth
        FROM webhook_endpoints e CROSS JOIN LATERAL (
            SELECT d.id, d.due_at FROM webhook_deliveries d
            WHERE d.endpoint_id = e.id AND d.state = 'pending'
                  AND d.due_at <= (SELECT clock_timestamp())
                  AND (d.claimed_until IS NULL OR d.claimed_until <= (SELECT clock_timestamp()))
                  AND (e.disabled_at IS NULL OR d.event = 'webhook.test')
            ORDER BY d.due_at LIMIT :of_endpoint
        ) due
        WHERE e.id = ANY(:endpoints) AND e.deleted_at IS NULL
    ) listed
    WHERE nth <= CASE WHEN is_slow THEN 1 ELSE :of_tenant END
    """
)

_IS_CLAIMABLE = """
    d.id = :id AND d.state = 'pending' AND d.due_at <= clock_timestamp()
    AND (d.claimed_until IS NULL OR d.claimed_until <= clock_timestamp())
    AND e.id = d.endpoint_id AND e.deleted_at IS NULL
    AND (e.disabled_at IS NULL OR d.event = 'webhook.test')
"""
_LOOK = text(
    f"""
    SELECT d.tenant_id, e.is_slow FROM webhook_deliveries d, webhook_endpoints e
    WHERE {_IS_CLAIMABLE}
    """
)
_CLAIM = text(
    f"""
    WITH under_way AS (
        SELECT o.endpoint_id, o.tenant_id, oe.is_slow
        FROM webhook_deliveries o JOIN webhook_endpoints oe ON oe.id = o.endpoint_id
        WHERE o.claimed_until > clock_timestamp()
    )
    UPDATE webhook_deliveries d
    SET claimed_until = clock_timestamp() + make_interval(secs => :claim_s), attempts = attempts + 1
    FROM webhook_endpoints e
    WHERE {_IS_CLAIMABLE}
          AND (SELECT count(*) FROM under_way u WHERE u.endpoint_id = d.endpoint_id) < :of_endpoint
          AND (SELECT count(*) FROM under_way u WHERE u.tenant_id = d.tenant_id) < :of_tenant
          AND (NOT e.is_slow
               OR (SELECT count(*) FROM under_way u WHERE u.is_slow) < :slow
                  AND NOT EXISTS (
                      SELECT 1 FROM under_way u WHERE u.is_slow AND u.tenant_id = d.tenant_id))
    RETURNING d.attempts, d.endpoint_id, d.tenant_id, d.event, d.job_id, d.data, d.created_at,
              e.url, e.is_slow,
              extract(epoch FROM clock_timestamp() - d.created_at)::double precision AS age_s
    """
)
_TAKE_TURNS = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


@dataclass(frozen=True)
class Claim:
    """A delivery that is to be tried now. secrets: all that are live, the newest first."""

    id: uuid.UUID
    attempt: int
    endpoint_id: uuid.UUID
    tenant_id: uuid.UUID
    event: str
    job_id: uuid.UUID | None
    data: dict[str, Any] | None  # of an event of no job
    created_at: datetime
    age_s: float
    url: str
    is_slow: bool  # its endpoint, by the attempt before this one
    secrets: tuple[str, ...]


class TooManyUnderWay(Exception):
    """The delivery is due, but too many attempts are under way; the sweeper tries it again later.

    The endpoint, the tenant, or the slow endpoints together are at their cap.
    """


@dataclass(frozen=True)
class AttemptResult:
    """The result of an attempt.

    status: the answer's HTTP status; None without an answer.  try_again_s: from now; None: never.
    """

    status: int | None
    error: str | None
    took_s: float
    try_again_s: float | None

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def create(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    url: str,
    events: Sequence[str],
    description: str,
    secret: str,
    actor: str,
) -> WebhookEndpoint:
    """Create an endpoint with its first secret."""
    endpoint = WebhookEndpoint(
        tenant_id=tenant_id, url=url, events=list(events), description=description
    )
    endpoint.secrets = [WebhookSecret(secret=secret)]
    session.add(endpoint)
    audit.append(
        session,
        EventName.WEBHOOK_ENDPOINT_CREATED,
        chain=tenant_id,
        actor=actor,
        endpoint_id=str(endpoint.id),
        events=list(events),
    )
    return endpoint


def count(session: Session, *, tenant_id: uuid.UUID) -> int:
    """Count the tenant's endpoints, disabled ones included.

    The tenant's row stays locked, so that no endpoint is added meanwhile.
    """
    # NO KEY: jobs that name the tenant are accepted meanwhile.
    lock_tenant = text("SELECT 1 FROM tenants WHERE id = :id FOR NO KEY UPDATE")
    session.execute(lock_tenant, {"id": tenant_id})
    query = select(func.count()).where(
        WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None)
    )
    return session.scalar(query) or 0


def of_tenant(session: Session, *, tenant_id: uuid.UUID) -> Sequence[WebhookEndpoint]:
    """List the tenant's endpoints, oldest first."""
    own = (WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalars(select(WebhookEndpoint).where(*own).order_by(WebhookEndpoint.id)).all()


def find(
    session: Session, endpoint_id: uuid.UUID, *, tenant_id: uuid.UUID
) -> WebhookEndpoint | None:
    """Find the tenant's endpoint; None also for another tenant's and for a deleted one."""
    own = (
        WebhookEndpoint.id == endpoint_id,
        WebhookEndpoint.tenant_id == tenant_id,
        WebhookEndpoint.deleted_at.is_(None),
    )
    return session.scalar(select(WebhookEndpoint).where(*own))


def lock(
    session: Session, endpoint_id: uuid.UUID, *, tenant_id: uuid.UUID
) -> WebhookEndpoint | None:
    """Find the endpoint as `find` does, and lock its row until commit.

    By the order of locks, before its secrets and deliveries.
    """
    own = (
        WebhookEndpoint.id == endpoint_id,
        WebhookEndpoint.tenant_id == tenant_id,
        WebhookEndpoint.deleted_at.is_(None),
    )
    return session.scalar(
        select(WebhookEndpoint).where(*own).with_for_update(key_share=True),
        execution_options=AFRESH,
    )


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
    """Change values of the endpoint; None leaves one as it is.

    Deliveries to a disabled endpoint wait until it is enabled again.
    """
    endpoint.url = endpoint.url if url is None else url
    endpoint.events = endpoint.events if events is None else list(events)
    endpoint.description = endpoint.description if description is None else description
    if enabled:
        endpoint.disabled_at = None
        endpoint.disabled_reason = None
    elif enabled is not None:
        endpoint.disabled_at = endpoint.disabled_at or session.scalar(select(statement_time()))
        endpoint.disabled_reason = endpoint.disabled_reason or DISABLED_BY_TENANT
    values = {"url": url, "events": events, "description": description, "enabled": enabled}
    changed = [name for name, value in values.items() if value is not None]
    facts: dict[str, Any] = {"endpoint_id": str(endpoint.id), "changed": changed}
    audit.append(
        session, EventName.WEBHOOK_ENDPOINT_CHANGED, chain=endpoint.tenant_id, actor=actor, **facts
    )


def delete(session: Session, endpoint: WebhookEndpoint, *, actor: str) -> None:
    """Delete the endpoint: nothing is sent there any more, not even waiting deliveries."""
    endpoint.deleted_at = session.scalar(select(statement_time()))
    _end_pending(session, endpoint.id)
    audit.append(
        session,
        EventName.WEBHOOK_ENDPOINT_DELETED,
        chain=endpoint.tenant_id,
        actor=actor,
        endpoint_id=str(endpoint.id),
    )


def rotate(
    session: Session, endpoint: WebhookEndpoint, *, secret: str, grace_s: float, actor: str
) -> None:
    """Sign with `secret` from now on, and for `grace_s` also with the one before it.

    Older secrets end at once.
    """
    ends_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, grace_s)
    older = update(WebhookSecret).where(WebhookSecret.endpoint_id == endpoint.id)
    session.execute(
        older.where(WebhookSecret.expires_at.is_not(None)).values(expires_at=func.clock_timestamp())
    )
    session.execute(older.where(WebhookSecret.expires_at.is_(None)).values(expires_at=ends_at))
    session.add(WebhookSecret(endpoint_id=endpoint.id, secret=secret))
    audit.append(
        session,
        EventName.WEBHOOK_SECRET_ROTATED,
        chain=endpoint.tenant_id,
        actor=actor,
        endpoint_id=str(endpoint.id),
    )


def note(session: Session, job: Job, event: str) -> None:
    """Write a delivery of `event` for every live endpoint of the job's tenant that wants it.

    It is due at once.
    """
    wants = select(WebhookEndpoint.id).where(
        WebhookEndpoint.tenant_id == job.tenant_id,
        *_IS_LIVE,
        literal(event) == any_(WebhookEndpoint.events),
    )
    for endpoint_id in session.scalars(wants):
        delivery = WebhookDelivery(
            endpoint_id=endpoint_id, tenant_id=job.tenant_id, event=event, job_id=job.id
        )
        session.add(delivery)


def note_of_tenant(
    session: Session, tenant_id: uuid.UUID, event: str, data: Mapping[str, Any]
) -> None:
    """Write a delivery that tells of no job to every live endpoint of the tenant that wants it."""
    wants = select(WebhookEndpoint.id).where(
        WebhookEndpoint.tenant_id == tenant_id, any_(WebhookEndpoint.events) == event, *_IS_LIVE
    )
    for endpoint_id in session.scalars(wants.order_by(WebhookEndpoint.id)):
        session.add(
            WebhookDelivery(
                endpoint_id=endpoint_id, tenant_id=tenant_id, event=event, data=dict(data)
            )
        )


def note_test(session: Session, endpoint: WebhookEndpoint, event: str) -> WebhookDelivery:
    """Write a delivery of an event without a job, also while the endpoint is disabled."""
    delivery = WebhookDelivery(
        id=new_id(), endpoint_id=endpoint.id, tenant_id=endpoint.tenant_id, event=event
    )
    session.add(delivery)
    return delivery


def endpoints_with_pending(
    session: Session, *, after: uuid.UUID | None, limit: int
) -> list[uuid.UUID]:
    """List up to `limit` endpoints with pending deliveries, by id, beginning after `after`.

    None: at the first.
    """
    start = uuid.UUID(int=0) if after is None else after
    return list(session.scalars(_WITH_PENDING, {"after": start, "limit": limit}))


def due(session: Session, endpoint_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """List the endpoints' deliveries that should be tried now and are not claimed.

    Of an endpoint and of a tenant no more than may be under way at once; one of a tenant's slow
    endpoints, none of disabled ones.
    """
    caps = {"of_endpoint": AT_ONCE_PER_ENDPOINT, "of_tenant": AT_ONCE_PER_TENANT}
    return list(session.scalars(_DUE, {"endpoints": list(endpoint_ids), **caps}))


def due_of_job(session: Session, job_id: uuid.UUID) -> list[uuid.UUID]:
    """List the job's deliveries that wait for their first attempt."""
    query = select(WebhookDelivery.id).where(
        WebhookDelivery.job_id == job_id, _IS_PENDING, WebhookDelivery.attempts == 0
    )
    return list(session.scalars(query))


def next_of_endpoint(session: Session, endpoint_id: uuid.UUID) -> uuid.UUID | None:
    """Find another delivery that is due at the endpoint; None if there is none."""
    is_free = or_(
        WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until <= statement_time()
    )
    here = (
        WebhookDelivery.endpoint_id == endpoint_id,
        _IS_PENDING,
        WebhookDelivery.due_at <= statement_time(),
        is_free,
    )
    return session.scalar(
        select(WebhookDelivery.id).where(*here).order_by(WebhookDelivery.due_at).limit(1)
    )


def claim(session: Session, delivery_id: uuid.UUID) -> Claim | None:
    """Take the delivery for `CLAIM_S`.

    None if it is over, not due, claimed already, or its endpoint takes none. Raises
    TooManyUnderWay. Claims of one tenant take turns, and those of slow endpoints over all tenants,
    so that the caps are exact; in this order, so that no two claims deadlock.
    """
    found = session.execute(_LOOK, {"id": delivery_id}).one_or_none()
    if found is None:
        return None
    session.execute(_TAKE_TURNS, {"name": f"webhooks:{found.tenant_id}"})
    if found.is_slow:
        session.execute(_TAKE_TURNS, {"name": "webhooks:slow"})
    asked = {
        "id": delivery_id,
        "claim_s": CLAIM_S,
        "of_endpoint": AT_ONCE_PER_ENDPOINT,
        "of_tenant": AT_ONCE_PER_TENANT,
        "slow": SLOW_AT_ONCE,
    }
    row = session.execute(_CLAIM, asked).one_or_none()
    if row is None:
        if session.execute(_LOOK, {"id": delivery_id}).one_or_none() is None:
            return None
        raise TooManyUnderWay
    return Claim(
        id=delivery_id,
        attempt=row.attempts,
        endpoint_id=row.endpoint_id,
        tenant_id=row.tenant_id,
        event=row.event,
        job_id=row.job_id,
        data=row.data,
        created_at=row.created_at,
        age_s=row.age_s,
        url=row.url,
        is_slow=row.is_slow,
        secrets=_live_secrets(session, row.endpoint_id),
    )


def _live_secrets(session: Session, endpoint_id: uuid.UUID) -> tuple[str, ...]:
    """Read the secrets that sign for the endpoint now, newest first."""
    is_live = or_(WebhookSecret.expires_at.is_(None), WebhookSecret.expires_at > statement_time())
    query = select(WebhookSecret.secret).where(WebhookSecret.endpoint_id == endpoint_id, is_live)
    return tuple(session.scalars(query.order_by(WebhookSecret.created_at.desc())))


def note_speed(session: Session, endpoint_id: uuid.UUID, *, is_slow: bool) -> None:
    """Remember whether the endpoint's last attempt took long: slow ones share a few threads."""
    session.execute(
        update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).values(is_slow=is_slow)
    )


def record(
    session: Session, claim: Claim, tried: AttemptResult, *, actor: str
) -> DeliveryState | None:
    """Note the result of the attempt and the delivery's new state, and return that state.

    None if another attempt has begun since. A 410 disables the endpoint.
    """
    endpoint = None
    if tried.status == HTTPStatus.GONE:
        no_key = {"key_share": True}
        endpoint = session.get(WebhookEndpoint, claim.endpoint_id, with_for_update=no_key)
    delivery = session.get(WebhookDelivery, claim.id, with_for_update=True)
    if delivery is None or delivery.attempts != claim.attempt:
        return None
    if delivery.state != DeliveryState.PENDING:
        return None
    session.add(
        WebhookAttempt(
            delivery_id=claim.id,
            attempt=claim.attempt,
            status=tried.status,
            error=tried.error,
            took_s=round(tried.took_s, 4),
        )
    )
    _end_or_put_off(delivery, tried)
    state = DeliveryState(delivery.state)
    session.flush()
    if endpoint is not None:
        _disable_gone(session, endpoint, actor=actor)
    return state


def _end_or_put_off(delivery: WebhookDelivery, tried: AttemptResult) -> None:
    """Set the delivery's state after an attempt: it is over, or due again later."""
    delivery.claimed_until = None
    is_gone = tried.status == HTTPStatus.GONE
    if tried.is_delivered or is_gone or tried.try_again_s is None:
        gone = DeliveryState.GONE if is_gone else DeliveryState.FAILED
        delivery.state = DeliveryState.DELIVERED if tried.is_delivered else gone
        delivery.due_at = None
        delivery.ended_at = func.clock_timestamp()
    else:
        pause = func.make_interval(0, 0, 0, 0, 0, 0, tried.try_again_s)
        delivery.due_at = func.clock_timestamp() + pause


def _disable_gone(session: Session, endpoint: WebhookEndpoint, *, actor: str) -> None:
    """Disable an endpoint that answered 410, and end its deliveries."""
    endpoint.disabled_at = endpoint.disabled_at or func.clock_timestamp()
    endpoint.disabled_reason = GONE
    _end_pending(session, endpoint.id)
    audit.append(
        session,
        EventName.WEBHOOK_ENDPOINT_DISABLED,
        chain=endpoint.tenant_id,
        actor=actor,
        endpoint_id=str(endpoint.id),
        reason=GONE,
    )


def page(
    session: Session,
    endpoint_id: uuid.UUID,
    *,
    limit: int,
    before: uuid.UUID | None,
    state: str | None,
) -> list[tuple[WebhookDelivery, list[WebhookAttempt]]]:
    """List up to `limit` of the endpoint's deliveries, newest first, each with its attempts.

    before: older than this id alone.  state: in this state alone.
    """
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    query = query if before is None else query.where(WebhookDelivery.id < before)
    query = query if state is None else query.where(WebhookDelivery.state == state)
    deliveries = session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit)).all()
    tried = select(WebhookAttempt).where(
        WebhookAttempt.delivery_id.in_([delivery.id for delivery in deliveries])
    )
    attempts = session.scalars(tried.order_by(WebhookAttempt.attempt)).all()
    return [
        (delivery, [attempt for attempt in attempts if attempt.delivery_id == delivery.id])
        for delivery in deliveries
    ]


def redeliver(
    session: Session, delivery_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str
) -> WebhookDelivery | None:
    """Make the tenant's delivery due now, under the id it has, whatever its state.

    None if the tenant has no such delivery, or its endpoint was deleted.
    """
    query = select(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.tenant_id == tenant_id
    )
    delivery = session.scalar(query.with_for_update())
    if delivery is None or find(session, delivery.endpoint_id, tenant_id=tenant_id) is None:
        return None
    delivery.state = DeliveryState.PENDING.value
    delivery.due_at = func.clock_timestamp()
    delivery.ended_at = None
    session.flush()
    session.refresh(delivery)
    facts: dict[str, Any] = {
        "delivery_id": str(delivery_id),
        "endpoint_id": str(delivery.endpoint_id),
    }
    audit.append(
        session, EventName.WEBHOOK_DELIVERY_REDELIVERED, chain=tenant_id, actor=actor, **facts
    )
    return delivery


def pending(session: Session) -> int:
    """Count deliveries that are not over, up to PENDING_COUNTED.

    The limit is there because this is asked every few seconds.
    """
    some = select(WebhookDelivery.id).where(_IS_PENDING).limit(PENDING_COUNTED).subquery()
    return session.scalar(select(func.count()).select_from(some)) or 0


def give_up_old(session: Session, *, older_than_s: float, limit: int) -> int:
    """End up to `limit` deliveries written so long ago that may not be tried; return how many.

    They wait for an endpoint that was disabled and never enabled again. One that was redelivered by
    hand is due anew, and stays.
    """
    oldest = statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s)
    overdue = statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, OVERDUE_S)
    old = select(WebhookDelivery.id).where(
        _IS_PENDING,
        WebhookDelivery.created_at < oldest,
        WebhookDelivery.due_at < overdue,
        or_(
            WebhookDelivery.claimed_until.is_(None),
            WebhookDelivery.claimed_until < statement_time(),
        ),
    )
    ids = list(session.scalars(old.limit(limit).with_for_update(skip_locked=True)))
    over = update(WebhookDelivery).where(WebhookDelivery.id.in_(ids), _IS_PENDING)
    ended = over.values(
        state=DeliveryState.FAILED.value,
        due_at=None,
        claimed_until=None,
        ended_at=func.clock_timestamp(),
    )
    session.execute(ended.execution_options(synchronize_session=False))
    return len(ids)


def forget_old(session: Session, *, limit: int) -> int:
    """Delete up to `limit` deliveries that ended long ago, with their attempts; return how many."""
    old = select(WebhookDelivery.id).where(
        WebhookDelivery.created_at
        < statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, KEPT_FOR_S),
        WebhookDelivery.ended_at.is_not(None),
    )
    ids = list(session.scalars(old.order_by(WebhookDelivery.created_at).limit(limit)))
    session.execute(text("DELETE FROM webhook_deliveries WHERE id = ANY(:ids)"), {"ids": ids})
    return len(ids)


def _end_pending(session: Session, endpoint_id: uuid.UUID) -> None:
    here = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id, _IS_PENDING)
    ended = here.values(
        state=DeliveryState.GONE.value,
        due_at=None,
        claimed_until=None,
        ended_at=func.clock_timestamp(),
    )
    session.execute(ended.execution_options(synchronize_session=False))
