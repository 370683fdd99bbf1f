"""/v1/admin: an operator hands out tenants, keys and limits over HTTP."""

import time
import uuid

import httpx
import pytest

from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer
from tests.app.problem import assert_problem


@pytest.fixture(scope="module")
def admin(stack, stack_database):
    """HTTP as an operator."""
    with transaction(stack_database) as session:
        tenant = tenants.create(
            session, name=f"app-operators-{uuid.uuid4().hex[:8]}", actor="tests"
        )
        own = {
            "tenant_id": tenant.id,
            "name": "operator",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["admin"], **own)
    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"], headers=bearer(key), timeout=30, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def tenant(admin) -> dict:
    answer = admin.post("/v1/admin/tenants", json={"name": f"app-{uuid.uuid4().hex[:8]}"})
    assert answer.status_code == 201
    assert admin.get(answer.headers["Location"]).json() == answer.json()
    return answer.json()


def test_a_tenant_is_made_listed_limited_and_unlimited_again(admin, tenant):
    own = f"/v1/admin/tenants/{tenant['id']}"
    limits = {
        "requests_per_minute": 60,
        "daily_megapixel_steps": 12.5,
        "allowed_tiers": ["fast"],
        "url_inputs": True,
    }

    changed = admin.patch(own, json=limits | {"weight": 2.0}).json()
    without = admin.patch(own, json={"requests_per_minute": None, "allowed_tiers": None}).json()

    assert {name: changed["limits"][name] for name in limits} == limits
    assert changed["weight"] == 2.0
    assert (
        without["limits"]["requests_per_minute"],
        without["limits"]["daily_megapixel_steps"],
    ) == (None, 12.5)
    assert tenant["id"] in [
        row["id"] for row in admin.get("/v1/admin/tenants", params={"limit": 100}).json()["data"]
    ]


def test_a_key_is_issued_used_rotated_and_revoked(admin, tenant, nobody):
    keys = f"/v1/admin/tenants/{tenant['id']}/keys"
    issued = admin.post(
        keys, json={"name": "web", "scopes": ["read"], "expires_at": "2099-01-01T00:00:00Z"}
    ).json()
    assert issued["expires_at"].startswith("2099-01-01T00:00:00")
    assert nobody.get("/v1/key", headers=bearer(issued["key"])).json()["scopes"] == ["read"]

    rotated = admin.post(f"/v1/admin/keys/{issued['id']}/rotate", json={"grace_s": 0}).json()
    assert (rotated["former_key_id"], rotated["former_key_lives_for_s"]) == (issued["id"], 0)
    assert nobody.get("/v1/key", headers=bearer(rotated["key"])).json()["tenant_id"] == tenant["id"]
    assert admin.delete(f"/v1/admin/keys/{rotated['id']}").status_code == 204
    time.sleep(1)

    assert {
        nobody.get("/v1/key", headers=bearer(key["key"])).status_code for key in (issued, rotated)
    } == {401}
    listed = admin.get(keys).json()["data"]
    assert [(key["name"], key["scopes"], key["revoked_at"] is None) for key in listed] == [
        ("web", ["read"], True),
        ("web", ["read"], False),
    ]
    assert all("key" not in key and "digest" not in key for key in listed)
    assert_problem(admin.delete(f"/v1/admin/keys/{rotated['id']}"), 404, "key-not-found")


