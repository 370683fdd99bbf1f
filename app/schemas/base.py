"""Make documents, turn them into JSON, and name the types that many of them share."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, PlainSerializer, TypeAdapter, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from policy.instants import rfc3339
from policy.params import Param

Made = TypeVar("Made", bound=type)


@dataclass_transform(kw_only_default=True)
def document(about: str) -> Callable[[Made], Made]:
    """Make the class a dataclass whose schema is described by `about`.

    Values are not checked on the way out: they come from our own rows, and what a newer release
    wrote into a row must not become an error.
    """

    def made(kind: Made) -> Made:
        documented: Any = dataclass(kw_only=True)(kind)
        documented.__pydantic_config__ = described(about)
        return documented  # type: ignore[no-any-return]  # it is `kind`

    return made


def with_params(params: Iterable[Param]) -> Callable[[Made], Made]:
    """Give the class a member for each parameter of a job, ahead of its own members.

    A member that the class defines itself wins.
    """

    def made(kind: Made) -> Made:
        own = dict(kind.__annotations__)
        listed = {
            param.member: Annotated[param.kind, says(param.says)]
            for param in params
            if param.member
        }
        kind.__annotations__ = {name: own.pop(name, hint) for name, hint in listed.items()} | own
        return kind

    return made


def described(about: str) -> ConfigDict:
    """Return the configuration of a document that `about` describes."""
    return ConfigDict(json_schema_extra={"description": about})


def kept(about: str) -> ConfigDict:
    """Return the configuration of a document that is stored in a row as it is.

    Members that a newer release has written are shown, too.
    """
    return ConfigDict(json_schema_extra={"description": about}, extra="allow")


def says(about: str, **keywords: Any) -> FieldInfo:
    """Annotate a member with its description and further JSON Schema keywords."""
    extra: dict[str, Any] = {"json_schema_extra": keywords} if keywords else {}
    return FieldInfo(description=about, **extra)  # an explicit None would take away what is there


def one_of(values: Iterable[str]) -> FieldInfo:
    """Annotate a text that takes one of a few values."""
    return FieldInfo(json_schema_extra={"enum": [str(value) for value in values]})


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Return the pydantic adapter of a document type; made once per type."""
    if (known := _ADAPTERS.get(kind)) is None:
        known = _ADAPTERS[kind] = TypeAdapter(kind)
    return known


def to_json(shown: Any) -> bytes:
    """Serialise a document as ASCII JSON."""
    adapter = adapter_of(type(shown))
    try:
        return adapter.dump_json(shown, by_alias=True, warnings=False, ensure_ascii=True)
    except PydanticSerializationError:  # a lone surrogate: no UTF-8, and JSON escapes it
        return json.dumps(to_plain(shown)).encode()


def to_plain(shown: Any) -> dict[str, Any]:
    """Convert a document to plain values that any JSON writer takes."""
    adapter = adapter_of(type(shown))
    plain: dict[str, Any] = adapter.dump_python(shown, mode="json", by_alias=True, warnings=False)
    return plain


_DATE_TIME = WithJsonSchema({"type": "string", "format": "date-time"})
Instant = Annotated[datetime, PlainSerializer(rfc3339, return_type=str), _DATE_TIME]
Link = Annotated[str, FieldInfo(json_schema_extra={"pattern": "^(/[^/]+)*/v1/"})]
Sha256 = Annotated[str, FieldInfo(json_schema_extra={"pattern": "^[0-9a-f]{64}$"})]
Size = Annotated[str, FieldInfo(json_schema_extra={"pattern": "^[0-9]+x[0-9]+$"})]


@document("A page of a list.")
class Page:
    """The members of every list beside its data."""

    object: Literal["list"] = "list"
    has_more: Annotated[bool, says("Whether there is a page after this one.")]
    next_cursor: Annotated[
        str | None, says("The `cursor` of the next page; null on the last page.")
    ]
