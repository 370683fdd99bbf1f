"""What can be asked: for each route its parameters, its body, an example that runs, and what a good answer is."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from app.admin import KeyBody, RotateBody, TenantBody, TenantChange
from app.body import JobBody
from app.spec.schemas import (
    DAY,
    FLAG,
    INSTANT,
    NUMBER,
    TEXT,
    TEXTS,
    Schema,
    has,
    many,
    maybe,
    of_type,
    one_of,
)
from app.webhooks import EndpointBody, EndpointChange
from policy.params import OPENAI_REQUEST
from policy.states import DeliveryState, JobState

JSON, FORM, STREAM = "application/json", "multipart/form-data", "text/event-stream"
PROMPT = "a large red circle in the center on a blue background"
PICTURE: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route and method.

    summary: what a list of operations shows.  answer: the schema of a good answer; None: it has no JSON.  body: a model, or a schema;
    optional if `bare`.
    """

    summary: str
    status: int = 200
    answer: str | None = None
    media_type: str = JSON
    body: type[BaseModel] | Schema | None = None
    body_type: str = JSON
    json_body: Schema | None = None  # beside `body`, which is a form then
    bare: bool = False
    query: dict[str, Schema] = field(default_factory=dict)
    headers: dict[str, Schema] = field(default_factory=dict)
    example: dict[str, Any] | None = None
    others: tuple[int, ...] = ()  # further good answers, without a body
    is_picture: bool = False  # it may also answer with a picture, or a part of one


_PAGE: dict[str, Schema] = {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "cursor": TEXT}
_DAYS: dict[str, Schema] = {"from": DAY, "to": DAY}
_WAIT: dict[str, Schema] = {"Prefer": {"type": "string", "pattern": "^wait=[0-9]$"}}  # wait=N: answer at the end, or after N seconds
_ONCE: dict[str, Schema] = {"Idempotency-Key": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}}
_IF_NONE: dict[str, Schema] = {"If-None-Match": {"type": "string", "pattern": '^"[a-z0-9]{1,40}"$'}}
_DIRECT: dict[str, Schema] = {"redirect": one_of("true", "false")}
_RESUME: dict[str, Schema] = {"Last-Event-ID": {"type": "string", "pattern": "^[0-9]{1,15}-[0-9]{1,15}$"}}
_JOBS = {"state": one_of(*JobState), "created_after": INSTANT, "created_before": INSTANT}

