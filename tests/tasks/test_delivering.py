"""One attempt at a webhook delivery: what comes of it, and when nothing more is tried."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import text

import tasks.deliver
from models import jobs
from models.database import transaction
from models.tables import WebhookDelivery, WebhookEndpoint, WebhookSecret
from policy.instants import rfc3339
from policy.webhooks import GIVE_UP_AFTER_S, TEST_EVENT
from settings import WebhookSettings
from tasks.deliver import WebhookSender, message
from tasks.roles.webhooks import build
from tests.builders import a_job, a_tenant, settings_for
from tests.receivers import Receiver, a_receiver


@dataclass(frozen=True)
class Delivering:
    """Whoever delivers, one endpoint, and who answers there."""

    sender: WebhookSender
    receiver: Receiver
    endpoint_id: uuid.UUID

    def write(self, *, age_s: float = 0.0) -> uuid.UUID:
        """A delivery that was written that long ago and is due."""
        with transaction(self.sender.database) as session:
            endpoint = session.get(WebhookEndpoint, self.endpoint_id)
            delivery = WebhookDelivery(
                endpoint_id=endpoint.id,
                tenant_id=endpoint.tenant_id,
                event=TEST_EVENT,
            )
            session.add(delivery)
            session.flush()
            session.execute(
                text(
                    "UPDATE webhook_deliveries "
                    "SET created_at = created_at - make_interval(secs => :s) WHERE id = :id",
                ),
                {"s": age_s, "id": delivery.id},
            )
            return delivery.id

    def row(self, delivery_id: uuid.UUID) -> WebhookDelivery:
        with transaction(self.sender.database) as session:
            found = session.get(WebhookDelivery, delivery_id)
            session.expunge(found)
            return found

    def tried(self, delivery_id: uuid.UUID) -> WebhookDelivery:
        self.sender.deliver_webhook(delivery_id=str(delivery_id))
        return self.row(delivery_id)


@pytest.fixture
def delivering(stack, urls_here, fleet_here, database_here):
    allowed = {"outbound_allowed_networks": "127.0.0.1/32"}
    settings = settings_for(WebhookSettings, stack.env, **allowed, **urls_here)
    sender = build(settings, fleet_here, name="webhooks@here")
    with a_receiver() as receiver:
        with transaction(database_here) as session:
            endpoint = WebhookEndpoint(tenant_id=a_tenant(session).id, url=receiver.url, events=[])
            session.add(endpoint)
            session.flush()
            session.add(
                WebhookSecret(
                    endpoint_id=endpoint.id,
                    secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
                ),
            )
            endpoint_id = endpoint.id
        yield Delivering(sender, receiver, endpoint_id)


def attempts_of(delivering, delivery_id) -> list:
    with transaction(delivering.sender.database) as session:
        query = text(
            "SELECT status, error FROM webhook_attempts WHERE delivery_id = :id ORDER BY attempt",
        )
        return [tuple(row) for row in session.execute(query, {"id": delivery_id})]


def test_delivery_that_fails_is_due_again_later(delivering):
    delivering.receiver.status = 500

    row = delivering.tried(delivery_id := delivering.write())

    assert (row.state, row.claimed_until, row.ended_at) == ("pending", None, None)
    assert row.due_at > row.created_at
    assert attempts_of(delivering, delivery_id) == [(500, None)]


def test_delivery_that_fails_three_days_after_it_was_written_is_given_up(delivering):
    delivering.receiver.status = 500

    row = delivering.tried(delivering.write(age_s=GIVE_UP_AFTER_S))

    assert (row.state, row.due_at) == ("failed", None)
    assert row.ended_at is not None


def test_delivery_whose_next_attempt_would_come_within_three_days_is_not_given_up(delivering):
    delivering.receiver.status = 500

    row = delivering.tried(delivering.write(age_s=GIVE_UP_AFTER_S - 60))

    assert row.state == "pending"


def test_delivery_that_is_heard_after_three_days_is_delivered(delivering):
    row = delivering.tried(delivering.write(age_s=GIVE_UP_AFTER_S + 60))

    assert (row.state, row.due_at) == ("delivered", None)


@pytest.mark.parametrize(
    ("status", "state", "error"),
    [
        (204, "delivered", None),
        (302, "pending", "redirects are not followed"),
        (404, "pending", None),
        (410, "gone", None),
    ],
)
def test_delivery_ends_by_what_its_receiver_answers(delivering, status, state, error):
    delivering.receiver.status = status
    delivering.receiver.location = f"{delivering.receiver.url}/elsewhere" if status == 302 else ""

    row = delivering.tried(delivery_id := delivering.write())

    assert row.state == state
    assert attempts_of(delivering, delivery_id) == [(status, error)]
    assert len(delivering.receiver.heard) == 1


def test_delivery_that_was_heard_is_followed_by_what_else_is_due_there(delivering):
    first, second, third = (delivering.write() for _ in range(3))

    delivering.sender.deliver_webhook(delivery_id=str(second))

    assert [delivering.row(one).state for one in (first, second, third)] == ["delivered"] * 3


def test_delivery_that_failed_is_followed_by_no_other(delivering):
    delivering.receiver.status = 500
    first, second = delivering.write(), delivering.write()

    delivering.sender.deliver_webhook(delivery_id=str(first))

    assert (attempts_of(delivering, first), attempts_of(delivering, second)) == ([(500, None)], [])


def test_endpoint_is_a_slow_one_until_it_answers_quickly_again(delivering, monkeypatch):
    def is_slow() -> bool:
        with transaction(delivering.sender.database) as session:
            return session.get(WebhookEndpoint, delivering.endpoint_id).is_slow

    assert not is_slow()
    with monkeypatch.context() as patched:
        patched.setattr(tasks.deliver, "SLOW_AFTER_S", 0.1)
        delivering.receiver.hang_s = 0.2
        delivering.tried(delivering.write())
    assert is_slow()

    delivering.receiver.hang_s = 0.0
    delivering.tried(delivering.write())

    assert not is_slow()


def test_message_of_a_job_that_ended_is_the_same_at_every_attempt(database_here):
    with transaction(database_here) as session:
        job = a_job(session)
        jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")
        ended = jobs.find_without_prompts(session, job.id, tenant_id=job.tenant_id)
        session.refresh(ended)
        claim, at = SimpleNamespace(event="job.canceled"), datetime.now(UTC) + timedelta(hours=1)

        messages = [message(claim, ended, at + timedelta(hours=hours)) for hours in (0, 5)]

        assert messages[0] == messages[1]
        assert messages[0]["timestamp"] == rfc3339(ended.finished_at)
