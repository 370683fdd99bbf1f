"""Define documents of webhook endpoints and of their deliveries."""

from typing import Annotated, Literal
from uuid import UUID

from app.schemas.base import Instant, Link, Page, document, one_of, says
from policy.states import DeliveryState
from policy.webhooks import EVENTS, TEST_EVENT


@document("Links of an endpoint.")
class WebhookUrls:
    self: Annotated[Link, says("GET shows it, PATCH changes it, DELETE deletes it.")]
    deliveries: Annotated[Link, says("GET lists the deliveries to it.")]


@document("An endpoint that receives the events of your jobs.")
class Webhook:
    id: UUID
    object: Literal["webhook"] = "webhook"
    url: Annotated[str, says("The URL to which events are sent.")]
    events: Annotated[list[Annotated[str, one_of(EVENTS)]], says("The events that it receives.")]
    description: Annotated[str, says("Your own description of it.")]
    created_at: Annotated[Instant, says("When it was added.")]
    disabled_at: Annotated[
        Instant | None, says("Since when nothing is sent to it; null while it is enabled.")
    ]
    disabled_reason: Annotated[str | None, says("Why it is disabled.")]
    urls: WebhookUrls


@document("An endpoint with its secret, which is shown only in this answer.")
class NewWebhook(Webhook):
    secret: Annotated[str, says("The secret that signs messages (Standard Webhooks).")]


@document("An endpoint with its new secret, which is shown only in this answer.")
class RotatedWebhook(NewWebhook):
    former_secret_signs_for_s: Annotated[
        int, says("For so many seconds the old secret signs, too.")
    ]


@document("Endpoints, oldest first.")
class WebhookPage(Page):
    data: Annotated[list[Webhook], says("The endpoints.")]


@document("One attempt to deliver a message.")
class DeliveryAttempt:
    attempt: Annotated[int, says("The number of the attempt, from 1.")]
    at: Annotated[Instant, says("When it was made.")]
    status: Annotated[
        int | None, says("The status that the receiver answered with; null without an answer.")
    ]
    error: Annotated[str | None, says("Why there was no answer; null if there was one.")]
    took_s: Annotated[float, says("How long it took, in seconds.")]


@document("A message to an endpoint, and the attempts to deliver it.")
class Delivery:
    id: Annotated[UUID, says("The `webhook-id` of the message, the same at every attempt.")]
    object: Literal["webhook.delivery"] = "webhook.delivery"
    event: Annotated[
        Annotated[str, one_of((*EVENTS, TEST_EVENT))], says("The event in the message.")
    ]
    job_id: Annotated[UUID | None, says("The job of the event; null if it is of none.")]
    state: Annotated[Annotated[str, one_of(DeliveryState)], says("The state of the delivery.")]
    created_at: Annotated[Instant, says("When the delivery was created.")]
    due_at: Annotated[Instant | None, says("When the next attempt is due; null if there is none.")]
    ended_at: Annotated[Instant | None, says("When it was delivered or given up.")]
    attempts: Annotated[list[DeliveryAttempt], says("The attempts so far.")]


@document("Deliveries, newest first.")
class DeliveryPage(Page):
    data: Annotated[list[Delivery], says("The deliveries of this page.")]
