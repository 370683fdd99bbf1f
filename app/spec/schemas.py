"""What the gateway answers with, as JSON Schema. Objects list every member they always have; clients ignore what they do not know."""

from typing import Any

from pydantic import TypeAdapter

from models.states import DeliveryState, ImageState, JobState
from policy.params import OUTPUT_FORMATS, SHOWN
from policy.webhooks import EVENTS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ID: Schema = {"type": "string", "format": "uuid"}
INSTANT: Schema = {"type": "string", "format": "date-time"}
DAY: Schema = {"type": "string", "format": "date"}
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
PATH: Schema = {"type": "string", "pattern": "^(/[^/]+)*/v1/"}  # behind the prefix of a proxy
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANYTHING: Schema = {}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def maybe(schema: Schema) -> Schema:
    """The same or null."""
    if "$ref" in schema or "enum" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]}


def many(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def has(optional: dict[str, Schema] | None = None, **members: Schema) -> Schema:
    """An object that always has `members`, and may have the `optional` ones and others."""
    return {"type": "object", "required": list(members), "properties": members | (optional or {})}


def page_of(name: str) -> Schema:
    return has(object=one_of("list"), data=many(ref(name)), has_more=FLAG, next_cursor=maybe(TEXT))


# What a parameter is in JSON where its type does not say it all.
_NARROWER: dict[str, Schema] = {
    "prompt": maybe(TEXT),  # null once the job was erased
    "negative_prompt": maybe(TEXT),
    "output_format": one_of(*OUTPUT_FORMATS),
    "adapters": many(has(name=TEXT, strength=NUMBER)),
    "determinism": one_of("best_effort", "reproducible"),
}


def of_type(kind: Any) -> Schema:
    """A type of Python as JSON has it."""
    return TypeAdapter(kind).json_schema()


_PARAMETERS: dict[str, Schema] = {
    "size": {"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
    **{
        param.member: (_NARROWER.get(param.member) or of_type(param.kind)) | {"description": param.says}
        for param in SHOWN
        if param.member not in (None, "seed")  # an estimate has none where one will be drawn
    },
}
_STATE = one_of(*JobState)
_FAILURE = maybe(has(code=TEXT, detail=maybe(TEXT)))
_WARNINGS = many(has({"tokens_given": WHOLE, "tokens_read": WHOLE}, code=TEXT, field=TEXT, detail=TEXT))
_PROGRESS = maybe(has(step=WHOLE, num_steps=WHOLE, images_done=WHOLE))
_HEAD = {"id": ID, "object": one_of("job"), "state": _STATE}
_LIMIT_NAMES = ("requests_per_minute", "megapixel_steps_per_minute", "burst_megapixel_steps", "max_concurrent_jobs")
_QUOTA_NAMES = ("daily_megapixel_steps", "monthly_megapixel_steps")
_USAGE = {"object": one_of("usage"), "from": DAY, "to": DAY, "currency": TEXT}
_TOKENS_BY_KIND = has(text_tokens=WHOLE, image_tokens=WHOLE)
_NO_TOKENS = has(input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE, input_tokens_details=_TOKENS_BY_KIND)

SCHEMAS: dict[str, Schema] = {
    "Problem": has(
        {"errors": many(has(pointer=TEXT, detail=TEXT))},
        type=TEXT,
        title=TEXT,
        status=WHOLE,
        detail=TEXT,
        instance=TEXT,
        error=has(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT)),
    ),
    "Place": has(jobs_ahead=maybe(WHOLE), eta_p50_s=NUMBER, eta_p90_s=NUMBER),
    "Image": has(
        index=WHOLE,
        seed=WHOLE,
        state=one_of(*ImageState),
        url=maybe(PATH),
        pixels_sha256=maybe(SHA256),
        content_sha256=maybe(SHA256),
        content_type=maybe(TEXT),
        size_bytes=maybe(WHOLE),
        width_px=maybe(WHOLE),
        height_px=maybe(WHOLE),
    ),
    "Job": has(
        **_HEAD,
        **_PARAMETERS,
        seed=WHOLE,
        metadata=TEXTS,
        replay_of=maybe(ID),
        megapixel_steps=NUMBER,
        attempt=WHOLE,
        failure=_FAILURE,
        warnings=_WARNINGS,
        created_at=INSTANT,
        start_by=INSTANT,
        started_at=maybe(INSTANT),
        rendered_at=maybe(INSTANT),
        finished_at=maybe(INSTANT),
        run_by=maybe(INSTANT),
        erased_at=maybe(INSTANT),
        progress=_PROGRESS,
        queue=maybe(ref("Place")),
        timing=has(queue_s=maybe(NUMBER), render_s=maybe(NUMBER), store_s=maybe(NUMBER), total_s=maybe(NUMBER)),
        cost=maybe(has(gpu_seconds=NUMBER, amount=TEXT, currency=TEXT)),
        images=many(ref("Image")),
        urls={"type": "object", "additionalProperties": PATH},
    ),
    "JobStatus": has(
        id=ID,
        object=one_of("job.status"),
        state=_STATE,
        attempt=WHOLE,
        progress=_PROGRESS,
        queue=maybe(ref("Place")),
        images_done=WHOLE,
        n=WHOLE,
        failure=_FAILURE,
        warnings=_WARNINGS,
        erased_at=maybe(INSTANT),
    ),
    "Batch": has(
        object=one_of("batch"),
        accepted=WHOLE,
        refused=WHOLE,
        data=many(has({"job": has(**_HEAD), "problem": {"type": "object"}}, status=WHOLE)),
    ),
    "Estimate": has(**_PARAMETERS, warnings=_WARNINGS, megapixel_steps=NUMBER, can_be_served=FLAG),
    "File": has(
        id=ID,
        object=one_of("file"),
        width_px=WHOLE,
        height_px=WHOLE,
        mode=one_of("L", "RGB", "RGBA"),
        size_bytes=WHOLE,
        content_type=one_of("image/png"),
        content_sha256=SHA256,
        created_at=INSTANT,
        url=PATH,
    ),
    "Webhook": has(
        {"secret": TEXT, "former_secret_signs_for_s": WHOLE},
        id=ID,
        object=one_of("webhook"),
        url=TEXT,
        events=many(one_of(*EVENTS)),
        description=TEXT,
        created_at=INSTANT,
        disabled_at=maybe(INSTANT),
        disabled_reason=maybe(TEXT),
    ),
    "Delivery": has(
        id=ID,
        object=one_of("webhook.delivery"),
        event=TEXT,
        job_id=maybe(ID),
        state=one_of(*DeliveryState),
        created_at=INSTANT,
        due_at=maybe(INSTANT),
        ended_at=maybe(INSTANT),
        attempts=many(has(attempt=WHOLE, at=INSTANT, status=maybe(WHOLE), error=maybe(TEXT), took_s=NUMBER)),
    ),
    "Images": has(
        created=WHOLE,
        data=many(has({"b64_json": TEXT, "url": TEXT}, seed=WHOLE, pixels_sha256=SHA256)),
        background=one_of("opaque"),
        output_format=one_of("png", "webp", "jpeg"),
        size=TEXT,
        usage=_NO_TOKENS,
        job_id=ID,
        seed=WHOLE,
        model=TEXT,
        model_alias=maybe(TEXT),
        model_version=TEXT,
        tier=TEXT,
        steps=WHOLE,
        warnings=_WARNINGS,
    ),
    "Limits": has(
        **{name: maybe(NUMBER) for name in (*_LIMIT_NAMES, *_QUOTA_NAMES)},
        allowed_tiers=maybe(many(TEXT)),
        allowed_models=maybe(many(TEXT)),
        max_stored_bytes=maybe(WHOLE),
        url_inputs=FLAG,
    ),
    "OwnKey": has(id=ID, object=one_of("key"), tenant_id=ID, actor=TEXT, scopes=many(TEXT), limits=ref("Limits")),
    "UsageDay": has(
        day=DAY,
        jobs_accepted=WHOLE,
        jobs_succeeded=WHOLE,
        reserved_megapixel_steps=NUMBER,
        settled_megapixel_steps=NUMBER,
        abandoned_megapixel_steps=NUMBER,
        cost=TEXT,
    ),
    "Usage": has(
        {"limits": ref("Limits"), "used_megapixel_steps": {"type": "object"}, "stored_files": has(count=WHOLE, size_bytes=WHOLE)},
        **_USAGE,
        data=many(ref("UsageDay")),
    ),
    "Tenant": has(id=ID, object=one_of("tenant"), name=TEXT, weight=NUMBER, created_at=INSTANT, limits=ref("Limits")),
    "Key": has(
        {"key": TEXT, "former_key_id": ID, "former_key_lives_for_s": NUMBER},
        id=ID,
        object=one_of("key"),
        kid=TEXT,
        name=TEXT,
        scopes=many(TEXT),
        created_at=maybe(INSTANT),
        expires_at=maybe(INSTANT),
        revoked_at=maybe(INSTANT),
        last_used_at=maybe(INSTANT),
    ),
    "Model": has(
        {"alias_of": TEXT},
        id=TEXT,
        object=one_of("model"),
        created=WHOLE,
        owned_by=TEXT,
        aliases=many(TEXT),
        sizes=many(TEXT),
        samplers=many(TEXT),
        versions=many(ANYTHING),
    ),
    "Tier": has(id=TEXT, object=one_of("tier"), rank=WHOLE, max_steps=WHOLE, default_steps=WHOLE, max_images=WHOLE),
    "Models": has(object=one_of("list"), data=many(ref("Model"))),
    "Tiers": has(object=one_of("list"), data=many(ref("Tier"))),
    **{f"{name}Page": page_of(name) for name in ("Job", "File", "Webhook", "Delivery", "Tenant", "Key")},
}
