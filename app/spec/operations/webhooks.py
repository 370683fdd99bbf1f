"""Describe the operations of webhooks, and the messages that endpoints receive."""

from app.http.webhooks import EndpointBody, EndpointChange
from app.schemas.events import JobMessage, TestMessage
from app.schemas.webhooks import (
    Delivery,
    DeliveryPage,
    NewWebhook,
    RotatedWebhook,
    Webhook,
    WebhookPage,
)
from app.spec.operation import JSON, PAGE, Operation, query
from policy.states import DeliveryState
from policy.webhooks import EVENTS, MAX_ENDPOINTS, TEST_EVENT

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/webhooks"): Operation(
        summary="Add a webhook",
        description=f"Adds an endpoint that hears of your jobs, {MAX_ENDPOINTS} at most. The answer"
        " has the secret that messages are signed with, which is shown this once.",
        status=201,
        answers=(NewWebhook,),
        body={JSON: EndpointBody},
        examples={JSON: {"url": "https://example.com/hook", "events": ["job.succeeded"]}},
    ),
    ("GET", "/v1/webhooks"): Operation(
        summary="List webhooks",
        description="Your endpoints, oldest first, on one page.",
        answers=(WebhookPage,),
    ),
    ("GET", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Show a webhook",
        description="One endpoint, without its secret.",
        answers=(Webhook,),
    ),
    ("PATCH", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Change a webhook",
        description="Changes what the body names. An endpoint that was disabled because it answered"
        " 410 is enabled again with `enabled: true`.",
        answers=(Webhook,),
        body={JSON: EndpointChange},
        examples={JSON: {"enabled": False}},
    ),
    ("DELETE", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Delete a webhook",
        description="Sends nothing there any more, not even what waits.",
        status=204,
    ),
    ("POST", "/v1/webhooks/{endpoint_id}/rotate"): Operation(
        summary="Rotate a webhook's secret",
        description="Makes a new secret, which is shown this once. For a while the one before it"
        " signs, too, so that receivers may change over at their leisure.",
        answers=(RotatedWebhook,),
    ),
    ("POST", "/v1/webhooks/{endpoint_id}/test"): Operation(
        summary="Send a test to a webhook",
        description=f"Sends a message of the type `{TEST_EVENT}` there.",
        status=202,
        answers=(Delivery,),
    ),
    ("GET", "/v1/webhooks/{endpoint_id}/deliveries"): Operation(
        summary="List a webhook's deliveries",
        description="What was sent there, newest first, each with its attempts.",
        answers=(DeliveryPage,),
        parameters=(
            *PAGE,
            query(
                "state",
                "Deliveries in this state.",
                type="string",
                enum=[state.value for state in DeliveryState],
            ),
        ),
    ),
    ("POST", "/v1/webhooks/deliveries/{delivery_id}/redeliver"): Operation(
        summary="Deliver a webhook again",
        description="Sends the message again, under the id that it has.",
        status=202,
        answers=(Delivery,),
    ),
}

MESSAGES = {
    **dict.fromkeys(EVENTS, (JobMessage, "A job has come to this state.")),
    TEST_EVENT: (TestMessage, "A test that was asked for."),
}
