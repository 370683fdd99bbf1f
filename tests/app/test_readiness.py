"""/healthz and /readyz, and what a client sees when a part of the house is away."""

import contextlib
import threading
import uuid

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.testing import capture_logs

from app.live.readiness import ANSWERS_WITHIN_S, CHECK_EVERY_S, Readiness
from models import workers
from models.database import transaction
from models.workers import NewWorker
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import a_fleet, until

PARTS = ["database", "broker", "handoff", "object_store", "workers"]


def test_the_gateway_is_alive(nobody):
    assert nobody.get("/healthz").json() == {"status": "alive"}


def told(client, about=lambda parts: True):
    """What /readyz says once every part was asked, and about this."""

    def tell():
        answer = client.get("/readyz")
        parts = _body(answer)["parts"]
        return (
            answer
            if all(part.get("detail") != "not asked yet" for part in parts.values())
            and about(parts)
            else None
        )

    return until(tell, within_s=60, what="an answer of every part")


def _body(answer):
    return answer.json() if callable(answer.json) else answer.json


def test_the_stack_is_ready_and_every_part_says_so(nobody):
    answer = told(nobody)

    assert (answer.status_code, answer.json()["status"], answer.json()["degraded"]) == (
        200,
        "ready",
        [],
    )
    assert {name: part["ready"] for name, part in answer.json()["parts"].items()} == dict.fromkeys(
        PARTS, True
    )


@pytest.mark.parametrize("part", ["broker", "handoff", "object_store"])
def test_a_part_that_is_away_is_named_and_jobs_are_accepted_all_the_same(
    elsewhere, gateway_with, part
):
    answer = told(gateway_with(**elsewhere(part)))

    assert (answer.status_code, answer.json["status"], answer.json["degraded"]) == (
        200,
        "ready",
        [part],
    )
    assert [name for name, found in answer.json["parts"].items() if not found["ready"]] == [part]


def test_without_the_database_no_job_is_accepted_and_nobody_knows_of_workers(
    elsewhere, gateway_with
):
    answer = told(gateway_with(**elsewhere("database")))

    assert (answer.status_code, answer.json["status"], answer.headers["Retry-After"]) == (
        503,
        "not_ready",
        "2",
    )
    assert answer.json["degraded"] == ["database", "workers"]


def test_a_database_that_takes_no_writes_accepts_no_jobs(stack, gateway_with):
    owner = create_engine(stack.env["MIGRATION_DATABASE_URL"])
    # a role that finds the database as everybody finds one that was demoted
    with owner.begin() as connection:
        connection.execute(
            text("CREATE ROLE darkroom_app_demoted LOGIN PASSWORD 'demoted' IN ROLE darkroom_app")
        )
        connection.execute(
            text("ALTER ROLE darkroom_app_demoted SET default_transaction_read_only = on")
        )
    owner.dispose()
    demoted = make_url(stack.env["DATABASE_URL"]).set(
        username="darkroom_app_demoted", password="demoted"
    )

    answer = told(gateway_with(database_url=demoted.render_as_string(hide_password=False)))

    assert (answer.status_code, answer.json["parts"]["database"]) == (
        503,
        {"ready": False, "detail": "read-only"},
    )


def test_a_pool_without_its_warm_workers_is_named(gateway_with):
    answer = told(gateway_with(a_fleet({"pools.big.warm_floor": 1})))

    assert (answer.status_code, answer.json["degraded"]) == (200, ["workers"])
    assert "pool big" in answer.json["parts"]["workers"]["detail"]


def test_workers_that_cannot_start_and_models_that_nobody_can_load_are_named(
    stack_database, gateway_with
):
    """Whatever the pool's warm floor says."""
    ended = NewWorker(name="gpu0@elsewhere", pool="big", device="cuda:0", instance=uuid.uuid4())
    lacks = {"name": "gpu1@elsewhere", "pool": "big", "device": "cuda:0", "slots": 1, "facts": {}}
    why = "/srv/weights/unet.safetensors is missing"
    with transaction(stack_database) as session:
        workers.claim(session, ended, silent_after_s=15)
        workers.fail(session, ended.name, ended.instance, why)
        workers.heartbeat(session, **lacks, held=["pocket@1"], failed={"large@1": why})

    answer = told(gateway_with())

    with transaction(stack_database) as session:
        workers.leave(session, ended.name, ended.instance)
        workers.leave(session, lacks["name"])
    part = answer.json["parts"]["workers"]
    assert (answer.status_code, answer.json["degraded"]) == (200, ["workers"])
    assert (part["failing"], part["unserved"]) == (["gpu0@elsewhere"], ["large@1"])
    assert part["detail"].endswith("cannot start: gpu0@elsewhere; cannot be loaded: large@1")
    assert "/srv" not in answer.text, "anybody may read it"
    assert part["pools"].keys() == {"local"}, "those of fleet.toml"


