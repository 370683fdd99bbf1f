"""One real stack for the whole suite.

Postgres, Redis, S3 and every process of the house, on free ports in a temporary folder.
"""

import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import structlog
from sqlalchemy import Engine, event

from darkroom_client import Client
from edges import telemetry
from fleet.stack import Stack

# the receivers of webhooks that tests start are here
os.environ["OUTBOUND_ALLOWED_NETWORKS"] = "127.0.0.1/32"
# to standard error, as in every process of the house: a test reads only its own standard output
telemetry.configure_logs()


# No deadlines: the machine that runs tests also runs a stack.
hypothesis.settings.register_profile(
    "the same examples", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.register_profile("other examples", deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Let `make test` try the same examples each time, and `make test-all` others."""
    runs_everything = not config.option.markexpr
    hypothesis.settings.load_profile("other examples" if runs_everything else "the same examples")


class SecondTenant(NamedTuple):
    """A stranger to the tenant of `client`."""

    name: str
    client: Client


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The running system. Whoever stops one of its processes starts it again."""
    # Not below pytest's own temporary folder: that is closed to the account Postgres runs under
    # when we are root.
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    stack = Stack(folder / "data")
    # a time limit on the suite still ends the stack
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stack.up(wait_s=280)
        yield stack
    finally:
        stack.down()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    """The API as the stack's first tenant."""
    env = stack.env
    with Client(env["DARKROOM_URL"], env["DARKROOM_API_KEY"]) as client:
        yield client


@pytest.fixture(scope="session")
def second_tenant(stack: Stack) -> Iterator[SecondTenant]:
    """Another tenant of the same stack, with a key of its own."""
    from models import api_keys, tenants
    from models.database import make_engine, transaction

    env = stack.env
    engine = make_engine(env["DATABASE_URL"], pool_size=1)
    with transaction(engine) as session:
        tenant = tenants.create(session, name="second")
        _, key = api_keys.issue(
            session, tenant_id=tenant.id, name="tests", pepper=env["API_KEY_PEPPER"]
        )
    engine.dispose()
    with Client(env["DARKROOM_URL"], key) as client:
        yield SecondTenant("second", client)


ENGINES: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@event.listens_for(Engine, "engine_connect")
def note_engine(connection) -> None:
    ENGINES.add(connection.engine)


@pytest.fixture(scope="module", autouse=True)
def logs_stay_as_configured():
    """Show who configures logs anew: later tests could not capture what loggers in use write."""
    before = structlog.get_config()["processors"]
    yield
    assert structlog.get_config()["processors"] is before, "a test of this file configured logs"


@pytest.fixture(scope="module", autouse=True)
def connections_are_given_back():
    """Close what pools keep open, so that the files of one process together need no more
    connections than Postgres has.
    """
    yield
    for engine in list(ENGINES):
        engine.dispose()
