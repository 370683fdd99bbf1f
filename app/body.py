"""From the bytes of a request to a Wish, or a problem that points at every field that is wrong."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar
from uuid import UUID

from flask import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from app.problems import BodyTooLarge, InvalidImageRequest, InvalidQuery, InvalidRequest, MalformedBody, Problem, UnsupportedMediaType
from policy.catalog import AdapterWish, InvalidWish, Wish

Body = TypeVar("Body", bound=BaseModel)
PICTURE_FIELDS = ("init_image", "mask", "control_image")
MAX_METADATA_KEYS = 16


class AdapterBody(BaseModel):
    """One adapter of the model, and how much of it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str
    strength: float = 1.0


class JobBody(BaseModel):
    """The body of POST /v1/jobs. Ranges depend on model and tier and are checked by `policy.catalog`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    tier: str | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int | None = None
    n: int = 1
    output_format: str = "png"
    init_image: str | None = None
    mask: str | None = None
    control_image: str | None = None
    strength: float | None = None
    adapters: list[AdapterBody] = []
    metadata: dict[str, str] = {}
    start_deadline_s: float | None = None

    @property
    def pictures(self) -> dict[str, str | None]:
        """What the fields say that stand for pictures."""
        return {field: getattr(self, field) for field in PICTURE_FIELDS}


def read_job(request: Request) -> JobBody:
    """Parse the body. Raises UnsupportedMediaType, MalformedBody, BodyTooLarge, InvalidImageRequest."""
    return parse_job(read_object(request))


def parse_job(fields: Mapping[str, Any]) -> JobBody:
    """Check names and types of the fields. Raises InvalidImageRequest."""
    body = parse(JobBody, fields, problem=InvalidImageRequest)
    check_metadata(body.metadata)
    return body


def parse(kind: type[Body], fields: Mapping[str, Any], *, problem: type[Problem] = InvalidRequest) -> Body:
    """The fields as a `kind`. Raises `problem`, which points at every one that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        errors = [_field_error(e, kind) for e in error.errors()]
        raise problem("The request has fields that cannot be used.", errors=errors) from None


def wish_of(body: JobBody, pictures: Mapping[str, UUID]) -> Wish:
    """The wish; `pictures`: the files that its fields stand for."""
    fields = body.model_dump(exclude={"adapters", "metadata", "start_deadline_s", *PICTURE_FIELDS})
    adapters = tuple(AdapterWish(adapter.name, adapter.strength) for adapter in body.adapters)
    return Wish(**fields, **pictures, adapters=adapters)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises InvalidImageRequest for more than can be kept, or what cannot be printed."""
    accepted = {"max_keys": MAX_METADATA_KEYS, "max_key_chars": 64, "max_value_chars": 512}
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64 or len(value) > 512 or "\x00" in key + value or not (key + value).isprintable():
            raise invalid_wish(InvalidWish("metadata", f"has an entry that is too long or not printable: {key[:64]!r}", accepted))
    if len(metadata) > MAX_METADATA_KEYS:
        raise invalid_wish(InvalidWish("metadata", f"has {len(metadata)} keys; at most {MAX_METADATA_KEYS} are accepted", accepted))


def invalid_wish(error: InvalidWish) -> InvalidImageRequest:
    """The problem for a field that is of the right type and out of range."""
    entry = {"pointer": f"/{error.field}", "detail": error.detail}
    if error.accepted is not None:
        entry["accepted"] = error.accepted
    return InvalidImageRequest(f"{error.field} {error.detail}", errors=[entry])


def read_wait_s(request: Request, max_wait_s: int) -> int:
    """N of `Prefer: wait=N`, capped; 0 if it was not asked for. Raises InvalidQuery."""
    for preference in request.headers.get("Prefer", "").split(","):
        name, _, value = preference.strip().partition("=")
        if name.strip().lower() == "wait":
            value = value.strip().strip('"')
            if not (value.isascii() and value.isdigit() and len(value) <= 6):
                raise InvalidQuery(
                    f"Prefer: wait takes whole seconds, at most {max_wait_s}.", header="Prefer", accepted={"max": max_wait_s}
                )
            return min(int(value), max_wait_s)
    return 0


def read_nothing(request: Request) -> None:
    """Refuse fields where there are none: no body at all, or an empty object. Raises as `read_job` does."""
    fields = read_object(request) if request.get_data() else {}
    errors = [{"pointer": f"/{name[:64]}", "detail": "There is no such field", "accepted": []} for name in fields]
    if errors:
        raise InvalidImageRequest("This request takes no fields.", errors=errors)


def read_object(request: Request) -> dict[str, Any]:
    """The JSON object that the body is. Raises UnsupportedMediaType, MalformedBody, BodyTooLarge."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("Send the request as `Content-Type: application/json`.", accepted=["application/json"])
    content = request.get_data(cache=False)  # not kept for as long as the client waits: it may hold pictures
    if request.content_length is None and len(content) >= (request.max_content_length or math.inf):
        raise BodyTooLarge(f"The body is larger than {request.max_content_length} bytes.")  # werkzeug cuts a chunked one off silently
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedBody("The body is nested too deeply.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise MalformedBody("The body must be a JSON object.")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _field_error(error: Any, kind: type[BaseModel]) -> dict[str, Any]:
    pointer = "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1")[:64] for part in error["loc"])
    entry = {"pointer": pointer, "detail": error["msg"]}
    if error["type"] == "extra_forbidden":
        entry |= {"detail": "There is no such field", "accepted": list(kind.model_fields)}
    elif error["type"] == "missing":
        entry["detail"] = "This field is required"
    return entry
