"""Define how the document describes an operation, and the parameters that several routes share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.http.events import EVENT_ID
from app.http.idempotency import MAX_KEY_CHARS
from app.http.pages import DEFAULT_PAGE, MAX_PAGE
from settings import GatewaySettings

JSON = "application/json"
FORM = "multipart/form-data"
STREAM = "text/event-stream"
PROMPT = "a large red circle in the center on a blue background"
Schema = dict[str, Any]
About = str | Callable[[GatewaySettings], str]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A query parameter or a header.

    about: its text for users, or a function that makes the text from the settings.
    """

    name: str
    where: str
    about: About
    schema: Schema
    style: Mapping[str, Any] = field(default_factory=dict)  # how an object is written


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route and method.

    summary, description: for users of the API. answers: the documents, of which a successful answer
    is one; empty if it has no JSON. events: if it may answer with a stream, the documents of the
    data of each event, by name. also: further successful answers, by status, in words. body: by
    content type, a model, a TypedDict or a schema. examples: by content type, bodies that can be
    sent as they are.
    """

    summary: str
    description: str
    status: int = 200
    answers: tuple[Any, ...] = ()
    events: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    also: Mapping[int, str] = field(default_factory=dict)
    failures: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
    is_picture: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    is_body_required: bool = True
    examples: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    needs_key: bool = True


def query(name: str, about: About, **schema: Any) -> Parameter:
    return Parameter(name=name, where="query", about=about, schema=schema)


def header(name: str, about: About, **schema: Any) -> Parameter:
    return Parameter(name=name, where="header", about=about, schema={"type": "string"} | schema)


PAGE = (
    query(
        "limit",
        "The largest number of entries on a page.",
        type="integer",
        minimum=1,
        maximum=MAX_PAGE,
        default=DEFAULT_PAGE,
    ),
    query("cursor", "`next_cursor` of the previous page.", type="string"),
)
DAYS = (
    query(
        "from",
        "The first day, in UTC; by default the first of this month.",
        type="string",
        format="date",
    ),
    query("to", "The last day, in UTC; by default today.", type="string", format="date"),
)
IDEMPOTENCY_KEY = header(
    "Idempotency-Key",
    "Makes it safe to repeat the request: for a day, the same request with the same key is answered"
    f" with the result of the first one. 1 to {MAX_KEY_CHARS} printable ASCII characters, in double"
    " quotes if spaces, commas, semicolons or quotes are among them.",
    minLength=1,
    maxLength=2 * MAX_KEY_CHARS + 2,  # in quotes, and every character escaped
    pattern="^[ -~]+$",
    examples=["order-7"],
)
IF_NONE_MATCH = header(
    "If-None-Match",
    "The `ETag` of an earlier answer. If nothing has changed since, the answer is 304.",
)
LAST_EVENT_ID = header(
    "Last-Event-ID",
    "The id of the last event that you received; the stream goes on after it.",
    pattern=f"^({EVENT_ID.pattern})?$",
)
REDIRECT = query(
    "redirect",
    "`true`: redirect to the stored picture. `false`: answer with the picture itself. By default"
    " as the operator chose.",
    type="string",
    enum=["true", "false"],
)
RANGE = header("Range", "The bytes of the picture that you want.", examples=["bytes=0-1023"])
IF_RANGE = header(
    "If-Range",
    "The `ETag` of the picture that `Range` is about; for another picture `Range` is ignored.",
)
PICTURE_PARAMETERS = (REDIRECT, IF_NONE_MATCH, RANGE, IF_RANGE)
PREFER = header(
    "Prefer",
    lambda settings: (
        "`wait=N`: answer when the job has ended, or after N seconds, at most"
        f" {settings.max_wait_s}. `Preference-Applied` names the seconds that were granted."
    ),
    examples=["wait=30"],
)
