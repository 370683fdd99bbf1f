"""The running gateway, as two tenants and as nobody; and gateways of our own with a part that is
broken.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import structlog
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, delete, make_url, select, text
from werkzeug.serving import BaseWSGIServer, make_server

from app import create_app
from app.caller import Caller
from app.runtime import Runtime, open_runtime
from edges.progress import JobSignals
from models import api_keys, jobs, tenants, workers
from models.database import make_engine, transaction
from models.tables import Job, Worker
from policy.fleet import Fleet, parse_fleet
from policy.limits import DEFAULT_SCOPES, Limits
from policy.states import ACTIVE_STATES
from settings import REPO, GatewaySettings, ServerSettings
from tests.app import moments
from tests.builders import (
    GONE,
    a_closed_port,
    a_fleet,
    a_job,
    a_lease,
    a_tenant,
    settings_for,
    until,
)

# Of clients that speak plain HTTP: to read every authority's certificate takes 20 ms.
NO_TLS = False

OPEN: list[
    tuple[Engine, JobSignals]
] = []  # the stack's database and signals, once a test asked for them


@pytest.fixture(scope="session", autouse=True)
def plain_logs():
    """structlog's own default draws every traceback with all its variables, which takes seconds."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()]
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def stack_database(stack) -> Iterator[Engine]:
    """The stack's Postgres, as the gateway sees it."""
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    OPEN.append((engine, JobSignals(stack.env["HANDOFF_URL"])))
    yield engine
    OPEN.clear()
    engine.dispose()


@pytest.fixture(scope="module", autouse=True)
def nothing_left_to_do():
    """What this room's tests asked for and did not wait for is taken back, or the one worker
    renders it while others wait.
    """
    yield
    for engine, signals in OPEN:
        with transaction(engine) as session:
            query = """SELECT j.id, j.tenant_id FROM jobs j JOIN tenants t ON t.id = j.tenant_id
                       WHERE t.name LIKE 'app-%' AND j.state IN ('queued', 'running', 'storing')"""
            left = session.execute(text(query)).all()
        for job_id, tenant_id in left:
            with contextlib.suppress(jobs.JobAlreadyFinished), transaction(engine) as session:
                jobs.cancel(session, job_id, tenant_id=tenant_id, actor="tests")
            signals.publish_cancel(job_id)


@pytest.fixture(scope="session")
def new_key(stack, stack_database) -> Callable[..., str]:
    """An API key of a tenant that has nothing yet."""

    def new_key(*, revoked: bool = False, scopes: Sequence[str] = DEFAULT_SCOPES) -> str:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            row, key = api_keys.issue(
                session,
                tenant_id=tenant.id,
                name="tests",
                scopes=scopes,
                pepper=stack.env["API_KEY_PEPPER"],
                actor="tests",
            )
            if revoked:
                api_keys.revoke(session, row.id, actor="tests")
        return key

    return new_key


@pytest.fixture(scope="session")
def new_tenant(stack, new_key) -> Iterator[Callable[[], httpx.Client]]:
    """HTTP as a tenant that has nothing yet."""
    opened = []

    def new_tenant() -> httpx.Client:
        opened.append(
            httpx.Client(
                base_url=stack.env["DARKROOM_URL"],
                headers=bearer(new_key()),
                timeout=90,
                trust_env=False,
                verify=NO_TLS,
            )
        )
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
    url = stack.env["DARKROOM_URL"]
    with httpx.Client(base_url=url, timeout=30, trust_env=False, verify=NO_TLS) as client:
        yield client


@pytest.fixture(scope="session")
def finished_job(api) -> dict:
    """A job of the tenant that succeeded, with two images."""
    answer = api.post(
        "/v1/jobs",
        json={"prompt": "a red circle", "n": 2, "seed": 7, "steps": 2},
        headers={"Prefer": "wait=60"},
    )
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
    """How many jobs there are of all tenants of this room's tests.

    Nobody else makes any meanwhile.
    """

    def count_jobs() -> int:
        with transaction(stack_database) as session:
            query = (
                "SELECT count(*) FROM jobs JOIN tenants ON tenants.id = jobs.tenant_id "
                "WHERE tenants.name LIKE 'app-%'"
            )
            return int(session.scalar(text(query)))

    return count_jobs


@pytest.fixture(scope="session")
def closing(stack) -> Iterator[Callable[[Runtime], None]]:
    """End the threads of a gateway of our own, without waiting: they look once a second."""
    with ThreadPoolExecutor() as threads:

        def closing(parts: Runtime) -> None:
            parts.readiness.close()
            parts.decoders.close()
            threads.submit(parts.events.close)
            threads.submit(parts.endings.close)

        yield closing


