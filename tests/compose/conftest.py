"""The compose files as Compose would read them, and the words they are made of."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]


class Variable(NamedTuple):
    """`${NAME:-default}`, or `${NAME-default}`, somewhere in a compose file."""

    name: str
    default: str


_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^{}]*))?\}")


def variables_of(text: str) -> list[Variable]:
    return [Variable(name, default) for name, default in _VARIABLE.findall(text)]


def with_defaults(value: Any) -> Any:
    """`value` as it is for somebody who sets nothing."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: match[2] or "", value)
    if isinstance(value, dict):
        return {key: with_defaults(inner) for key, inner in value.items()}
    return [with_defaults(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def compose_text() -> str:
    return (REPO / "docker-compose.yml").read_text()


@pytest.fixture(scope="session")
def services(compose_text: str) -> dict[str, Any]:
    """Every service of docker-compose.yml, with defaults filled in."""
    return dict(with_defaults(yaml.safe_load(compose_text))["services"])


@pytest.fixture(scope="session")
def gpu_services() -> dict[str, Any]:
    return dict(
        with_defaults(yaml.safe_load((REPO / "docker-compose.gpu.yml").read_text()))["services"]
    )