_BATCH: Schema = {
    "type": "object",
    "required": ["jobs"],
    "additionalProperties": False,
    "properties": {
        "jobs": {"type": "array", "minItems": 1, "maxItems": 1000, "items": {"$ref": "#/components/schemas/JobBody"}},
        "defaults": {"type": "object"},
    },
}
_OPENAI: dict[str, Schema] = {
    "prompt": TEXT,
    "model": maybe(TEXT),
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 10},
    "size": maybe(TEXT),
    "quality": maybe(one_of("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
    "output_format": maybe(one_of("png", "webp", "jpeg")),
    "response_format": maybe(one_of("b64_json", "url")),
    "user": maybe(TEXT),
    "adapters": {"anyOf": [many(has({"strength": NUMBER}, name=TEXT)), {"type": "null"}]},
    "metadata": {"anyOf": [TEXTS, {"type": "null"}]},
    **{
        param.member: {"anyOf": [of_type(param.kind), {"type": "null"}]}
        for param in OPENAI_REQUEST
        if param.member not in (None, "adapters", "strength")  # that one needs a picture
    },
}
_GENERATE: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": _OPENAI | {"stream": maybe(FLAG), "partial_images": {"type": ["integer", "null"], "minimum": 0, "maximum": 3}},
}
_EDIT: Schema = {
    "type": "object",
    "required": ["image", "prompt"],
    "properties": {"image": PICTURE, "mask": PICTURE, "prompt": TEXT, "steps": TEXT, "strength": TEXT, "tier": TEXT, "seed": TEXT},
}
_DOT = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGM8ISfHwMDAxMDAwMDAAAANBAEIfXHKZgAAAABJRU5ErkJggg=="
_SOURCE: Schema = {
    "anyOf": [
        TEXT,
        {"type": "object", "required": ["image_url"], "additionalProperties": False, "properties": {"image_url": TEXT}},
        {"type": "object", "required": ["file_id"], "additionalProperties": False, "properties": {"file_id": TEXT}},
    ]
}
_STRENGTH: Schema = {"type": ["number", "null"]}
_IMAGES: Schema = {"type": "array", "minItems": 1, "maxItems": 1, "items": _SOURCE}
_ANY_SOURCE: Schema = {"anyOf": [*_SOURCE["anyOf"], {"type": "null"}]}
_EDIT_JSON: Schema = {
    "type": "object",
    "required": ["images", "prompt"],
    "properties": _OPENAI | {"images": _IMAGES, "mask": _ANY_SOURCE, "strength": _STRENGTH},
    "example": {"prompt": PROMPT, "images": [{"image_url": _DOT}], "steps": 4, "tier": "fast"},
}
_VARY_JSON: Schema = {"type": "object", "required": ["images"], "properties": _OPENAI | {"images": _IMAGES, "strength": _STRENGTH}}
_VARY: Schema = {"type": "object", "required": ["image"], "properties": {"image": PICTURE, "n": TEXT, "steps": TEXT, "tier": TEXT}}
_UPLOAD: Schema = {"type": "object", "required": ["file"], "properties": {"file": PICTURE}}
_ONE_JOB = {"prompt": PROMPT, "tier": "batch", "steps": 4, "seed": 7, "metadata": {"order": "7"}}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/jobs"): Operation(
        summary="Accept a job", status=202, answer="Job", body=JobBody, headers=_ONCE | _WAIT, example=_ONE_JOB
    ),
    ("GET", "/v1/jobs"): Operation(summary="List jobs", answer="JobPage", query=_PAGE | _JOBS),
    ("GET", "/v1/jobs/{job_id}"): Operation(summary="Show a job", answer="Job", headers=_IF_NONE | _WAIT, others=(304,)),
    ("GET", "/v1/jobs/{job_id}/status"): Operation(summary="Show how a job stands", answer="JobStatus", headers=_IF_NONE, others=(304,)),
    ("GET", "/v1/jobs/{job_id}/events"): Operation(
        summary="Follow a job live", media_type=STREAM, query={"previews": one_of("true", "false")}, headers=_RESUME
    ),
    ("POST", "/v1/jobs/{job_id}/cancel"): Operation(summary="Cancel a job", answer="Job"),
    ("POST", "/v1/jobs/{job_id}/replay"): Operation(summary="Replay a job", status=202, answer="Job", headers=_ONCE),
    ("DELETE", "/v1/jobs/{job_id}"): Operation(summary="Erase what a job was about", status=204),
    ("GET", "/v1/jobs/{job_id}/images/{index}"): Operation(
        summary="Fetch an image of a job", status=302, query=_DIRECT, others=(304,), is_picture=True
    ),
    ("POST", "/v1/jobs:batch"): Operation(
        summary="Accept a batch of jobs", answer="Batch", body=_BATCH, headers=_ONCE, example={"jobs": [_ONE_JOB, {**_ONE_JOB, "seed": 8}]}
    ),
    ("POST", "/v1/estimate"): Operation(summary="Estimate a job", answer="Estimate", body=JobBody, example=_ONE_JOB),
    ("POST", "/v1/files"): Operation(summary="Upload a picture", status=201, answer="File", body=_UPLOAD, body_type=FORM),
    ("GET", "/v1/files"): Operation(summary="List pictures", answer="FilePage", query=_PAGE),
    ("GET", "/v1/files/{file_id}"): Operation(summary="Show a picture's record", answer="File"),
    ("GET", "/v1/files/{file_id}/content"): Operation(summary="Fetch a picture", status=302, query=_DIRECT, others=(304,), is_picture=True),
    ("DELETE", "/v1/files/{file_id}"): Operation(summary="Delete a picture", status=204),
    ("POST", "/v1/webhooks"): Operation(
        summary="Add a webhook",
        status=201,
        answer="Webhook",
        body=EndpointBody,
        example={"url": "https://example.com/hook", "events": ["job.succeeded"]},
    ),
    ("GET", "/v1/webhooks"): Operation(summary="List webhooks", answer="WebhookPage"),
    ("GET", "/v1/webhooks/{endpoint_id}"): Operation(summary="Show a webhook", answer="Webhook"),
    ("PATCH", "/v1/webhooks/{endpoint_id}"): Operation(
        summary="Change a webhook", answer="Webhook", body=EndpointChange, example={"enabled": False}
    ),
    ("DELETE", "/v1/webhooks/{endpoint_id}"): Operation(summary="Delete a webhook", status=204),
    ("POST", "/v1/webhooks/{endpoint_id}/rotate"): Operation(summary="Rotate a webhook's secret", answer="Webhook"),
    ("POST", "/v1/webhooks/{endpoint_id}/test"): Operation(summary="Send a test to a webhook", status=202, answer="Delivery"),
    ("GET", "/v1/webhooks/{endpoint_id}/deliveries"): Operation(
        summary="List a webhook's deliveries", answer="DeliveryPage", query=_PAGE | {"state": one_of(*DeliveryState)}
    ),
    ("POST", "/v1/webhooks/deliveries/{delivery_id}/redeliver"): Operation(
        summary="Deliver a webhook again", status=202, answer="Delivery"
    ),
    ("POST", "/v1/images/generations"): Operation(
        summary="Generate images (OpenAI)",
        answer="Images",
        body=_GENERATE,
        example={"prompt": PROMPT, "size": "128x128", "seed": 7, "steps": 4},
    ),
    ("POST", "/v1/images/edits"): Operation(
        summary="Edit a picture (OpenAI)", answer="Images", body=_EDIT, body_type=FORM, json_body=_EDIT_JSON
    ),
    ("POST", "/v1/images/variations"): Operation(
        summary="Vary a picture (OpenAI)", answer="Images", body=_VARY, body_type=FORM, json_body=_VARY_JSON
    ),
    ("GET", "/v1/models"): Operation(summary="List models", answer="Models"),
    ("GET", "/v1/models/{name}"): Operation(summary="Show a model", answer="Model"),
    ("GET", "/v1/tiers"): Operation(summary="List tiers", answer="Tiers"),
    ("GET", "/v1/key"): Operation(summary="Show the key that asks", answer="OwnKey"),
    ("GET", "/v1/usage"): Operation(summary="Show your usage", answer="Usage", query=_DAYS),
    ("GET", "/v1/admin/tenants"): Operation(summary="List tenants", answer="TenantPage", query=_PAGE),
    ("POST", "/v1/admin/tenants"): Operation(
        summary="Create a tenant", status=201, answer="Tenant", body=TenantBody, example={"name": "acme", "weight": 1.0}
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}"): Operation(summary="Show a tenant", answer="Tenant"),
    ("PATCH", "/v1/admin/tenants/{tenant_id}"): Operation(
        summary="Change a tenant's limits", answer="Tenant", body=TenantChange, example={"requests_per_minute": 600}
    ),
    ("GET", "/v1/admin/tenants/{tenant_id}/keys"): Operation(summary="List a tenant's keys", answer="KeyPage"),
    ("POST", "/v1/admin/tenants/{tenant_id}/keys"): Operation(
        summary="Issue a key", status=201, answer="Key", body=KeyBody, example={"name": "web", "scopes": ["generate", "read"]}
    ),
    ("POST", "/v1/admin/keys/{key_id}/rotate"): Operation(
        summary="Rotate a key", status=201, answer="Key", body=RotateBody, bare=True, example={"grace_s": 3600}
    ),
    ("DELETE", "/v1/admin/keys/{key_id}"): Operation(summary="Revoke a key", status=204),
    ("GET", "/v1/admin/tenants/{tenant_id}/usage"): Operation(summary="Show a tenant's usage", answer="Usage", query=_DAYS),
}
