"""Parse the body of a request, or refuse it with a problem that points at every wrong field."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flask import Request
from pydantic import BaseModel, ValidationError

from app.problems import (
    BodyTooLarge,
    InvalidImageRequest,
    InvalidQuery,
    InvalidRequest,
    MalformedBody,
    Problem,
    UnsupportedMediaType,
    invalid_param,
)
from app.schemas.bodies import (
    MAX_METADATA_CHARS,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_KEYS,
    AdapterBody,
    JobBody,
)
from app.services.submit import JobRequest
from policy.params import ASKED, PICTURES, RequestedAdapter, RequestedParams
from policy.refusals import InvalidParam
from policy.text import is_human

Body = TypeVar("Body", bound=BaseModel)
MAX_MEMBERS = 64  # of an object
MAX_ENTRIES = 256  # of a list
MAX_DEPTH = 16  # of objects and lists within each other
MAX_VALUES = 100_000  # of a body; a batch of a thousand jobs with every field has fewer
MAX_ERRORS = 20  # in one problem; a body can have about as many errors as bytes
NO_LISTS: Mapping[str, int] = {}
_MISSING = "This field is required"


def read_job(request: Request) -> JobBody:
    """Parse the body of a job.

    Raises UnsupportedMediaType, MalformedBody, BodyTooLarge, InvalidImageRequest.
    """
    return parse_job(read_object(request, problem=InvalidImageRequest))


def parse_job(fields: Mapping[str, Any]) -> JobBody:
    """Check names and types of the fields. Raises InvalidImageRequest."""
    body = parse(JobBody, fields, problem=InvalidImageRequest)
    check_metadata(body.metadata)
    return body


def parse(
    kind: type[Body], fields: Mapping[str, Any], *, problem: type[Problem] = InvalidRequest
) -> Body:
    """Validate the fields as a `kind`. Raises `problem`, which points at every wrong field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        members = _error_members(field_errors(error, kind))
        raise problem("The request has wrong fields.", **members) from None


def parse_shared(fields: Mapping[str, Any]) -> None:
    """Check names and types of a batch's default fields; none is required here.

    Raises InvalidImageRequest.
    """
    try:
        JobBody.model_validate(fields)
    except ValidationError as error:
        found = field_errors(error, JobBody)
        if errors := [entry for entry in found if entry["detail"] != _MISSING]:
            within = [entry | {"pointer": f"/defaults{entry['pointer']}"} for entry in errors]
            detail = "The batch's `defaults` have wrong fields."
            raise InvalidImageRequest(detail, **_error_members(within)) from None


def job_request(body: JobBody) -> JobRequest:
    """Convert a body to what `services.submit` takes."""
    return JobRequest(
        requested=requested_params(body),
        pictures=body.pictures,
        metadata=body.metadata,
        start_within_s=body.start_deadline_s,
    )


