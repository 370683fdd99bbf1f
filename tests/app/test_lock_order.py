"""No two operations wait for each other in a circle.

Every pair of them, on one tenant's rows and on two tenants'.

The database is one of our own in which whoever locks a row keeps it for some milliseconds before it
goes on. So two operations that lock in different orders meet within a few tries, where in
production it takes a busy day.
"""

import io
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import urlsplit

import pytest
from flask import Flask
from sqlalchemy import Engine, event, text

from app import create_app
from models import api_keys, jobs, leases, tenants, webhooks, workers
from models.database import CONFLICTS, TRIES, run_transaction, transaction
from models.webhooks import AttemptResult
from policy.fleet import parse_fleet
from settings import REPO, GatewaySettings
from tests.app.conftest import bearer
from tests.builders import a_fleet, an_artifact, rendered, settings_for
from tests.models.conftest import Database, a_database
from tests.models.facts import at_once
from tests.pictures import a_picture, png

AT_MOST_APART_S = 0.03  # what comes before the first lock of one operation and not of another
# is_slow is 2 while a race is on: a sequence shows each session its newest value at once
SLOW = """
CREATE SEQUENCE is_slow;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF (SELECT last_value FROM is_slow) = 2 THEN PERFORM pg_sleep(random() * 0.01); END IF;
    RETURN coalesce(NEW, OLD);
END $$
"""
LOCKED = (
    "tenants",
    "api_keys",
    "jobs",
    "files",
    "uploads",
    "flows",
    "usage_ledger",
    "webhook_endpoints",
    "webhook_deliveries",
)
A_DAY_S = 86_400.0
JOB = {"prompt": "a red circle", "tier": "batch", "steps": 4, "n": 2}
_colours = itertools.count()


@dataclass
class House:
    """A gateway on a database of its own, whose pool has a worker that nobody has started."""

    app: Flask
    database: Database
    operator: str
    deadlocks: list[str] = field(default_factory=list)

    def tenant(self) -> "Tenant":
        pepper = self.app.extensions["darkroom"].settings.api_key_pepper.get_secret_value()
        with transaction(self.database.app) as session:
            tenant = tenants.create(session, name=uuid.uuid4().hex, actor="tests")
            row, key = api_keys.issue(
                session, tenant_id=tenant.id, name="tests", pepper=pepper, actor="tests"
            )
        return Tenant(self, tenant.id, row.id, key)

    def send(self, key: str, method: str, path: str, **content) -> tuple[int, dict]:
        headers = {**bearer(key), **content.pop("headers", {})}
        answer = self.app.test_client().open(path, method=method, headers=headers, **content)
        return answer.status_code, answer.get_json(silent=True) or {}


@dataclass
class Tenant:
    """A tenant with one of everything that two operations may want at once.

    Each is made when it is first asked for.
    """

    house: House
    id: uuid.UUID
    key_id: uuid.UUID
    key: str

    def send(self, method: str, path: str, **content) -> tuple[int, dict]:
        return self.house.send(self.key, method, path, **content)

    def made(self, path: str, **content) -> dict:
        status, body = self.send("POST", path, **content)
        assert status in (201, 202), body
        return body

    @cached_property
    def file(self) -> str:
        return self.made("/v1/files", **a_file())["id"]

    @cached_property
    def job(self) -> str:
        return self.made(
            "/v1/jobs", json={**JOB, "init_image": self.made("/v1/files", **a_file())["id"]}
        )["id"]

    @cached_property
    def endpoint(self) -> str:
        return self.made("/v1/webhooks", json={"url": "http://127.0.0.1:9/hook"})["id"]

    @cached_property
    def delivery(self) -> str:
        return self.made(f"/v1/webhooks/{self.endpoint}/test")["id"]