@pytest.fixture(scope="module")
def gateway_with(stack, closing) -> Iterator[Callable[..., FlaskClient]]:
    """A gateway of our own on the stack's parts, with some settings changed; WSGI, no socket.

    One for all of the module who want the same.
    """
    shipped, opened = parse_fleet((REPO / "fleet.toml").read_text()), dict[str, Flask]()

    def gateway_with(fleet: Fleet = shipped, **changes) -> FlaskClient:
        which = f"{fleet} {changes}"
        if which not in opened:
            opened[which] = create_app(settings_for(GatewaySettings, stack.env, **changes), fleet)
        return opened[which].test_client()

    yield gateway_with
    for app in opened.values():
        closing(app.extensions["darkroom"])


@pytest.fixture(scope="module")
def a_gateway(stack, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """The URL of a gateway of our own as it is served, gunicorn and all, with these variables
    changed; one for all who want the same.
    """
    opened: dict[str, tuple[subprocess.Popen, str]] = {}

    def a_gateway(**changes: object) -> str:
        which = str(sorted(changes.items()))
        if which not in opened:
            url = f"127.0.0.1:{a_closed_port()}"
            names = {
                name.upper()
                for kind in (GatewaySettings, ServerSettings)
                for name in kind.model_fields
            }
            env = {name: value for name, value in stack.env.items() if name in names} | {
                "METRICS_PORT": "0"
            }
            env |= {"PATH": os.environ["PATH"], "GATEWAY_BIND": url} | {
                name.upper(): str(value) for name, value in changes.items()
            }
            command = [
                sys.executable,
                "-m",
                "gunicorn",
                "-c",
                "deploy/gunicorn.conf.py",
                "app.wsgi:application",
            ]
            with (tmp_path_factory.mktemp("gateway") / "log").open("w") as log:
                opened[which] = (
                    subprocess.Popen(command, cwd=REPO, env=env, stderr=log),
                    f"http://{url}",
                )
            until(lambda: _serves(opened[which][1]), within_s=60, what="the gateway's start")
        return opened[which][1]

    yield a_gateway
    for process, _ in opened.values():
        process.send_signal(signal.SIGQUIT)
    for process, _ in opened.values():
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def unserved(stack, tmp_path_factory) -> dict[str, str]:
    """The settings of a gateway whose jobs wait for workers that are still to come."""
    shipped = (REPO / "fleet.toml").read_text()
    file = tmp_path_factory.mktemp("unserved") / "fleet.toml"
    served = {"[pools.local]": "[pools.later]", "warm_floor = 1": "scalable = true"}
    for here, there in served.items():
        assert shipped.count(here) == 1
        shipped = shipped.replace(here, there)
    file.write_text(shipped)
    own = {"fleet_file": str(file), "follow_revisions": "false"}
    return own | {"broker_url": _corner(stack)}


def _corner(stack) -> str:
    """A broker where no worker looks."""
    return urlsplit(stack.env["BROKER_URL"])._replace(path="/9").geturl()


@pytest.fixture
def served(stack, api, closing) -> Iterator[Callable[..., tuple[httpx.Client, Runtime]]]:
    """A gateway of our own behind a real socket, with some settings changed.

    HTTP as the tenant, and its parts.
    """
    opened: list[tuple[httpx.Client, BaseWSGIServer]] = []

    def served(**changes) -> tuple[httpx.Client, Runtime]:
        settings = settings_for(GatewaySettings, stack.env, **changes)
        app = create_app(settings, settings.load_fleet())
        server = make_server("127.0.0.1", 0, app, threaded=True)
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{server.port}",
            headers=api.headers,
            timeout=60,
            trust_env=False,
            verify=NO_TLS,
        )
        opened.append((client, server))
        return client, app.extensions["darkroom"]

    yield served
    for client, server in opened:
        client.close()
        server.shutdown()
        closing(server.app.extensions["darkroom"])


@pytest.fixture
def held_worker(stack, stack_database) -> Iterator[Callable[[], None]]:
    """The worker stands still until this is called: what is asked for waits.

    It is stopped where it has no transaction open, for whose locks others would wait in vain.
    """
    worker = psutil.Process(stack.pid("worker-1"))

    def stops() -> bool:
        worker.suspend()
        ports = [connection.laddr.port for connection in worker.net_connections("tcp")]
        # a statement that it has sent is done within a moment
        for _ in range(50):
            with transaction(stack_database) as session:
                query = """SELECT count(*) FROM pg_stat_activity
                           WHERE client_port = ANY(:ports) AND xact_start IS NOT NULL"""
                if session.scalar(text(query), {"ports": ports}) == 0:
                    return True
            time.sleep(0.01)
        worker.resume()
        return False

    until(stops, what="a moment without a transaction")
    yield worker.resume
    if worker.is_running():
        worker.resume()


