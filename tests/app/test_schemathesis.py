"""schemathesis against the served document on the live stack.

What the document allows, and what it does not, never breaks the gateway.
"""

import uuid

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.spec.operations import OPERATIONS
from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# streams, and calls that wait
SLOW = {
    "/v1/jobs/{job_id}/events",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
}
WAITS = {"prefer"}  # headers that ask the gateway to answer when a job has ended


@pytest.fixture(scope="module")
def spec(stack):
    return schemathesis.openapi.from_url(f"{stack.env['DARKROOM_URL']}/openapi.json")


@pytest.fixture(scope="module")
def headers(stack, stack_database):
    """A tenant of its own with every scope; what it asked for is taken back in the end."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        own = {
            "tenant_id": tenant.id,
            "name": "fuzz",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["admin", "generate", "read"], **own)
    return bearer(key)


def some(examples):
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ]
    phases = [Phase.explicit, Phase.generate]
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=quiet,
        phases=phases,
        derandomize=True,
        database=None,
    )


def try_out(operation, headers, *, examples: int, timeout_s: int) -> None:
    """Send what the document allows, and what it does not, to one operation."""

    @some(examples)
    @given(
        case=operation.as_strategy()
        | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    )
    def send(case):
        case.headers = {
            name: value for name, value in (case.headers or {}).items() if name.lower() not in WAITS
        }
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=timeout_s)

    send()


@pytest.mark.parametrize(
    ("method", "path"), sorted(route for route in OPERATIONS if route[1] not in SLOW)
)
def test_nothing_that_is_sent_breaks_the_gateway(spec, headers, method, path):
    try_out(spec[path][method.lower()], headers, examples=8, timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"), sorted(route for route in OPERATIONS if not route[1].endswith("/events"))
)
def test_nothing_that_is_sent_breaks_the_gateway_ever(spec, headers, method, path):
    try_out(spec[path][method.lower()], headers, examples=150, timeout_s=400)
