"""Which deliveries of webhooks are tried, how many at once, and which never again; in a database
that no courier looks at.
"""

import uuid
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models import jobs, leases, tenants, webhooks
from models.database import transaction
from models.tables import WebhookDelivery, WebhookEndpoint
from models.webhooks import (
    AT_ONCE_PER_ENDPOINT,
    AT_ONCE_PER_TENANT,
    CLAIM_S,
    KEPT_FOR_S,
    SLOW_AT_ONCE,
    AttemptResult,
    TooManyUnderWay,
)
from policy.failures import FailureCode
from policy.states import FINAL_STATES, DeliveryState, JobState
from policy.webhooks import ENDED_EVENTS, EVENTS, GIVE_UP_AFTER_S, TEST_EVENT
from tests.builders import a_job, a_lease, hand_off, store
from tests.models.facts import at_once

HEARD = AttemptResult(status=204, error=None, took_s=0.1, try_again_s=5.0)


@pytest.fixture(autouse=True)
def nothing_waits(database):
    with transaction(database.app) as session:
        session.execute(text("DELETE FROM webhook_deliveries"))


@pytest.fixture
def session(database):
    """Committed, unlike the room's usual one: claims of several sessions are counted together."""
    with Session(database.app, expire_on_commit=False) as session:
        yield session
        session.rollback()


def a_tenant(session) -> uuid.UUID:
    return tenants.create(session, name=f"t-{uuid.uuid4().hex[:12]}").id


def an_endpoint(
    session, tenant_id=None, *, is_slow=False, deliveries=1, **columns
) -> WebhookEndpoint:
    """An endpoint with test events (they are about no job) that are due.

    Disabled ones refuse others.
    """
    tenant_id = tenant_id or a_tenant(session)
    made = webhooks.create(
        session,
        tenant_id=tenant_id,
        url="https://example.com/",
        events=[],
        description="",
        secret="whsec_AAAA",
        actor="tests",
    )
    session.flush()
    made.is_slow = is_slow
    for name, value in columns.items():
        setattr(made, name, value)
    for _ in range(deliveries):
        session.add(WebhookDelivery(endpoint_id=made.id, tenant_id=tenant_id, event="job.canceled"))
    session.commit()
    return made


def all_due(session, *, limit=1000) -> list[uuid.UUID]:
    return webhooks.due(session, webhooks.endpoints_with_pending(session, after=None, limit=limit))


def of(session, *endpoints) -> list[uuid.UUID]:
    here = WebhookDelivery.endpoint_id.in_([endpoint.id for endpoint in endpoints])
    return list(
        session.scalars(select(WebhookDelivery.id).where(here).order_by(WebhookDelivery.id))
    )


def claim_all(session, delivery_ids) -> tuple[list[webhooks.Claim], int]:
    """The claims that were granted, and how many deliveries were put off."""
    claims, put_off = [], 0
    for delivery_id in delivery_ids:
        try:
            claims.append(webhooks.claim(session, delivery_id))
        except TooManyUnderWay:
            put_off += 1
        session.commit()
    return claims, put_off


def test_due_leaves_out_what_waits_for_disabled_and_deleted_endpoints(session, database):
    now = session.scalar(text("SELECT clock_timestamp()"))
    an_endpoint(session, disabled_at=now)
    an_endpoint(session, deleted_at=now)
    live = an_endpoint(session)

    assert all_due(session) == of(session, live)


def test_due_finds_a_retry_behind_any_number_of_disabled_endpoints(session):
    now = session.scalar(text("SELECT clock_timestamp()"))
    for _ in range(12):
        an_endpoint(session, deliveries=4, disabled_at=now)
    live = an_endpoint(session)
    assert live.id == webhooks.endpoints_with_pending(session, after=None, limit=100)[-1]

    found, after = [], None
    for _ in range(13):  # sweeps that look at one endpoint each
        [after] = webhooks.endpoints_with_pending(session, after=after, limit=1)
        found += webhooks.due(session, [after])

    assert found == of(session, live)


