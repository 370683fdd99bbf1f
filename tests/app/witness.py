"""Compare real answers with the served document, its schemas closed.

A member that it does not have is a fault, as one that is missing.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
from jsonschema import Draft202012Validator

STREAM = "text/event-stream"
METHODS = ("get", "post", "patch", "delete")


def closed(schema: Any) -> Any:
    """The same schema, no object in it having members that it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: closed(value) for name, value in schema.items()}
    if copy.get("type") == "object" and "properties" in copy:
        copy.setdefault("additionalProperties", False)
    return copy


class Witness:
    """Looks at answers and remembers for which operations, and what was wrong with them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._components = {"schemas": closed(spec["components"]["schemas"])}
        self.good: set[tuple[str, str]] = set()
        self.refused: set[tuple[str, str]] = set()
        self.events: dict[str, set[str]] = defaultdict(set)
        self.kinds: set[str] = set()

    @property
    def operations(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {
            (method.upper(), path): item[method]
            for path, item in self._spec["paths"].items()
            for method in METHODS
            if method in item
        }

    def look(self, answer: httpx.Response) -> None:
        """Raises AssertionError for an answer that is not as described."""
        answer.read()
        path = answer.request.url.path
        operation = self._operation(answer.request.method, path)
        self.look_at(
            operation,
            answer.status_code,
            answer.headers.get("Content-Type", ""),
            answer.json if answer.content else None,
        )

    def look_at(
        self,
        operation: tuple[str, str],
        status: int,
        content_type: str,
        read: Any,
    ) -> None:
        responses = self.operations[operation]["responses"]
        described = responses.get(str(status)) or responses[f"{status // 100}XX"]
        if "$ref" in described:
            described = self._spec["components"]["responses"][described["$ref"].rpartition("/")[2]]
        (self.good if status < 400 else self.refused).add(operation)
        media_type = content_type.partition(";")[0]
        if not described.get("content"):
            return
        assert media_type in described["content"], (operation, status, media_type)
        schema = described["content"][media_type].get("schema")
        if media_type.endswith("json"):
            self.compare(schema, read(), f"{operation[0]} {operation[1]} {status}")

    def look_at_events(self, operation: tuple[str, str], told: Iterator[tuple[str, Any]]) -> None:
        """`told`: the names of events and their data."""
        events = self.operations[operation]["responses"]["200"]["content"][STREAM]["x-events"]
        for name, data in told:
            assert name in events, (operation, name)
            self.compare(events[name], data, f"{operation[1]} {name}")
            self.events[operation[1]].add(name)
        self.good.add(operation)

    def look_at_message(self, message: dict[str, Any]) -> None:
        """A body that a webhook was sent."""
        described = self._spec["webhooks"][message["type"]]["post"]["requestBody"]["content"][
            "application/json"
        ]
        self.compare(described["schema"], message, message["type"])
        self.events["webhooks"].add(message["type"])

    def compare(self, schema: dict[str, Any], instance: Any, what: str) -> None:
        validator = Draft202012Validator(
            {**closed(schema), "components": self._components},
            format_checker=Draft202012Validator.FORMAT_CHECKER,
        )
        faults = [
            f"{fault.json_path}: {fault.message[:300]}"
            for fault in _leaves(validator.iter_errors(instance))
        ]
        assert faults == [], f"{what}: {faults}"

    def _operation(self, method: str, path: str) -> tuple[str, str]:
        for candidate in sorted(self.operations, key=lambda each: each[1].count("{")):
            pattern = re.sub(r"\{name\}", ".+", candidate[1])
            if candidate[0] == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path):
                return candidate
        raise AssertionError(f"{method} {path} is in no operation")


def _leaves(errors: Any) -> Iterator[Any]:
    """Of what fits none of several schemas, why not the one that it is nearest to."""
    for error in errors:
        if error.context:
            by_branch = defaultdict(list)
            for each in error.context:
                by_branch[each.schema_path[0]].append(each)
            yield from _leaves(min(by_branch.values(), key=len))
        else:
            yield error
