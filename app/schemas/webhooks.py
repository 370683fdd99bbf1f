"""Define documents of webhook endpoints and of their deliveries."""

from typing import Annotated, Literal
from uuid import UUID

from app.schemas.base import Instant, Link, Page, document, one_of, says
from policy.states import DeliveryState
from policy.webhooks import EVENTS, TEST_EVENT


@document("Links of an endpoint.")
class WebhookUrls:
    self: Annotated[Link, says("GET shows it, PATCH changes it, DELETE deletes it.")]
    deliveries: Annotated[Link, says("GET lists what was sent there.")]


@document("An endpoint that hears of the tenant's jobs.")
class Webhook:
    id: UUID
    object: Literal["webhook"] = "webhook"
    url: Annotated[str, says("Where events are sent.")]
    events: Annotated[list[Annotated[str, one_of(EVENTS)]], says("What it hears of.")]
    description: Annotated[str, says("The tenant's own words.")]
    created_at: Annotated[Instant, says("When it was added.")]
    disabled_at: Annotated[Instant | None, says("Since when nothing is sent there.")]
    disabled_reason: Annotated[str | None, says("Why nothing is.")]
    urls: WebhookUrls


@document("An endpoint with its secret, which is shown this once.")
class NewWebhook(Webhook):
    secret: Annotated[str, says("What messages are signed with (Standard Webhooks).")]


@document("An endpoint with its new secret, which is shown this once.")
class RotatedWebhook(NewWebhook):
    former_secret_signs_for_s: Annotated[int, says("So long the one before it signs, too.")]


@document("Endpoints, oldest first.")
class WebhookPage(Page):
    data: Annotated[list[Webhook], says("The endpoints.")]


@document("One try to deliver.")
class DeliveryAttempt:
    attempt: Annotated[int, says("The first is 1.")]
    at: Annotated[Instant, says("When it was made.")]
    status: Annotated[int | None, says("What the receiver answered; null if it did not.")]
    error: Annotated[str | None, says("Why it was not heard.")]
    took_s: Annotated[float, says("How long it took.")]


@document("An event on its way to an endpoint.")
class Delivery:
    id: Annotated[UUID, says("The `webhook-id` of the message, the same at every attempt.")]
    object: Literal["webhook.delivery"] = "webhook.delivery"
    event: Annotated[Annotated[str, one_of((*EVENTS, TEST_EVENT))], says("What it tells.")]
    job_id: Annotated[UUID | None, says("The job that it is about; null for a test.")]
    state: Annotated[Annotated[str, one_of(DeliveryState)], says("How it stands.")]
    created_at: Annotated[Instant, says("When it was written.")]
    due_at: Annotated[Instant | None, says("When it is tried next; null once it is over.")]
    ended_at: Annotated[Instant | None, says("When it was over.")]
    attempts: Annotated[list[DeliveryAttempt], says("What was tried.")]


@document("Deliveries, newest first.")
class DeliveryPage(Page):
    data: Annotated[list[Delivery], says("The deliveries of this page.")]
