"""From the bytes of a request to a Wish, or a problem that points at every field that is wrong."""

import json
import math
from typing import Any

from flask import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from app.problems import BodyTooLarge, InvalidImageRequest, InvalidQuery, MalformedBody, UnsupportedMediaType
from policy.catalog import InvalidWish, Wish


class _ImageBody(BaseModel):
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


def read_wish(request: Request) -> Wish:
    """Parse the body. Raises UnsupportedMediaType, MalformedBody, BodyTooLarge, InvalidImageRequest."""
    try:
        return Wish(**_ImageBody.model_validate(_read_object(request)).model_dump())
    except ValidationError as error:
        raise InvalidImageRequest("The request has fields that cannot be used.", errors=[_field_error(e) for e in error.errors()]) from None


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


def _read_object(request: Request) -> dict[str, Any]:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("Send the request as `Content-Type: application/json`.", accepted=["application/json"])
    content = request.get_data()
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


def _field_error(error: Any) -> dict[str, Any]:
    pointer = "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1")[:64] for part in error["loc"])
    entry = {"pointer": pointer, "detail": error["msg"]}
    if error["type"] == "extra_forbidden":
        entry |= {"detail": "There is no such field", "accepted": list(_ImageBody.model_fields)}
    elif error["type"] == "missing":
        entry["detail"] = "This field is required"
    return entry
