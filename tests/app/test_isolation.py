"""Every route of the gateway, walked.

Nobody gets in without a key, with too few scopes, or to what is another tenant's.
"""

import re
import uuid

import httpx
import pytest

from app import BLUEPRINTS
from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer

OPEN = {
    "/v1",
    "/healthz",
    "/readyz",
    "/problems/<slug>",
    "/openapi.json",
    "/docs",
    "/docs/<path:name>",
    "/static/<path:filename>",
}
# its signature is the key: tests/app/test_image_links.py
OPEN |= {"/links/images/<uuid:artifact_id>"}
BODIES = {  # a body that would do, where one is needed before the id is looked at
    "/v1/admin/tenants/<uuid:tenant_id>": {"weight": 1.0},
    "/v1/admin/tenants/<uuid:tenant_id>/keys": {},
    "/v1/admin/keys/<uuid:key_id>/rotate": {},
    "/v1/webhooks/<uuid:endpoint_id>": {},
}


def every_route(app) -> list[tuple[str, str]]:
    methods = [
        (rule.rule, method)
        for rule in app.url_map.iter_rules()
        for method in sorted(rule.methods - {"OPTIONS", "HEAD"})
    ]
    return [(rule, method) for rule, method in methods if rule not in OPEN]


@pytest.fixture(scope="module")
def app(gateway_with):
    return gateway_with().application


@pytest.fixture(scope="module")
def owned(api, finished_job) -> dict[str, str]:
    """Ids of things that belong to the tenant of `api`, by the names that routes have for them."""
    picture = httpx.get(
        f"{api.base_url}{finished_job['images'][0]['url']}",
        headers=api.headers,
        follow_redirects=True,
        trust_env=False,
    )
    file = api.post(
        "/v1/files", content=picture.content, headers={"Content-Type": "image/png"}
    ).json()
    endpoint = api.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    delivery = api.post(f"/v1/webhooks/{endpoint['id']}/test").json()
    ids = {
        "job_id": finished_job["id"],
        "file_id": file["id"],
        "endpoint_id": endpoint["id"],
        "delivery_id": delivery["id"],
    }
    yield ids
    api.delete(f"/v1/webhooks/{endpoint['id']}")


def filled(rule: str, ids: dict[str, str]) -> str:
    given = {"index": "0", "name": "pocket", **ids}
    return re.sub(
        r"<(?:\w+:)?(\w+)>", lambda found: given.get(found[1], str(uuid.UUID(int=7))), rule
    )


def test_without_a_key_every_route_is_closed(app, nobody, owned):
    answers = {
        (method, rule): nobody.request(method, filled(rule, owned)).status_code
        for rule, method in every_route(app)
    }

    assert {route: status for route, status in answers.items() if status != 401} == {}


def test_a_key_of_the_wrong_scope_opens_none(app, nobody, owned, stack, stack_database):
    keys = {}
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        for scope in ("read", "generate"):
            own = {
                "tenant_id": tenant.id,
                "name": scope,
                "pepper": stack.env["API_KEY_PEPPER"],
                "actor": "tests",
            }
            keys[scope] = api_keys.issue(session, scopes=[scope], **own)[1]

    def status(rule, method):
        wrong = keys["generate" if method == "GET" else "read"]
        return nobody.request(method, filled(rule, owned), headers=bearer(wrong)).status_code

    # changes nothing, and whoever generates must know what it says
    either = ("/v1/estimate", "POST")
    answers = {
        (method, rule): status(rule, method)
        for rule, method in every_route(app)
        if (rule, method) != either
    }
    assert {route: status for route, status in answers.items() if status != 403} == {}


def test_a_key_that_reads_and_generates_is_no_operator_s(app, new_tenant):
    customer = new_tenant()
    key = customer.get("/v1/key").json()
    assert key["scopes"] == ["generate", "read"]
    routes = [(rule, method) for rule, method in every_route(app) if rule.startswith("/v1/admin/")]
    assert len(routes) >= 9

    answers = {}
    for rule, method in routes:
        own = filled(rule, {"tenant_id": key["tenant_id"], "key_id": key["id"]})
        answers[method, rule] = customer.request(
            method, own, json=BODIES.get(rule) if method in ("POST", "PATCH") else None
        ).status_code

    assert {route: status for route, status in answers.items() if status != 403} == {}
    assert customer.get("/v1/key").json() == key  # and its own key and limits are what they were


def test_another_tenant_s_ids_are_not_there_on_any_route(app, stranger, api, owned):
    with_ids = [
        (rule, method)
        for rule, method in every_route(app)
        if "<uuid:" in rule and not rule.startswith("/v1/admin")
    ]
    assert len(with_ids) >= 17

    answers = {}
    for rule, method in with_ids:
        answer = stranger.request(
            method,
            filled(rule, owned),
            json=BODIES.get(rule) if method in ("POST", "PATCH") else None,
        )
        answers[method, rule] = answer.status_code

    assert {route: status for route, status in answers.items() if status != 404} == {}
    assert api.get(f"/v1/jobs/{owned['job_id']}").status_code == 200  # and nothing was done to them
    assert api.get(f"/v1/files/{owned['file_id']}").status_code == 200
    assert api.get(f"/v1/webhooks/{owned['endpoint_id']}").status_code == 200


def test_another_tenant_s_things_are_in_no_list_and_start_no_job(app, stranger, owned):
    lists = [
        rule
        for rule, method in every_route(app)
        if method == "GET" and "<" not in rule and not rule.startswith("/v1/admin")
    ]
    assert {"/v1/jobs", "/v1/files", "/v1/webhooks"} <= set(lists)

    for rule in lists:
        shown = stranger.get(rule).text
        assert not any(own in shown for own in owned.values()), rule
    body = {"prompt": "a red circle", "init_image": owned["file_id"]}
    assert stranger.post("/v1/jobs", json=body).status_code == 422


def test_every_blueprint_but_the_public_ones_asks_for_a_key():
    assert {blueprint.name for blueprint in BLUEPRINTS if not blueprint.before_request_funcs} == {
        "about",
        "health",
        "openapi",
        "links",
    }