def _serves(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/healthz", timeout=2, trust_env=False, verify=NO_TLS)
        return answer.status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def runtime(stack, closing) -> Iterator[Runtime]:
    """What a gateway process works with, and no Flask around it."""
    opened = open_runtime(
        settings_for(GatewaySettings, stack.env), parse_fleet((REPO / "fleet.toml").read_text())
    )
    yield opened
    closing(opened)


@pytest.fixture
def caller(stack, stack_database) -> Caller:
    """A tenant that has nothing yet."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        row, _ = api_keys.issue(
            session,
            tenant_id=tenant.id,
            name="tests",
            pepper=stack.env["API_KEY_PEPPER"],
            actor="tests",
        )
        return Caller(
            tenant.id, row.id, row.kid, f"key:{row.kid}", frozenset({"generate", "read"}), Limits()
        )


@pytest.fixture(scope="session")
def elsewhere(stack) -> Callable[[str], dict[str, str]]:
    """The setting that makes a part of the house unreachable."""
    port = a_closed_port()
    settings = {
        "database": {
            "database_url": make_url(stack.env["DATABASE_URL"])
            .set(port=port)
            .render_as_string(hide_password=False)
        },
        "broker": {"broker_url": f"redis://127.0.0.1:{port}/0"},
        "handoff": {"handoff_url": f"redis://127.0.0.1:{port}/0"},
        "object_store": {"s3_bucket": "no-such-bucket"},
    }
    return settings.__getitem__


JOB_BODY = {"prompt": "a red circle", "tier": "batch", "n": 8, "seed": 7}


class House:
    """A gateway, and a pool that it serves with as many workers as the test says.

    Nobody renders anything.
    """

    def __init__(self, make_app, database, new_key, changes) -> None:
        self.pool, self._database, self._new_key = f"pool-{uuid.uuid4().hex[:8]}", database, new_key
        shape = {"models": ["pocket"], "slots": 8, "max_batch_rows": 4}
        rows = {"128x128": 4, "128x192": 4}
        own = {
            f"pools.{self.pool}": shape,
            "pools.local": GONE,
            "models.pocket.tiers.quality.bucket_rows": rows,
        }
        app = make_app(
            a_fleet(
                {**own, **{key.replace("POOL", self.pool): value for key, value in changes.items()}}
            )
        )
        self.http = app.test_client()
        self.parts: Runtime = app.extensions["darkroom"]

    def with_workers(self, count=1, **facts):
        with transaction(self._database) as session:
            for number in range(count):
                workers.heartbeat(
                    session,
                    name=f"gpu{number}@{self.pool}",
                    pool=self.pool,
                    device="cpu",
                    slots=8,
                    facts={},
                    **facts,
                )
        return self

    def without_workers(self):
        with transaction(self._database) as session:
            session.execute(delete(Worker).where(Worker.pool == self.pool))

    def tenant(self):
        """POST a job and GET it, as a tenant that has nothing yet."""
        return Tenant(self, bearer(self._new_key()))

    def runs(self, *, tier="batch", predicted_s):
        """A worker is at a job of somebody else's that will take so long."""
        with transaction(self._database) as session:
            a_lease(
                session,
                ttl_s=600,
                worker=f"gpu0@{self.pool}",
                pool=self.pool,
                tier=tier,
                predicted_s=predicted_s,
            )

    def waits(self, *, tenant=None, count=1, predicted_s):
        """Somebody submits so many jobs that wait; the tenant comes back."""
        with transaction(self._database) as session:
            tenant = tenant or a_tenant(session)
            for _ in range(count):
                a_job(session, tenant=tenant, pool=self.pool, tier="batch", predicted_s=predicted_s)
        return tenant

    def leave(self):
        """End everything, so that nobody has to look after it."""
        with transaction(self._database) as session:
            for job in session.scalars(
                select(Job).where(Job.pool == self.pool, Job.state.in_(ACTIVE_STATES))
            ).all():
                jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")
        self.without_workers()


class Tenant:
    def __init__(self, house, headers) -> None:
        self._http, self._headers = house.http, headers

    def post(self, *, headers=None, **job_body):
        return self._http.post(
            "/v1/jobs", json={**JOB_BODY, **job_body}, headers={**self._headers, **(headers or {})}
        )

    def get(self, job, what="self"):
        return self._http.get(job["urls"][what], headers=self._headers).json

    def read(self, path):
        """What a GET of any path answers, as text."""
        return self._http.get(path, headers=self._headers).text

    def delete(self, path):
        return self._http.delete(path, headers=self._headers)

    def send(self, path, body, *, headers=None):
        return self._http.post(path, json=body, headers={**self._headers, **(headers or {})})


@pytest.fixture
def a_house(stack, stack_database, closing, new_key):
    """Open a house with changes to its fleet file; POOL in a key is its pool's name."""
    opened: list[House] = []

    def a_house(changes=None, **settings):
        elsewhere = {"broker_url": _corner(stack), **settings}
        own = settings_for(GatewaySettings, stack.env, **elsewhere)
        house = House(lambda fleet: create_app(own, fleet), stack_database, new_key, changes or {})
        opened.append(house)
        moments.OPEN.append((house.parts, house.pool))
        return house

    yield a_house
    moments.OPEN.clear()
    for house in opened:
        house.leave()
        closing(house.parts)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