def test_due_lists_no_more_of_a_tenant_than_may_be_under_way_at_once(session):
    tenant = a_tenant(session)
    for _ in range(6):
        an_endpoint(session, tenant, deliveries=6)
    for _ in range(6):
        an_endpoint(session, tenant, deliveries=6, is_slow=True)
    other = an_endpoint(session)

    due = all_due(session)

    assert len(due) == AT_ONCE_PER_TENANT + 1 + 1
    assert of(session, other)[0] in due


def test_a_tenant_has_a_few_attempts_under_way_however_many_endpoints_it_has(session):
    tenant = a_tenant(session)
    endpoints = [an_endpoint(session, tenant, deliveries=2) for _ in range(6)]
    other = an_endpoint(session, deliveries=AT_ONCE_PER_ENDPOINT)

    claims, put_off = claim_all(session, of(session, *endpoints))
    others, _ = claim_all(session, of(session, other))

    assert (len(claims), put_off) == (AT_ONCE_PER_TENANT, 12 - AT_ONCE_PER_TENANT)
    assert len(others) == AT_ONCE_PER_ENDPOINT


def test_slow_endpoints_share_a_few_attempts_over_all_tenants_and_one_of_each(session):
    tenant = a_tenant(session)
    slow_of_one = [an_endpoint(session, tenant, is_slow=True, deliveries=3) for _ in range(3)]
    slow_of_others = [an_endpoint(session, is_slow=True) for _ in range(SLOW_AT_ONCE + 2)]
    quick = an_endpoint(session, tenant)

    of_one, _ = claim_all(session, of(session, *slow_of_one))
    of_others, put_off = claim_all(session, of(session, *slow_of_others))
    quick_ones, _ = claim_all(session, of(session, quick))

    assert (len(of_one), len(of_others), put_off) == (1, SLOW_AT_ONCE - 1, 3)
    assert len(quick_ones) == 1


def test_claims_at_the_same_moment_keep_the_caps(session, database):
    tenant = a_tenant(session)
    wanted = of(session, *[an_endpoint(session, tenant, deliveries=3) for _ in range(5)])
    slow = of(session, *[an_endpoint(session, is_slow=True) for _ in range(10)])

    def claimed(delivery_id) -> bool:
        try:
            with transaction(database.app) as own:
                return webhooks.claim(own, delivery_id) is not None
        except TooManyUnderWay:
            return False

    granted = at_once(*(partial(claimed, delivery_id) for delivery_id in [*wanted, *slow]))

    assert sum(granted[: len(wanted)]) == AT_ONCE_PER_TENANT
    assert sum(granted[len(wanted) :]) == SLOW_AT_ONCE


def test_an_endpoint_that_is_quick_again_leaves_the_slow_ones(session):
    endpoint = an_endpoint(session, is_slow=True, deliveries=3)
    [claim], put_off = claim_all(session, of(session, endpoint)[:2])
    assert (claim.is_slow, put_off) == (True, 1)

    webhooks.record(session, claim, HEARD, actor="tests")
    webhooks.note_speed(session, endpoint.id, is_slow=False)
    session.commit()
    claims, put_off = claim_all(session, of(session, endpoint)[1:])

    assert ([claim.is_slow for claim in claims], put_off) == ([False, False], 0)


def test_deliveries_that_nobody_may_make_end_after_three_days_unless_asked_for_again(
    session,
):
    now = session.scalar(text("SELECT clock_timestamp()"))
    old = now - timedelta(seconds=GIVE_UP_AFTER_S + 60)
    disabled = an_endpoint(session, deliveries=3, disabled_at=old)
    young, asked_again, overdue = (session.get(WebhookDelivery, id) for id in of(session, disabled))
    asked_again.created_at, asked_again.due_at = old, now
    overdue.created_at, overdue.due_at = old, old
    session.commit()

    assert webhooks.give_up_old(session, older_than_s=GIVE_UP_AFTER_S, limit=100) == 1
    session.commit()

    session.expire_all()
    states = [delivery.state for delivery in (young, asked_again, overdue)]
    assert states == [DeliveryState.PENDING, DeliveryState.PENDING, DeliveryState.FAILED]


def test_a_test_event_reaches_a_disabled_endpoint(session):
    endpoint = an_endpoint(
        session, deliveries=0, disabled_at=session.scalar(text("SELECT clock_timestamp()"))
    )
    delivery = webhooks.note_test(session, endpoint, TEST_EVENT)
    session.commit()

    assert all_due(session) == [delivery.id]
    assert len(claim_all(session, [delivery.id])[0]) == 1