def test_a_part_that_hangs_keeps_nobody_waiting(monkeypatch):
    assert ANSWERS_WITHIN_S == 1
    monkeypatch.setattr("app.live.readiness.ANSWERS_WITHIN_S", 0.1)
    hangs = threading.Event()
    readiness = Readiness(
        {"database": lambda: {"ready": True}, "broker": lambda: {"ready": hangs.wait()}}
    )

    parts = until(
        lambda: _says(readiness, "broker", "does not answer"), within_s=60, what="noticing it"
    )
    assert parts["database"] == {"ready": True}

    hangs.set()
    until(lambda: readiness.parts()["broker"]["ready"], within_s=60, what="seeing it come back")
    readiness.close()


def test_a_part_that_fails_in_a_new_way_is_asked_again(monkeypatch):
    assert CHECK_EVERY_S == 2
    monkeypatch.setattr("app.live.readiness.CHECK_EVERY_S", 0.1)
    failures = iter([ValueError("a library's own")])

    def check():
        for failure in failures:
            raise failure
        return {"ready": True}

    readiness = Readiness({"database": check})

    assert until(
        lambda: _says(readiness, "database", "ValueError"), within_s=60, what="the failure"
    )
    until(lambda: readiness.parts()["database"]["ready"], within_s=60, what="the second look")
    readiness.close()


def _says(readiness, part, detail):
    parts = readiness.parts()
    return parts if parts[part].get("detail") == detail else None


def test_an_unready_gateway_is_still_alive(elsewhere, gateway_with):
    assert gateway_with(**elsewhere("database")).get("/healthz").status_code == 200


def test_neither_address_nor_password_is_told(elsewhere, gateway_with):
    for part in ("database", "broker", "handoff", "object_store"):
        said = told(gateway_with(**elsewhere(part))).text

        assert "127.0.0.1" not in said
        assert "://" not in said


def test_without_the_database_the_client_is_asked_to_come_back(elsewhere, gateway_with, new_key):
    answer = gateway_with(**elsewhere("database")).post(
        "/v1/jobs", json={"prompt": "a red circle"}, headers=bearer(new_key())
    )

    assert assert_problem(answer, 503, "part-unavailable")["part"] == "database"
    assert answer.headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    "error", [PoolTimeout("all in use"), OperationalError("SELECT 1", {}, Exception("gone"))]
)
def test_a_database_that_has_no_connection_to_give_asks_clients_to_come_back(
    gateway_with, monkeypatch, error
):
    def fail():
        raise error

    gateway = gateway_with()
    monkeypatch.setitem(gateway.application.view_functions, "health.healthz", fail)

    with capture_logs() as logged:
        answer = gateway.get("/healthz")

    assert assert_problem(answer, 503, "part-unavailable")["part"] == "database"
    assert answer.headers["Retry-After"] == "2"
    assert {
        "event": "database_away",
        "reason": type(error).__name__,
        "log_level": "warning",
    } in logged


def test_a_read_only_database_asks_clients_to_come_back_and_is_used_again_by_itself(stack, api):
    job_body = {"prompt": "a red circle", "tier": "batch"}
    assert api.post("/v1/jobs", json=job_body).status_code == 202

    with read_only_postgres(stack):
        for _ in range(3):
            answer = until(lambda: refused(api, job_body), what="a refusal")
            problem = assert_problem(answer, 503, "part-unavailable")
            assert (problem["part"], answer.headers["Retry-After"]) == ("database", "2")

    until(lambda: api.post("/v1/jobs", json=job_body).status_code == 202, what="the database")


@contextlib.contextmanager
def read_only_postgres(stack):
    """What a failover leaves behind.

    Every session, those that are there too, is refused its writes.
    """
    server = create_engine(
        stack.env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT", pool_size=1
    )
    with server.connect() as connection:
        connection.execute(text("SET default_transaction_read_only = off"))
        connection.execute(text("ALTER SYSTEM SET default_transaction_read_only = on"))
        connection.execute(text("SELECT pg_reload_conf()"))
        try:
            yield
        finally:
            connection.execute(text("ALTER SYSTEM RESET default_transaction_read_only"))
            connection.execute(text("SELECT pg_reload_conf()"))
    server.dispose()


def refused(api, job_body):
    """The answer, once it is another than 202.

    The server takes a moment to reload its configuration.
    """
    answer = api.post("/v1/jobs", json=job_body)
    return answer if answer.status_code != 202 else None


def test_an_unexpected_error_says_nothing_of_our_insides(stack, gateway_with, new_key, count_jobs):
    before = count_jobs()
    without_tables = (
        make_url(stack.env["DATABASE_URL"])
        .set(database="postgres")
        .render_as_string(hide_password=False)
    )

    with capture_logs() as logged:
        answer = gateway_with(database_url=without_tables).post(
            "/v1/jobs", json={"prompt": "a red circle"}, headers=bearer(new_key())
        )

    problem = assert_problem(answer, 500, "unexpected")
    [error] = [line["exc_info"] for line in logged if line["event"] == "unexpected_error"]
    assert isinstance(error, ProgrammingError)  # it is in the log alone
    assert set(problem) == {"type", "title", "status", "detail", "instance", "error"}
    for inside in ("api_keys", "relation", "psycopg2", "SELECT", "Traceback", "Error:", ".py"):
        assert inside not in answer.text
    assert count_jobs() == before
