"""Build the OpenAPI 3.1 document of the running gateway.

It has the gateway's routes, what app/spec/operations says of each, and the documents of app/schemas
that they take and answer.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

from flask import Flask
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from app.http.admin import TenantChange
from app.schemas.account import Limits, Tenant
from app.schemas.base import adapter_of
from app.schemas.bodies import JobBody, JobFields
from app.schemas.problems import Problem
from app.spec.job_fields import job_fields
from app.spec.operation import JSON, STREAM, Operation, Parameter, Schema
from app.spec.operations import OPERATIONS
from app.spec.operations.webhooks import MESSAGES
from policy.fleet import Fleet
from policy.formats import FORMATS
from policy.routing import Asker
from policy.version import VERSION
from settings import GatewaySettings

PROBLEM = "application/problem+json"
ABOUT = """Image generation as jobs. Send your API key as `Authorization: Bearer dr_…`. A refused
request is answered with an `application/problem+json` document, which names the wrong fields and
the accepted values where it can. Answers may get new members at any time: ignore those that you do
not know. `X-Request-Id` identifies a request: send your own, or read ours from the answer."""
TAGS = {  # blueprint -> the heading of its operations, in the order in which the page shows them
    "jobs": "Jobs",
    "batches": "Jobs",
    "estimates": "Jobs",
    "events": "Jobs",
    "files": "Pictures",
    "openai_images": "OpenAI images",
    "catalog": "Models and tiers",
    "webhooks": "Webhooks",
    "account": "Your key and usage",
    "admin": "Administration",
    "about": "The gateway itself",
    "health": "The gateway itself",
    "explain": "The gateway itself",
}
# Routes that are not meant for programs.
LEFT_OUT = {"static", "openapi.show_spec", "openapi.show_docs", "links.show_linked"}
_KINDS: dict[str, Schema] = {
    "uuid": {"type": "string", "format": "uuid"},
    "int": {"type": "integer", "minimum": 0},
    "path": {"type": "string"},
    "": {"type": "string"},
}
_ARGUMENT = re.compile(r"<(?:(\w+):)?(\w+)>")
_REF = "#/components/schemas/{model}"
_SIGNED_BY = {
    "webhook-id": "The id of the delivery, the same at every attempt.",
    "webhook-timestamp": "When this attempt was made, in seconds since 1970.",
    "webhook-signature": "The signatures of the message, as Standard Webhooks defines them.",
}


def paths_of(app: Flask) -> dict[tuple[str, str], tuple[str, dict[str, Schema]]]:
    """List every route: (method, path as OpenAPI writes it) -> endpoint and arguments."""
    found = {}
    for rule in app.url_map.iter_rules():
        if rule.endpoint in LEFT_OUT:
            continue
        arguments = {name: _KINDS[kind or ""] for kind, name in _ARGUMENT.findall(rule.rule)}
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            found[method, _ARGUMENT.sub(r"{\2}", rule.rule)] = (rule.endpoint, arguments)
    return found


def build(
    app: Flask, fleet: Fleet, settings: GatewaySettings, *, asker: Asker, root: str = "/"
) -> dict[str, Any]:
    """Build the document; it names what `asker` may ask for, and nothing else of the fleet.

    root: the path under which clients reach the gateway.  Raises KeyError for a route that
    `OPERATIONS` does not describe.
    """
    shapes = _Shapes(fleet, asker)
    paths: dict[str, dict[str, Any]] = {}
    routes = sorted(paths_of(app).items(), key=lambda item: item[0][::-1])
    for (method, path), (endpoint, arguments) in routes:
        described = _operation(OPERATIONS[method, path], endpoint, arguments, shapes, settings)
        paths.setdefault(path, {})[method.lower()] = described
    problem = {
        "description": "The request was refused or failed, for the reason in the body",
        "content": shapes.content((Problem,), PROBLEM),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Darkroom",
            "version": VERSION,
            "description": " ".join(ABOUT.split()),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root}],
        "security": [{"key": []}],
        "tags": [{"name": name} for name in dict.fromkeys(TAGS.values())],
        "paths": paths,
        "webhooks": {name: _message(name, shapes) for name in MESSAGES},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": shapes.definitions,
            "responses": {"Problem": problem},
        },
    }


class _PlainSchema(GenerateJsonSchema):
    """Generates JSON Schema without the titles and descriptions that pydantic takes from code."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        """Require every member of an answer's dataclass; a TypedDict says what it requires."""
        if field["type"] == "typed-dict-field":
            return bool(field.get("required", total))
        return self.mode == "serialization" or super().field_is_required(field, total)

    def model_schema(self, schema: Any) -> Schema:
        return _without_names(super().model_schema(schema), schema)

    def dataclass_schema(self, schema: Any) -> Schema:
        return _without_names(super().dataclass_schema(schema), schema)

    def typed_dict_schema(self, schema: Any) -> Schema:
        return _without_names(super().typed_dict_schema(schema), schema)