def succeed(session, job):
    lease = a_lease(session, job)
    hand_off(session, lease)
    store(session, job)


def fail(session, job):
    leases.fail(session, a_lease(session, job), code=FailureCode.INTERNAL, detail="x")


def reject(session, job):
    """As the safety rules will: nothing rejects a job yet."""
    jobs.finish(session, job, JobState.REJECTED, code=FailureCode.UNSUPPORTED)


def cancel(session, job):
    jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")


def expire(session, job):
    jobs.expire(session, job.id)


ENDS = {
    JobState.SUCCEEDED: succeed,
    JobState.FAILED: fail,
    JobState.REJECTED: reject,
    JobState.CANCELED: cancel,
    JobState.EXPIRED: expire,
}


def test_every_final_state_has_its_event_and_its_way_there():
    assert set(ENDS) == set(FINAL_STATES)
    assert {f"job.{state}" for state in FINAL_STATES} == set(ENDED_EVENTS)


@pytest.mark.parametrize("state", ENDS)
def test_each_final_state_writes_one_delivery_to_each_endpoint_that_wants_it(session, state):
    tenant = tenants.create(session, name=f"t-{uuid.uuid4().hex[:12]}")
    event, others = f"job.{state}", [each for each in EVENTS if each != f"job.{state}"]
    none = {"deliveries": 0}
    wants = [an_endpoint(session, tenant.id, **none, events=each) for each in ([event], EVENTS)]
    now = session.scalar(text("SELECT clock_timestamp()"))
    an_endpoint(session, tenant.id, deliveries=0, events=others)
    an_endpoint(session, tenant.id, deliveries=0, events=[event], disabled_at=now)
    an_endpoint(session, tenant.id, deliveries=0, events=[event], deleted_at=now)
    an_endpoint(session, deliveries=0, events=[event])  # a stranger's
    job = a_job(session, tenant=tenant, start_within_s=-1 if state == JobState.EXPIRED else 600)

    ENDS[state](session, job)

    written = session.scalars(select(WebhookDelivery).where(WebhookDelivery.job_id == job.id)).all()
    assert job.state == state
    assert {delivery.endpoint_id for delivery in written} == {endpoint.id for endpoint in wants}
    for delivery in written:
        assert (delivery.event, delivery.tenant_id) == (event, tenant.id)
        assert (delivery.state, delivery.attempts) == (DeliveryState.PENDING, 0)
        assert delivery.due_at is not None
    session.rollback()


def test_deliveries_that_ended_a_month_ago_are_deleted_with_their_attempts(session):
    endpoint = an_endpoint(session, deliveries=3)
    claims, _ = claim_all(session, of(session, endpoint)[:2])
    for claim in claims:
        webhooks.record(session, claim, HEARD, actor="tests")
    session.commit()
    old, young, pending = (session.get(WebhookDelivery, id) for id in of(session, endpoint))
    age = timedelta(seconds=KEPT_FOR_S + 60)
    old.created_at, pending.created_at = old.created_at - age, pending.created_at - age
    young.created_at -= timedelta(seconds=KEPT_FOR_S - 60)
    session.commit()

    assert webhooks.forget_old(session, limit=100) == 1
    session.commit()

    assert of(session, endpoint) == [young.id, pending.id]
    query = "SELECT delivery_id FROM webhook_attempts WHERE delivery_id = ANY(:ids)"
    ids = {"ids": [old.id, young.id, pending.id]}
    assert session.scalars(text(query), ids).all() == [young.id]


def test_a_retry_is_due_when_it_was_said_and_a_last_attempt_ends_the_delivery(session):
    endpoint = an_endpoint(session, deliveries=2)
    claims, _ = claim_all(session, of(session, endpoint))
    later, last = (
        AttemptResult(500, None, took_s=0.1, try_again_s=wait_s) for wait_s in (60.0, None)
    )

    states = [
        webhooks.record(session, claims[0], later, actor="tests"),
        webhooks.record(session, claims[1], last, actor="tests"),
    ]
    session.commit()

    session.expire_all()
    waits, over = (session.get(WebhookDelivery, claim.id) for claim in claims)
    due_in_s = (waits.due_at - session.scalar(text("SELECT clock_timestamp()"))).total_seconds()
    assert states == [DeliveryState.PENDING, DeliveryState.FAILED]
    assert due_in_s == pytest.approx(60, abs=5)
    assert (waits.claimed_until, waits.ended_at) == (None, None)
    assert (over.due_at, over.claimed_until, over.ended_at is None) == (None, None, False)