def test_usage_is_told_by_days(admin, tenant):
    told = admin.get(
        f"/v1/admin/tenants/{tenant['id']}/usage", params={"from": "2026-11-01", "to": "2026-11-30"}
    ).json()

    assert (told["from"], told["to"], told["data"], told["tenant_id"]) == (
        "2026-11-01",
        "2026-11-30",
        [],
        tenant["id"],
    )


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"requests_per_minute": 0}, "/requests_per_minute"),
        ({"requests_per_minute": "60"}, "/requests_per_minute"),
        ({"megapixel_steps_per_minute": 5.0}, "/burst_megapixel_steps"),
        ({"allowed_tiers": []}, "/allowed_tiers"),
        ({"allowed_tiers": ["express"]}, "/allowed_tiers"),
        ({"allowed_models": ["dall-e-3"]}, "/allowed_models"),
        ({"requests": 5}, "/requests"),
        ({"weight": -1.0}, "/weight"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_a_pointer(admin, tenant, change, pointer):
    problem = assert_problem(
        admin.patch(f"/v1/admin/tenants/{tenant['id']}", json=change), 422, "invalid-request"
    )

    assert problem["errors"][0]["pointer"] == pointer
    assert admin.get(f"/v1/admin/tenants/{tenant['id']}").json() == tenant


def test_names_and_keys_that_cannot_be_are_refused(admin, tenant):
    assert_problem(
        admin.post("/v1/admin/tenants", json={"name": tenant["name"]}), 409, "tenant-exists"
    )
    assert_problem(
        admin.post("/v1/admin/tenants", json={"name": "no spaces"}), 422, "invalid-request"
    )
    keys = f"/v1/admin/tenants/{tenant['id']}/keys"
    for body in (
        {"scopes": ["root"]},
        {"scopes": []},
        {"expires_at": "2001-01-01T00:00:00Z"},
        {"expires_at": "soon"},
    ):
        assert_problem(admin.post(keys, json=body), 422, "invalid-request")
    assert_problem(admin.get(f"/v1/admin/tenants/{uuid.uuid4()}"), 404, "tenant-not-found")
    assert_problem(
        admin.get(f"/v1/admin/tenants/{tenant['id']}/usage", params={"from": "yesterday"}),
        422,
        "invalid-query",
    )


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PATCH", "", {"weight": 2.0}),
        ("GET", "/keys", None),
        ("POST", "/keys", {"name": "web"}),
        ("GET", "/usage", None),
    ],
)
def test_a_tenant_that_is_not_there_is_not_found_on_any_route(admin, method, path, body):
    answer = admin.request(method, f"/v1/admin/tenants/{uuid.uuid4()}{path}", json=body)

    assert_problem(answer, 404, "tenant-not-found")


def test_an_operator_whose_tenant_is_at_its_limits_can_still_raise_them(
    stack, stack_database, nobody
):
    with transaction(stack_database) as session:
        tenant = tenants.create(
            session, name=f"app-operators-{uuid.uuid4().hex[:8]}", actor="tests"
        )
        own = {
            "tenant_id": tenant.id,
            "name": "operator",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["admin", "read"], **own)
        tenants.limit(session, tenant, changes={"requests_per_minute": 1}, actor="tests")
    assert [nobody.get("/v1/key", headers=bearer(key)).status_code for _ in range(2)] == [200, 429]

    answer = nobody.patch(
        f"/v1/admin/tenants/{tenant.id}", json={"requests_per_minute": None}, headers=bearer(key)
    )

    assert (answer.status_code, answer.json()["limits"]["requests_per_minute"]) == (200, None)


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a\x00b"},
        {"name": "a\nb"},
        {"name": "x", "expires_at": "9999-12-31T23:59:59-14:00"},
        {"name": "x", "expires_at": "0001-01-01T00:00:00+14:00"},
    ],
)
def test_a_key_that_no_calendar_or_list_could_show_is_refused(admin, tenant, body):
    assert_problem(
        admin.post(f"/v1/admin/tenants/{tenant['id']}/keys", json=body), 422, "invalid-request"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 1e-300},
        {"weight": 1e7},
        {"megapixel_steps_per_minute": 1e-300, "burst_megapixel_steps": 1},
    ],
)
def test_a_limit_that_arithmetic_cannot_hold_is_refused(admin, tenant, change):
    assert_problem(
        admin.patch(f"/v1/admin/tenants/{tenant['id']}", json=change), 422, "invalid-request"
    )


def test_a_limit_may_be_written_as_any_number_that_is_whole(admin, tenant):
    limits = {"requests_per_minute": 60.0, "max_stored_bytes": 5e9}

    changed = admin.patch(f"/v1/admin/tenants/{tenant['id']}", json=limits).json()

    assert (changed["limits"]["requests_per_minute"], changed["limits"]["max_stored_bytes"]) == (
        60,
        5_000_000_000,
    )
