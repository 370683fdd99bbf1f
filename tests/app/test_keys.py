"""API keys: what each may do, when it ends, and how soon a revoked one is refused."""

import time
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import text

from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import until

BODY = {"prompt": "a red circle", "tier": "batch"}


@pytest.fixture
def issue(stack, stack_database):
    """A key of a new tenant, with its row's id."""

    def issue(**options) -> tuple[str, uuid.UUID]:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            own = {
                "tenant_id": tenant.id,
                "name": "tests",
                "pepper": stack.env["API_KEY_PEPPER"],
                "actor": "tests",
            }
            row, key = api_keys.issue(session, **own, **options)
        return key, row.id

    return issue


def test_a_revoked_key_is_refused_within_a_second_in_every_process(
    issue, nobody, gateway_with, stack_database
):
    key, key_id = issue()
    other = gateway_with(max_wait_s=58)
    assert (
        nobody.get("/v1/jobs", headers=bearer(key)).status_code
        == other.get("/v1/jobs", headers=bearer(key)).status_code
        == 200
    )

    with transaction(stack_database) as session:
        api_keys.revoke(session, key_id, actor="tests")
    revoked_at = time.monotonic()
    while time.monotonic() - revoked_at < 1.0:
        nobody.get("/v1/jobs", headers=bearer(key))  # being used does not keep it alive
        other.get("/v1/jobs", headers=bearer(key))

    assert_problem(nobody.get("/v1/jobs", headers=bearer(key)), 401, "unauthenticated")
    assert_problem(other.get("/v1/jobs", headers=bearer(key)), 401, "unauthenticated")


def test_a_key_ends_when_it_expires_even_if_it_was_used_just_now(issue, nobody):
    key, _ = issue(expires_at=datetime.now(UTC) + timedelta(seconds=1.5))
    assert nobody.get("/v1/jobs", headers=bearer(key)).status_code == 200

    time.sleep(1.6)

    assert_problem(nobody.get("/v1/jobs", headers=bearer(key)), 401, "unauthenticated")


def test_a_remembered_key_ends_at_the_moment_it_expires(issue, gateway_with, monkeypatch):
    """A gateway trusts what it looked up for a moment, but not its end."""
    at = datetime.now(UTC) + timedelta(hours=1)
    key, _ = issue(expires_at=at)
    client = gateway_with(max_wait_s=52)

    def status_at(moment: float) -> int:
        with monkeypatch.context() as clock:
            clock.setattr("app.http.auth.time.time", lambda: moment)
            return client.get("/v1/jobs", headers=bearer(key)).status_code

    statuses = [status_at(at.timestamp() + late_s) for late_s in (-1, 0, 1, -1)]

    assert statuses == [200, 401, 401, 200]


@pytest.mark.parametrize(
    ("scopes", "reads", "generates", "administers"),
    [
        (["read"], 200, 403, 403),
        (["generate"], 403, 202, 403),
        (["admin"], 403, 403, 200),
        (["generate", "read"], 200, 202, 403),
    ],
)
def test_a_key_does_what_its_scopes_say_and_nothing_else(
    issue, nobody, scopes, reads, generates, administers
):
    key, _ = issue(scopes=scopes)

    job = nobody.post("/v1/jobs", json=BODY, headers=bearer(key))

    assert nobody.get("/v1/jobs", headers=bearer(key)).status_code == reads
    assert job.status_code == generates
    assert nobody.get("/v1/admin/tenants", headers=bearer(key)).status_code == administers
    if generates == 403:
        assert assert_problem(job, 403, "forbidden")["scope"] == "generate"
    else:
        nobody.post(job.json()["urls"]["cancel"], headers=bearer(key))


def test_a_key_with_its_scope_may_name_a_version_and_no_other(issue, nobody):
    body = BODY | {"model": "pocket@1"}
    may, may_not = (bearer(issue(scopes=["generate", *more])[0]) for more in (["versions"], []))

    job = nobody.post("/v1/jobs", json=body, headers=may).json()
    refused = nobody.post("/v1/jobs", json=body, headers=may_not)

    nobody.post(job["urls"]["cancel"], headers=may)
    assert (job["model"], job["model_version"]) == ("pocket", "1")
    assert "scope `versions`" in assert_problem(refused, 422, "invalid-image-request")["detail"]


def test_a_key_that_only_reads_may_ask_for_heads(issue, nobody):
    reads, generates = (bearer(issue(scopes=[scope])[0]) for scope in ("read", "generate"))

    assert nobody.head("/v1/jobs", headers=reads).status_code == 200
    assert nobody.head("/v1/jobs", headers=generates).status_code == 403


def test_a_key_can_ask_who_it_is(issue, nobody):
    key, key_id = issue(scopes=["read"])

    told = nobody.get("/v1/key", headers=bearer(key)).json()

    assert (told["id"], told["scopes"], told["limits"]["requests_per_minute"]) == (
        str(key_id),
        ["read"],
        None,
    )
    assert told["actor"] == f"key:{key.split('_')[1]}"


def test_a_rotated_key_leaves_the_old_one_its_grace(issue, nobody, stack, stack_database):
    old, key_id = issue(scopes=["read"])

    with transaction(stack_database) as session:
        row, new = api_keys.rotate(
            session, key_id, pepper=stack.env["API_KEY_PEPPER"], grace_s=1.5, actor="tests"
        )

    assert row.scopes == ["read"]
    assert {nobody.get("/v1/jobs", headers=bearer(key)).status_code for key in (old, new)} == {200}
    until(lambda: nobody.get("/v1/jobs", headers=bearer(old)).status_code == 401)
    assert nobody.get("/v1/jobs", headers=bearer(new)).status_code == 200
    assert_problem(nobody.get("/v1/jobs", headers=bearer(old)), 401, "unauthenticated")


def test_the_last_use_of_a_key_is_noted(issue, nobody, stack_database):
    key, key_id = issue()

    nobody.get("/v1/jobs", headers=bearer(key))

    def used_at() -> datetime | None:
        with transaction(stack_database) as session:
            return session.scalar(
                text("SELECT last_used_at FROM api_keys WHERE id = :id"), {"id": key_id}
            )

    # noted behind the answer's back
    assert datetime.now(UTC) - until(used_at, what="its use") < timedelta(minutes=1)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic a", "Bearer dr_x", "Bearer " + "a" * 500, "Bearer dr_aaaaaaaaaaaa_ü"],
)
def test_a_header_that_is_no_key_is_refused_like_an_unknown_key(nobody, header):
    answer = httpx.get(
        f"{nobody.base_url}/v1/jobs", headers={"Authorization": header.encode()}, trust_env=False
    )

    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