def requested_params(body: JobBody) -> RequestedParams:
    """Convert a body to requested parameters, without the pictures."""
    said: dict[str, Any] = {name: getattr(body, name) for name in ASKED if name not in PICTURES}
    said["adapters"] = tuple(
        RequestedAdapter(each.name, each.strength) for each in said["adapters"]
    )
    return RequestedParams(**said)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Check the number and the length of metadata entries. Raises InvalidImageRequest.

    Control characters are refused, too.
    """
    accepted = {
        "max_keys": MAX_METADATA_KEYS,
        "max_key_chars": MAX_METADATA_KEY_CHARS,
        "max_value_chars": MAX_METADATA_CHARS,
    }
    for key, value in metadata.items():
        is_short = 1 <= len(key) <= MAX_METADATA_KEY_CHARS and len(value) <= MAX_METADATA_CHARS
        if not is_short or not is_human(key + value):
            detail = f"has an entry that is too long or has control characters: {key[:64]!r}"
            raise invalid_param(InvalidParam("metadata", detail, accepted))
    if len(metadata) > MAX_METADATA_KEYS:
        detail = f"has {len(metadata)} keys; at most {MAX_METADATA_KEYS} are accepted"
        raise invalid_param(InvalidParam("metadata", detail, accepted))


def read_wait_s(request: Request, max_wait_s: int) -> int:
    """Read N of `Prefer: wait=N`, at most `max_wait_s`; 0 without it. Raises InvalidQuery."""
    for preference in request.headers.get("Prefer", "").split(","):
        name, _, value = preference.strip().partition("=")
        if name.strip().lower() == "wait":
            value = value.strip().strip('"')
            if not (value.isascii() and value.isdigit() and len(value) <= 6):
                raise InvalidQuery(
                    "`wait` in the header Prefer must be a whole number of seconds, at most"
                    f" {max_wait_s}.",
                    header="Prefer",
                    accepted={"max": max_wait_s},
                )
            return min(int(value), max_wait_s)
    return 0


def read_nothing(request: Request) -> None:
    """Check that the body is absent or an empty object. Raises as `read_job` does."""
    fields = read_object(request) if request.get_data() else {}
    errors = [
        {"pointer": f"/{name[:64]}", "detail": "There is no such field", "accepted": []}
        for name in fields
    ]
    if errors:
        raise InvalidImageRequest("This request takes no fields.", **_error_members(errors))


def read_object(
    request: Request,
    *,
    problem: type[Problem] = InvalidRequest,
    lists: Mapping[str, int] = NO_LISTS,
) -> dict[str, Any]:
    """Parse the body as a JSON object of limited size.

    Size means the number of members, entries and values, and the depth: a small body can be
    expensive in any of these.

    lists: by the JSON pointer of a list, how many entries it may have instead of MAX_ENTRIES.
    Raises UnsupportedMediaType, MalformedBody, BodyTooLarge, and `problem`, which points at what is
    too large.
    """
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            "Send the request as `Content-Type: application/json`.", accepted=["application/json"]
        )
    # Not cached, so that a body with pictures is freed while the client waits.
    content = request.get_data(cache=False)
    if request.content_length is None and len(content) >= (request.max_content_length or math.inf):
        # werkzeug truncates a chunked body without an error.
        raise BodyTooLarge(f"The body is larger than {request.max_content_length} bytes.")
    try:
        body = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise MalformedBody("The body is nested too deeply.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise MalformedBody("The body must be a JSON object.")
    check_bounds(body, problem=problem, lists=lists)
    return body


def check_bounds(
    body: Mapping[str, Any] | Sequence[Any],
    *,
    problem: type[Problem],
    lists: Mapping[str, int] = NO_LISTS,
) -> None:
    """Check that a JSON value is not larger than any request needs. Raises `problem`.

    Raises MalformedBody for a value that is nested too deeply. Call it before anything else reads
    the value: validation and error messages cost time and memory for each member.
    """
    left = MAX_VALUES
    inner = [("", body, 1)]
    while inner:
        pointer, value, depth = inner.pop()
        if depth > MAX_DEPTH:
            raise MalformedBody("The body is nested too deeply.")
        is_object = isinstance(value, Mapping)
        most = MAX_MEMBERS if is_object else lists.get(pointer, MAX_ENTRIES)
        if len(value) > most:
            what = "members" if is_object else "entries"
            detail = f"has {len(value)} {what}; at most {most} are accepted"
            raise _too_much(problem, pointer, detail, most)
        left -= len(value)
        if left < 0:
            detail = f"is in a body with more than {MAX_VALUES} values"
            raise _too_much(problem, pointer, detail, MAX_VALUES)
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        inner += [
            (f"{pointer}/{_escaped(name)}", each, depth + 1)
            for name, each in named
            if isinstance(each, dict | list)
        ]


def _too_much(problem: type[Problem], pointer: str, detail: str, most: int) -> Problem:
    return problem.at(
        pointer.removeprefix("/"),
        detail,
        accepted={"max": most},
        sentence=f"{pointer or 'The body'} {detail}.",
    )


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise ValueError for a repeated member, which has no clear meaning."""
    found = dict(members)
    if len(found) < len(members):
        counts = Counter(name for name, _ in members)
        name = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"an object has the member {name[:64]!r} more than once")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def field_errors(error: ValidationError, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """Describe each wrong field, as the `errors` of a problem."""
    entries = error.errors(include_url=False, include_context=False, include_input=False)
    return [_field_error(entry, kind) for entry in entries]


def _field_error(error: Any, kind: type[BaseModel]) -> dict[str, Any]:
    pointer = "/" + "/".join(_escaped(part) for part in error["loc"])
    entry = {"pointer": pointer, "detail": error["msg"]}
    if error["type"] == "extra_forbidden":
        # An adapter is the only object within a body.
        names = kind.model_fields if len(error["loc"]) == 1 else AdapterBody.model_fields
        entry |= {"detail": "There is no such field", "accepted": list(names)}
    elif error["type"] == "missing":
        entry["detail"] = _MISSING
    return entry


def _error_members(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the members of a problem: the first errors, and how many were left out."""
    more = len(errors) - MAX_ERRORS
    return {"errors": errors[:MAX_ERRORS]} | ({"errors_left_out": more} if more > 0 else {})


def _escaped(part: object) -> str:
    """Escape a part of a JSON pointer."""
    return str(part).replace("~", "~0").replace("/", "~1")[:64]