def a_file() -> dict:
    return {
        "data": {
            "file": (
                io.BytesIO(png(a_picture(8 + next(_colours) % 999, 8 + next(_colours) // 999))),
                "picture.png",
            )
        }
    }


Act = Callable[[], tuple[int, dict]]
Operation = Callable[[Tenant], Act]


def call(method: str, path: str, **content) -> Operation:
    """An operation that is one request. {file}, {job} and so on in the path are the tenant's."""

    def prepare(tenant: Tenant) -> Act:
        names = [
            name
            for name in ("file", "job", "endpoint", "delivery", "key_id", "id")
            if f"{{{name}}}" in path
        ]
        filled = path.format(**{name: getattr(tenant, name) for name in names})
        key = tenant.house.operator if path.startswith("/v1/admin") else tenant.key
        return lambda: tenant.house.send(key, method, filled, **content)

    return prepare


def submit_with_the_picture(tenant: Tenant) -> Act:
    file_id = tenant.file
    return lambda: tenant.send("POST", "/v1/jobs", json={**JOB, "init_image": file_id})


def submit_a_batch(tenant: Tenant) -> Act:
    file_id = tenant.file
    items = [{"tier": tier} for tier in ("quality", "fast", "batch")] + [{"init_image": file_id}]
    return lambda: tenant.send("POST", "/v1/jobs:batch", json={"defaults": JOB, "jobs": items})


def upload(tenant: Tenant) -> Act:
    content = a_file()
    return lambda: tenant.send("POST", "/v1/files", **content)


def is_rendered(tenant: Tenant) -> Act:
    """What workers do to a job from its lease to its last image.

    Not the API's, but beside it all day.
    """
    job_id, database = uuid.UUID(tenant.job), tenant.house.database.app

    def act() -> tuple[int, dict]:
        lease = run_transaction(
            database,
            lambda session: leases.take(
                session, job_id, worker="gpu0@here", device="cpu", ttl_s=60
            ),
        )
        try:
            for index in lease.pending if lease is not None else ():
                told = {"rendered": rendered(), "store_within_s": 10}
                run_transaction(
                    database,
                    lambda session, index=index, told=told: leases.hand_off(
                        session, lease, index, **told
                    ),
                )
                stored = {
                    "job_id": job_id,
                    "index": index,
                    "attempt": lease.attempt,
                    "artifact": an_artifact(),
                    "store_within_s": 10,
                }
                by = {"fleet": a_fleet(), "actor": "results"}
                run_transaction(
                    database,
                    lambda session, stored=stored, by=by: jobs.store(session, **stored, **by),
                )
        except leases.LeaseLost:
            pass
        return 200, {}

    return act


def is_handed_over(tenant: Tenant) -> Act:
    """A worker gives a job to the pool that serves its model now."""
    job_id, database = uuid.UUID(tenant.job), tenant.house.database.app
    run_transaction(database, lambda session: jobs.move(session, job_id, "elsewhere"))

    def act() -> tuple[int, dict]:
        lease = run_transaction(
            database,
            lambda session: leases.take(
                session, job_id, worker="gpu0@there", device="cpu", ttl_s=60, pool="elsewhere"
            ),
        )
        if lease is not None:
            told = {"reason": "another worker serves its model", "pool": "local"}
            run_transaction(database, lambda session: leases.give_back(session, lease, **told))
        return 200, {}

    return act


def is_told_to_be_gone(tenant: Tenant) -> Act:
    """A receiver answers 410; not the API's either."""
    delivery_id, database = uuid.UUID(tenant.delivery), tenant.house.database.app

    def act() -> tuple[int, dict]:
        claim = run_transaction(database, lambda session: webhooks.claim(session, delivery_id))
        if claim is not None:
            run_transaction(
                database,
                lambda session: webhooks.record(
                    session, claim, AttemptResult(410, None, 0.1, None), actor="courier"
                ),
            )
        return 200, {}

    return act


OPERATIONS: dict[str, Operation] = {
    "submit": call("POST", "/v1/jobs", json=JOB),
    "submit once": call("POST", "/v1/jobs", json=JOB, headers={"Idempotency-Key": "the-same"}),
    "submit with a picture": submit_with_the_picture,
    "submit a batch": submit_a_batch,
    "replay": call("POST", "/v1/jobs/{job}/replay"),
    "cancel": call("POST", "/v1/jobs/{job}/cancel"),
    "erase": call("DELETE", "/v1/jobs/{job}"),
    "upload": upload,
    "erase a file": call("DELETE", "/v1/files/{file}"),
    "create a webhook": call("POST", "/v1/webhooks", json={"url": "http://127.0.0.1:9/hook"}),
    "change a webhook": call(
        "PATCH", "/v1/webhooks/{endpoint}", json={"description": "orders", "enabled": True}
    ),
    "delete a webhook": call("DELETE", "/v1/webhooks/{endpoint}"),
    "rotate a webhook's secret": call("POST", "/v1/webhooks/{endpoint}/rotate"),
    "test a webhook": call("POST", "/v1/webhooks/{endpoint}/test"),
    "redeliver": call("POST", "/v1/webhooks/deliveries/{delivery}/redeliver"),
    "rotate the key": call("POST", "/v1/admin/keys/{key_id}/rotate", json={"grace_s": 2_000_000}),
    "issue a key": call("POST", "/v1/admin/tenants/{id}/keys", json={}),
    "limit the tenant": call(
        "PATCH", "/v1/admin/tenants/{id}", json={"weight": 2.0, "max_concurrent_jobs": 1000}
    ),
    "ask for the usage": call("GET", "/v1/usage"),
    "is rendered": is_rendered,
    "is handed over": is_handed_over,
    "is told to be gone": is_told_to_be_gone,
}
PAIRS = list(itertools.combinations_with_replacement(OPERATIONS, 2))
LIKELY = (
    "submit",
    "submit with a picture",
    "erase a file",
    "create a webhook",
    "rotate the key",
    "is told to be gone",
    "delete a webhook",
)


@pytest.fixture(scope="module")
def house(stack, closing) -> Iterator[House]:
    corner = urlsplit(stack.env["BROKER_URL"])._replace(path="/9").geturl()  # where no worker looks
    with a_database(stack.env) as database:
        with transaction(database.owner) as session:
            session.execute(text(SLOW))
            for table in LOCKED:
                session.execute(
                    text(
                        f"CREATE TRIGGER z_slow BEFORE INSERT OR UPDATE ON {table} "
                        "FOR EACH ROW EXECUTE FUNCTION slow()"
                    )
                )
            session.execute(
                text(
                    "CREATE TRIGGER z_slow BEFORE INSERT ON audit_events "
                    "FOR EACH ROW EXECUTE FUNCTION slow()"
                )
            )
        url = {"database_url": database.app.url.render_as_string(hide_password=False)}
        settings = settings_for(
            GatewaySettings, stack.env, broker_url=corner, lease_ttl_s=A_DAY_S, **url
        )
        house = House(
            create_app(settings, parse_fleet((REPO / "fleet.toml").read_text())), database, ""
        )
        with transaction(database.app) as session:
            workers.heartbeat(
                session, name="gpu0@here", pool="local", device="cpu", slots=16, facts={}
            )
            pepper = settings.api_key_pepper.get_secret_value()
            admin = tenants.create(session, name="operators", actor="tests")
            _, house.operator = api_keys.issue(
                session,
                tenant_id=admin.id,
                name="tests",
                pepper=pepper,
                scopes=("admin",),
                actor="tests",
            )

        def note(failed) -> None:
            if (code := getattr(failed.original_exception, "pgcode", None)) in CONFLICTS:
                house.deadlocks.append(f"{CONFLICTS[code]}: {failed.original_exception}")

        event.listen(Engine, "handle_error", note)
        yield house
        event.remove(Engine, "handle_error", note)
        closing(house.app.extensions["darkroom"])


@contextmanager
def slow_rows(house: House) -> Iterator[None]:
    """Have whoever locks a row keep it for a while."""
    with house.database.owner.connect() as connection:
        connection.execute(text("SELECT setval('is_slow', 2)"))
        yield
        connection.execute(text("SELECT setval('is_slow', 1)"))


def race(house: House, first: str, second: str, *, are_strangers: bool, tries: int) -> None:
    """Both at nearly the same moment, twice each, some times."""

    def soon(act: Act) -> Act:
        def start() -> tuple[int, dict]:
            time.sleep(random.uniform(0, AT_MOST_APART_S))
            return act()

        return start

    for _ in range(tries):
        one = house.tenant()
        other = house.tenant() if are_strangers else one
        acts = [
            OPERATIONS[name](tenant)
            for name, tenant in ((first, one), (second, other))
            for _ in range(2)
        ]

        with slow_rows(house):
            answers = at_once(*map(soon, acts))

        assert [body for status, body in answers if status >= 500] == [], (first, second)
        assert house.deadlocks == [], (first, second)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_that_is_raced_does_something(house, operation):
    status, body = OPERATIONS[operation](house.tenant())()

    assert status < 300, body
    assert body.get("refused", 0) == 0


@pytest.mark.parametrize(
    ("pairs", "are_strangers"),
    [
        (list(itertools.combinations_with_replacement(LIKELY, 2)), False),
        # what tenants have in common are the places in line
        ([("submit", other) for other in LIKELY] + [("submit with a picture",) * 2], True),
        ([("is handed over", "submit")], False),
    ],
    ids=["one tenant", "two tenants", "a hand-over"],
)
def test_no_two_operations_deadlock_that_once_did(house, pairs, are_strangers):
    for first, second in pairs:
        race(house, first, second, are_strangers=are_strangers, tries=8)


@contextmanager
def conflicts(house: House, code: str, times: int) -> Iterator[None]:
    """The first transactions that insert a job end as a conflict would.

    A sequence counts them, for that is not rolled back.
    """
    make = (
        "CREATE SEQUENCE tries",
        f"""CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
            BEGIN
                IF nextval('tries') <= {times}
                THEN RAISE EXCEPTION 'as if' USING ERRCODE = '{code}';
                END IF;
                RETURN NEW;
            END $$""",
        "CREATE TRIGGER a_conflict BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION conflict()",
    )
    with transaction(house.database.owner) as session:
        for statement in make:
            session.execute(text(statement))
    yield
    with transaction(house.database.owner) as session:
        session.execute(text("DROP FUNCTION conflict CASCADE"))
        session.execute(text("DROP SEQUENCE tries"))
    house.deadlocks.clear()


@pytest.mark.parametrize("code", CONFLICTS)
def test_a_request_that_conflicts_is_tried_again_and_its_client_does_not_hear_of_it(house, code):
    tenant = house.tenant()

    with conflicts(house, code, TRIES - 1):
        status, job = tenant.send("POST", "/v1/jobs", json=JOB)

    assert status == 202, job
    assert [listed["id"] for listed in tenant.send("GET", "/v1/jobs")[1]["data"]] == [job["id"]]


def test_a_request_that_conflicts_every_time_is_told_to_come_again(
    house,
):
    tenant = house.tenant()

    with conflicts(house, "40P01", TRIES):
        status, problem = tenant.send("POST", "/v1/jobs", json=JOB)

    assert (status, problem["type"]) == (503, "/problems/part-unavailable")
    assert "database" not in problem["detail"]
    assert tenant.send("GET", "/v1/jobs")[1]["data"] == []


def test_two_who_rotate_a_webhook_s_secret_at_once_leave_one_that_lasts(house):
    tenant = house.tenant()

    at_once(*[OPERATIONS["rotate a webhook's secret"](tenant) for _ in range(4)])

    with transaction(house.database.app) as session:
        query = (
            "SELECT count(*) FROM webhook_secrets WHERE endpoint_id = :id AND expires_at IS NULL"
        )
        assert session.scalar(text(query), {"id": tenant.endpoint}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("are_strangers", [False, True], ids=["one tenant", "two tenants"])
def test_no_two_operations_deadlock(house, are_strangers):
    assert len(PAIRS) > 200
    for first, second in PAIRS:
        race(house, first, second, are_strangers=are_strangers, tries=3)