class _Shapes:
    """The schemas of all operations, as components of one document."""

    def __init__(self, fleet: Fleet, asker: Asker) -> None:
        wanted = list(dict.fromkeys(_kinds()))
        self._refs, whole = TypeAdapter.json_schemas(
            [(kind, mode, adapter_of(kind)) for kind, mode in wanted],
            schema_generator=_PlainSchema,
            ref_template=_REF,
        )
        self.definitions: dict[str, Schema] = whole["$defs"]
        self._describe_jobs(fleet, asker)
        self._describe_limits()

    def of(self, kinds: Iterable[Any], mode: JsonSchemaMode = "serialization") -> Schema:
        """Return the schema of a document that is one of these kinds."""
        refs = [self._refs[kind, mode] for kind in kinds]
        return refs[0] if len(refs) == 1 else {"anyOf": refs}

    def content(self, kinds: Iterable[Any], media_type: str = JSON) -> dict[str, Any]:
        """Return the content of an answer that is one of these kinds."""
        return {media_type: {"schema": self.of(kinds)}}

    def body(self, kind: Any) -> Schema:
        """Return the schema of a body."""
        return kind if isinstance(kind, dict) else self.of((kind,), "validation")

    def _describe_jobs(self, fleet: Fleet, asker: Asker) -> None:
        """Describe a job's fields and their bounds; in `JobFields` none is required."""
        job = self.definitions[JobBody.__name__]
        for name, keywords in job_fields(fleet, asker).items():
            _add(job["properties"][name], keywords)
        fields = dict(job)
        del fields["required"]
        self.definitions[JobFields.__name__] = fields

    def _describe_limits(self) -> None:
        """Give the limits of a change the descriptions of the limits that are shown."""
        changed = self.definitions[TenantChange.__name__]["properties"]
        for name, member in self.definitions[Tenant.__name__]["properties"].items():
            if name in changed:
                changed[name].setdefault("description", member["description"])
        for name, member in self.definitions[Limits.__name__]["properties"].items():
            changed[name].setdefault("description", member["description"])


def _kinds() -> Iterable[tuple[Any, JsonSchemaMode]]:
    """List every kind of document that operations name, with its direction."""
    yield Problem, "serialization"
    for kind, _ in MESSAGES.values():
        yield kind, "serialization"
    for operation in OPERATIONS.values():
        for kinds in (operation.answers, *operation.failures.values(), *operation.events.values()):
            yield from ((kind, "serialization") for kind in kinds)
        for body in operation.body.values():
            if not isinstance(body, dict):
                yield body, "validation"


def _without_names(described: Schema, schema: Any) -> Schema:
    """Remove a document's title and docstring, which are written for readers of the code."""
    described.pop("title", None)
    if described.get("description") == inspect.getdoc(schema["cls"]):
        described.pop("description", None)
    return described


def _add(member: Schema, keywords: Schema) -> None:
    """Add a description and bounds to a member that may be null."""
    bounds = {name: value for name, value in keywords.items() if name != "description"}
    member["description"] = keywords["description"]
    bounded = next((each for each in member.get("anyOf", ()) if each["type"] != "null"), member)
    bounded |= bounds


def _operation(
    operation: Operation,
    endpoint: str,
    arguments: dict[str, Schema],
    shapes: _Shapes,
    settings: GatewaySettings,
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": endpoint.replace(".", "_"),
        "tags": [TAGS[endpoint.partition(".")[0]]],
        "summary": operation.summary,
        "description": operation.description,
        "parameters": _parameters(operation, arguments, settings),
        "responses": _responses(operation, shapes),
    }
    if operation.body:
        described["requestBody"] = _body(operation, shapes)
    if not operation.needs_key:
        described["security"] = []
    return described


def _parameters(
    operation: Operation, arguments: dict[str, Schema], settings: GatewaySettings
) -> list[dict[str, Any]]:
    of_path: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in arguments.items()
    ]
    return of_path + [_parameter(each, settings) for each in operation.parameters]


def _parameter(parameter: Parameter, settings: GatewaySettings) -> dict[str, Any]:
    about = parameter.about if isinstance(parameter.about, str) else parameter.about(settings)
    named = {"name": parameter.name, "in": parameter.where, "required": False, "description": about}
    return named | dict(parameter.style) | {"schema": parameter.schema}


def _body(operation: Operation, shapes: _Shapes) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media_type, kind in operation.body.items():
        content[media_type] = {"schema": shapes.body(kind)}
        if media_type in operation.examples:
            content[media_type]["example"] = operation.examples[media_type]
    return {"required": operation.is_body_required, "content": content}


def _responses(operation: Operation, shapes: _Shapes) -> dict[str, Any]:
    responses: dict[str, Any] = {str(operation.status): _good(operation, shapes)}
    for status, about in operation.also.items():
        responses[str(status)] = {"description": about}
    for failed, kinds in operation.failures.items():
        responses[str(failed)] = {"description": "Not ready", "content": shapes.content(kinds)}
    if operation.is_picture:
        pixels: dict[str, Any] = {kind.content_type: {} for kind in FORMATS.values()}
        responses["200"] = {"description": "The picture", "content": pixels}
        responses["206"] = {"description": "The requested part of the picture", "content": pixels}
        responses["304"] = {"description": "Nothing has changed since the answer with that `ETag`"}
    problem = {"$ref": "#/components/responses/Problem"}
    return responses | {"4XX": problem, "5XX": problem}


def _good(operation: Operation, shapes: _Shapes) -> dict[str, Any]:
    content = shapes.content(operation.answers) if operation.answers else {}
    if operation.events:
        events = {name: shapes.of(kinds) for name, kinds in operation.events.items()}
        content[STREAM] = {"schema": {"type": "string"}, "x-events": events}
    return {"description": "Success"} | ({"content": content} if content else {})


def _message(name: str, shapes: _Shapes) -> dict[str, Any]:
    kind, about = MESSAGES[name]
    described = {
        "operationId": name.replace(".", "_"),
        "tags": ["Webhooks"],
        "summary": f"Receive {name}",
        "description": about,
        "parameters": [_signed_header(header, text) for header, text in _SIGNED_BY.items()],
        "requestBody": {"required": True, "content": shapes.content((kind,))},
        "responses": {
            "2XX": {"description": "Delivered"},
            "410": {
                "description": "The endpoint is gone; it is disabled and receives nothing more"
            },
        },
    }
    return {"post": described}


def _signed_header(name: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": True,
        "description": text,
        "schema": {"type": "string"},
    }
