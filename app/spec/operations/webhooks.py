"""Describe the operations of webhooks, and the messages that endpoints receive."""

from app.http.webhooks import EndpointBody, EndpointChange
from app.schemas.events import BudgetMessage, JobMessage, TestMessage
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
from policy.webhooks import BUDGET_EVENT, ENDED_EVENTS, MAX_ENDPOINTS, TEST_EVENT

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/webhooks"): Operation(
        summary="Add a webhook",
        description="Adds an endpoint that receives the events of your jobs. You can have at most"
        f" {MAX_ENDPOINTS} endpoints. `secret`, which signs the messages, is shown only in this"
        " answer.",
        status=201,
        answers=(NewWebhook,),
        body={JSON: EndpointBody},
        examples={JSON: {"url": "https://example.com/hook", "events": ["job.succeeded"]}},
    ),
    ("GET", "/v1/webhooks"): Operation(
        summary="List webhooks",
        description="All of your endpoints, oldest first, on one page.",
        answers=(WebhookPage,),
    ),
    ("GET", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Show a webhook",
        description="An endpoint, without its secret.",
        answers=(Webhook,),
    ),
    ("PATCH", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Change a webhook",
        description="Changes the members that the body names. `enabled: true` also enables an"
        " endpoint that was disabled because it answered 410.",
        answers=(Webhook,),
        body={JSON: EndpointChange},
        examples={JSON: {"enabled": False}},
    ),
    ("DELETE", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Delete a webhook",
        description="Deletes the endpoint. It receives nothing more, not even deliveries that are"
        " due.",
        status=204,
    ),
    ("POST", "/v1/webhooks/{endpoint_id}/rotate"): Operation(
        summary="Rotate a webhook's secret",
        description="Creates a new secret, which is shown only in this answer. For a while the old"
        " secret signs the messages as well, so that the receiver can change over.",
        answers=(RotatedWebhook,),
    ),
    ("POST", "/v1/webhooks/{endpoint_id}/test"): Operation(
        summary="Send a test to a webhook",
        description=f"Sends a message of the type `{TEST_EVENT}` to the endpoint.",
        status=202,
        answers=(Delivery,),
    ),
    ("GET", "/v1/webhooks/{endpoint_id}/deliveries"): Operation(
        summary="List a webhook's deliveries",
        description="The messages to the endpoint, newest first, each with its attempts.",
        answers=(DeliveryPage,),
        parameters=(
            *PAGE,
            query(
                "state",
                "Only deliveries in this state.",
                type="string",
                enum=[state.value for state in DeliveryState],
            ),
        ),
    ),
    ("POST", "/v1/webhooks/deliveries/{delivery_id}/redeliver"): Operation(
        summary="Send a delivery again",
        description="Sends the message again, with the same `webhook-id`.",
        status=202,
        answers=(Delivery,),
    ),
}

MESSAGES = {
    **dict.fromkeys(ENDED_EVENTS, (JobMessage, "Sent when a job has ended in this state.")),
    BUDGET_EVENT: (BudgetMessage, "Sent when a part of the monthly budget is spent."),
    TEST_EVENT: (TestMessage, "Sent on request, to test the endpoint."),
}
