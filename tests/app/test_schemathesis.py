"""schemathesis against the served document on the live stack: what the document allows, and what it does not, never breaks the gateway."""

import uuid

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SLOW = {"/v1/jobs/{job_id}/events", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"}  # streams, and calls that wait


@pytest.fixture(scope="module")
def spec(stack):
    return schemathesis.openapi.from_url(f"{stack.env['DARKROOM_URL']}/openapi.json").exclude(path=sorted(SLOW))


@pytest.fixture(scope="module")
def whole_spec(stack):
    return schemathesis.openapi.from_url(f"{stack.env['DARKROOM_URL']}/openapi.json")


@pytest.fixture(scope="module")
def headers(stack, stack_database):
    """A tenant of its own with every scope; what it asked for is taken back in the end."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        own = {"tenant_id": tenant.id, "name": "fuzz", "pepper": stack.env["API_KEY_PEPPER"], "actor": "tests"}
        _, key = api_keys.issue(session, scopes=["admin", "generate", "read"], **own)
    return bearer(key)


def some(examples):
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    phases = [Phase.explicit, Phase.generate]
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet, phases=phases, derandomize=True, database=None)


few = schemathesis.pytest.from_fixture("spec")
many = schemathesis.pytest.from_fixture("whole_spec")


@few.parametrize()
@some(6)
def test_nothing_that_is_sent_breaks_the_gateway(case, headers):
    case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)


@pytest.mark.slow
@many.parametrize()
@some(100)
def test_nothing_that_is_sent_breaks_the_gateway_ever(case, headers):
    if case.path.endswith("/events"):
        pytest.skip("a stream has no end that a test could wait for")
    case.call_and_validate(headers=headers, checks=CHECKS, timeout=400)
