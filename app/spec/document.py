"""The OpenAPI 3.1 document of the running gateway: from its own routes and their docstrings, its request bodies and the schemas."""

import re
from typing import Any

from flask import Flask
from pydantic import BaseModel

from app.spec.operations import JSON, OPERATIONS, Operation
from app.spec.schemas import SCHEMAS, Schema, ref
from policy.fleet import Fleet
from policy.formats import FORMATS

VERSION = "1.0.0"
PROBLEM = "application/problem+json"
ABOUT = """Image generation as jobs. Send your key as `Authorization: Bearer dr_…`. Every refusal is `application/problem+json` that names
the field and what would be accepted. Members may be added to answers at any time: ignore those you do not know."""
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
}
_KINDS: dict[str, Schema] = {
    "uuid": {"type": "string", "format": "uuid"},
    "int": {"type": "integer", "minimum": 0},
    "path": {"type": "string"},
    "": {"type": "string"},
}
_ARGUMENT = re.compile(r"<(?:(\w+):)?(\w+)>")


def paths_of(app: Flask) -> dict[tuple[str, str], tuple[str, dict[str, Schema]]]:
    """Every route under /v1: (method, path as OpenAPI writes it) -> the view's endpoint and its arguments."""
    found = {}
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/v1"):
            arguments = {name: _KINDS[kind or ""] for kind, name in _ARGUMENT.findall(rule.rule)}
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
                found[method, _ARGUMENT.sub(r"{\2}", rule.rule)] = (rule.endpoint, arguments)
    return found


def build(app: Flask, fleet: Fleet, root: str = "/") -> dict[str, Any]:
    """The document; `root` is the path under which clients reach the gateway. KeyError for a route that `OPERATIONS` does not describe."""
    bodies: dict[str, Schema] = {}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), (endpoint, arguments) in sorted(paths_of(app).items(), key=lambda item: item[0][::-1]):
        operation = OPERATIONS[method, path]
        view = app.view_functions[endpoint]
        paths.setdefault(path, {})[method.lower()] = _described(operation, endpoint, view.__doc__ or "", arguments, bodies)
    _narrow(bodies, fleet)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Darkroom",
            "version": VERSION,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root}],
        "security": [{"key": []}],
        "tags": [{"name": name} for name in dict.fromkeys(TAGS.values())],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": SCHEMAS | bodies,
            "responses": {"Problem": {"description": "A refusal that says why", "content": {PROBLEM: {"schema": ref("Problem")}}}},
        },
    }


def _described(operation: Operation, endpoint: str, about: str, arguments: dict[str, Schema], bodies: dict[str, Schema]) -> dict[str, Any]:
    parameters = [_parameter("path", name, schema, required=True) for name, schema in arguments.items()]
    parameters += [_parameter("query", name, schema) for name, schema in operation.query.items()]
    parameters += [_parameter("header", name, schema) for name, schema in operation.headers.items()]
    described: dict[str, Any] = {
        "operationId": endpoint.replace(".", "_"),
        "tags": [TAGS[endpoint.partition(".")[0]]],
        "summary": operation.summary,
        "description": " ".join(about.split()),
        "parameters": parameters,
        "responses": _responses(operation),
    }
    if operation.body is not None:
        content: dict[str, Any] = {"schema": _body(operation.body, bodies)}
        if operation.example is not None:
            content["example"] = operation.example
        kinds = {operation.body_type: content} | ({JSON: {"schema": operation.json_body}} if operation.json_body is not None else {})
        described["requestBody"] = {"required": not operation.bare, "content": kinds}
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "As asked"}
    if operation.answer is not None:
        good["content"] = {JSON: {"schema": ref(operation.answer)}}
    elif operation.media_type != JSON:
        good["content"] = {operation.media_type: {"schema": {"type": "string"}}}
    others: dict[str, Any] = {str(status): {"description": "Nothing has changed"} for status in operation.others}
    if operation.is_picture:
        pixels = {kind.content_type: {} for kind in FORMATS.values()}
        others |= {"200": {"description": "The picture", "content": pixels}, "206": {"description": "A part of it", "content": pixels}}
    problem = {"$ref": "#/components/responses/Problem"}
    return {str(operation.status): good, **others, "4XX": problem, "5XX": problem}


def _parameter(where: str, name: str, schema: Schema, *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": schema}


def _body(body: type[BaseModel] | Schema, bodies: dict[str, Schema]) -> Schema:
    if isinstance(body, dict):
        return body
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    bodies.update(schema.pop("$defs", {}))
    bodies[body.__name__] = schema
    return ref(body.__name__)


def _narrow(bodies: dict[str, Schema], fleet: Fleet) -> None:
    """What fleet.toml offers, where a field takes one of a few values."""
    offered = {
        "model": list(fleet.model_ids),
        "tier": list(fleet.tiers),
        "size": sorted({size for model in fleet.models.values() for size in model.sizes}),
        "sampler": sorted({sampler for model in fleet.models.values() for sampler in model.samplers}),
        "output_format": ["png", "webp", "jpeg"],
    }
    properties = bodies["JobBody"]["properties"]
    for name, values in offered.items():
        nothing = [] if name == "output_format" else [{"type": "null"}]
        default = {"default": properties[name]["default"]} if "default" in properties[name] else {}
        properties[name] = {"anyOf": [{"type": "string", "enum": values}, *nothing], **default}
    properties["prompt"] |= {"minLength": 1, "maxLength": 2000}
    properties["metadata"] |= {"maxProperties": 16}
