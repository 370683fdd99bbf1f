"""Define bodies of requests, as pydantic models."""

import dataclasses
from collections.abc import Mapping
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Required, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, with_config
from typing_extensions import TypedDict

from app.schemas.base import described, says
from policy.params import PICTURES, RequestedAdapter, RequestedParams

MAX_METADATA_KEYS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_CHARS = 512  # of a value
MAX_JOBS = 1_000  # of a batch


def _as_whole(value: object) -> object:
    """Convert 1.0 and 1e2 to whole numbers: JSON has only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_WHOLE = BeforeValidator(_as_whole)
Whole = Annotated[int, AS_WHOLE]


STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class AdapterBody(BaseModel):
    """One adapter of the model, and its strength."""

    model_config = STRICT

    name: Annotated[str, says("The name of an adapter of the model.")]
    strength: Annotated[
        float, says("1 is its full effect, 0 none; a negative value inverts it.")
    ] = 1.0


_JSON_TYPES: Mapping[Any, Any] = {
    int: Whole,
    Decimal: float,
    UUID: str,  # an id, a data URL or a URL; app/services/inputs.py makes files of them
    tuple[str, ...]: list[str],
    tuple[RequestedAdapter, ...]: list[AdapterBody],
}


def json_type(hint: Any) -> Any:
    """Return the JSON type for a type of ours; bounds in its annotation are kept."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(json_type(kind) for kind in get_args(hint))]  # noqa: UP007
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
        kind = json_type(kind)
        checks: list[Any] = []
        if get_origin(kind) is Annotated:
            kind, *checks = get_args(kind)
        return Annotated[(kind, *bounds, *checks)]  # a schema shows a bound only beside its type
    return _JSON_TYPES.get(hint, hint)


def _requested_fields() -> dict[str, Any]:
    """Return the type and the default of each field of `RequestedParams` in a JSON body."""
    hints = get_type_hints(RequestedParams)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(RequestedParams):
        default: Any = ... if field.default is dataclasses.MISSING else field.default
        found[field.name] = (json_type(hints[field.name]), [] if field.default == () else default)
    return found


# No type checker sees these fields, so `job_request` reads them by their names.
_ParamsBody: Any = create_model("_ParamsBody", __config__=STRICT, **_requested_fields())


class JobBody(_ParamsBody):
    """The body of POST /v1/jobs. Ranges depend on model and tier: `policy.catalog` checks them."""

    metadata: dict[str, str] = {}
    start_deadline_s: float | None = None

    @property
    def pictures(self) -> dict[str, str | None]:
        """Return the value of each picture field."""
        return {field: getattr(self, field) for field in PICTURES}


class JobFields(TypedDict):
    """Fields of a job, none of them required; in the document their schema is that of `JobBody`."""


@with_config(described("Jobs, each of which is accepted or refused on its own."))
class BatchBody(TypedDict, total=False):
    jobs: Required[
        Annotated[
            list[JobFields],
            Field(min_length=1, max_length=MAX_JOBS),
            says("The fields of each job."),
        ]
    ]
    defaults: Annotated[JobFields, says("Fields of every job that does not set them itself.")]