def test_an_attempt_that_another_has_followed_records_nothing(session, database):
    """Its claim ran out, so somebody else tries: only the newest attempt says what comes of it."""
    endpoint = an_endpoint(session)
    [delivery_id] = of(session, endpoint)
    [late], _ = claim_all(session, [delivery_id])
    delivery = session.get(WebhookDelivery, delivery_id)
    delivery.claimed_until -= timedelta(seconds=CLAIM_S + 1)
    session.commit()
    [newest], _ = claim_all(session, [delivery_id])

    def record(claim) -> tuple[str | None, str, list[int]]:
        """What is said of it; then the delivery's state, and the attempts on record."""
        with transaction(database.app) as own:
            outcome = webhooks.record(own, claim, HEARD, actor="tests")
        session.refresh(delivery)
        tried = text("SELECT attempt FROM webhook_attempts WHERE delivery_id = :id")
        return outcome, delivery.state, list(session.scalars(tried, {"id": delivery_id}))

    assert (late.attempt, newest.attempt) == (1, 2)
    assert record(late) == (None, DeliveryState.PENDING, [])
    assert delivery.claimed_until is not None
    assert record(newest) == (DeliveryState.DELIVERED, DeliveryState.DELIVERED, [2])
    assert record(newest) == (None, DeliveryState.DELIVERED, [2])


@pytest.mark.parametrize("status", [204, 500, 410])
def test_a_delivery_that_is_asked_for_again_waits_as_one_that_never_ended(session, status):
    """However old it is: what waits is never deleted."""
    endpoint = an_endpoint(session)
    [claim], _ = claim_all(session, of(session, endpoint))
    outcome = AttemptResult(status=status, error=None, took_s=0.1, try_again_s=None)
    webhooks.record(session, claim, outcome, actor="tests")
    delivery = session.get(WebhookDelivery, claim.id)
    delivery.created_at -= timedelta(seconds=KEPT_FOR_S + 60)
    session.commit()

    again = webhooks.redeliver(session, claim.id, tenant_id=endpoint.tenant_id, actor="tests")
    session.commit()

    now = session.scalar(text("SELECT clock_timestamp()"))
    assert (again.id, again.state, again.ended_at) == (claim.id, DeliveryState.PENDING, None)
    assert again.due_at <= now
    assert webhooks.forget_old(session, limit=100) == 0


def test_nobody_asks_again_for_a_delivery_of_a_stranger_s_or_to_an_endpoint_that_is_gone(session):
    now = session.scalar(text("SELECT clock_timestamp()"))
    live, deleted = an_endpoint(session), an_endpoint(session, deleted_at=now)

    for endpoint, asking in ((live, deleted.tenant_id), (deleted, deleted.tenant_id)):
        [delivery_id] = of(session, endpoint)
        named = {"tenant_id": asking, "actor": "tests"}
        assert webhooks.redeliver(session, delivery_id, **named) is None
    unknown = {"tenant_id": live.tenant_id, "actor": "tests"}
    assert webhooks.redeliver(session, uuid.uuid4(), **unknown) is None


def test_the_secret_before_the_newest_signs_too_for_as_long_as_was_said_and_no_older_one(session):
    endpoint = an_endpoint(session, deliveries=3)
    waiting = iter(of(session, endpoint))

    def signs_after(secret, grace_s) -> tuple[str, ...]:
        webhooks.rotate(session, endpoint, secret=secret, grace_s=grace_s, actor="tests")
        session.commit()
        claim = webhooks.claim(session, next(waiting))
        session.commit()
        return claim.secrets

    assert signs_after("second", 60.0) == ("second", "whsec_AAAA")
    assert signs_after("third", 60.0) == ("third", "second")
    assert signs_after("fourth", 0.0) == ("fourth",)
