"""The running gateway, as two tenants and as nobody; and gateways of our own with a part that is broken."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import structlog
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, make_url, text

from app import create_app
from models import api_keys, tenants
from models.database import make_engine, transaction
from policy.fleet import Fleet, parse_fleet
from settings import REPO, GatewaySettings
from tests.builders import a_closed_port, settings_for


@pytest.fixture(scope="session", autouse=True)
def plain_logs():
    """structlog's own default draws every traceback with all its variables, which takes seconds."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def stack_database(stack) -> Iterator[Engine]:
    """The stack's Postgres, as the gateway sees it."""
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def new_key(stack, stack_database) -> Callable[..., str]:
    """An API key of a tenant that has nothing yet."""

    def new_key(*, revoked: bool = False) -> str:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            row, key = api_keys.issue(session, tenant_id=tenant.id, name="tests", pepper=stack.env["API_KEY_PEPPER"], actor="tests")
            if revoked:
                api_keys.revoke(session, row.id, actor="tests")
        return key

    return new_key


@pytest.fixture(scope="session")
def new_tenant(stack, new_key) -> Iterator[Callable[[], httpx.Client]]:
    """HTTP as a tenant that has nothing yet."""
    opened = []

    def new_tenant() -> httpx.Client:
        opened.append(httpx.Client(base_url=stack.env["DARKROOM_URL"], headers=bearer(new_key()), timeout=90, trust_env=False))
        return opened[-1]

    yield new_tenant
    for client in opened:
        client.close()


@pytest.fixture(scope="session")
def api(new_tenant) -> httpx.Client:
    """HTTP as a tenant."""
    return new_tenant()


@pytest.fixture(scope="session")
def stranger(new_tenant) -> httpx.Client:
    """HTTP as another tenant."""
    return new_tenant()


@pytest.fixture(scope="session")
def nobody(stack) -> Iterator[httpx.Client]:
    """HTTP without a key."""
    with httpx.Client(base_url=stack.env["DARKROOM_URL"], timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def finished_job(api) -> dict:
    """A job of the tenant that succeeded, with two images."""
    answer = api.post("/v1/jobs", json={"prompt": "a red circle", "n": 2, "seed": 7, "steps": 2}, headers={"Prefer": "wait=60"})
    job = answer.json()
    assert job["state"] == "succeeded", job
    return job


@pytest.fixture
def canceled_job(api) -> dict:
    """A job of the tenant that was taken back."""
    job = api.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch"}).json()
    return api.post(job["urls"]["cancel"]).json()


@pytest.fixture
def count_jobs(stack_database) -> Callable[[], int]:
    """How many jobs there are of all tenants of this room's tests: nobody else makes any meanwhile."""

    def count_jobs() -> int:
        with transaction(stack_database) as session:
            query = "SELECT count(*) FROM jobs JOIN tenants ON tenants.id = jobs.tenant_id WHERE tenants.name LIKE 'app-%'"
            return int(session.scalar(text(query)))

    return count_jobs


@pytest.fixture(scope="session")
def gateway_with(stack) -> Iterator[Callable[..., FlaskClient]]:
    """A gateway of our own on the stack's parts, with some settings changed: WSGI without a socket."""
    shipped, opened = parse_fleet((REPO / "fleet.toml").read_text()), dict[str, Flask]()

    def gateway_with(fleet: Fleet = shipped, **changes) -> FlaskClient:
        which = f"{fleet} {changes}"
        if which not in opened:
            opened[which] = create_app(settings_for(GatewaySettings, stack.env, **changes), fleet)
        return opened[which].test_client()

    yield gateway_with
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda app: app.extensions["darkroom"].endings.close(), opened.values()))


@pytest.fixture(scope="session")
def elsewhere(stack) -> Callable[[str], dict[str, str]]:
    """The setting that makes a part of the house unreachable."""
    port = a_closed_port()
    settings = {
        "database": {"database_url": make_url(stack.env["DATABASE_URL"]).set(port=port).render_as_string(hide_password=False)},
        "broker": {"broker_url": f"redis://127.0.0.1:{port}/0"},
        "handoff": {"handoff_url": f"redis://127.0.0.1:{port}/0"},
        "object_store": {"s3_bucket": "no-such-bucket"},
    }
    return settings.__getitem__


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
