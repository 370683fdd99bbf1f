"""Which audit events each route appends, and in whose name: the key's that asked."""

import base64
import re
import uuid
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import JOB_BODY, bearer
from tests.pictures import a_picture, encoded

ACCEPTED = ["job:request:accepted"]
PICTURE = encoded(a_picture(), "PNG")

# By route: what one call of it appends, as `_call_every_route` calls it.
EVENTS = {
    "POST /v1/estimate": [],
    "POST /v1/jobs": ACCEPTED,
    "POST /v1/jobs:batch": ACCEPTED * 2,
    "POST /v1/jobs/{}/replay": ACCEPTED,
    "POST /v1/jobs/{}/cancel": ["job:state:canceled"],
    "DELETE /v1/jobs/{}": ["job:content:erased"],
    "POST /v1/files": ["file:content:stored"],
    "DELETE /v1/files/{}": ["file:content:erased"],
    "POST /v1/images/generations": ACCEPTED,
    "POST /v1/images/edits": ["file:content:stored", *ACCEPTED],
    "POST /v1/images/variations": ACCEPTED,  # of the picture that is there by now
    "POST /v1/webhooks": ["webhook:endpoint:created"],
    "PATCH /v1/webhooks/{}": ["webhook:endpoint:changed"],
    "POST /v1/webhooks/{}/rotate": ["webhook:secret:rotated"],
    "POST /v1/webhooks/{}/test": [],
    "POST /v1/webhooks/deliveries/{}/redeliver": ["webhook:delivery:redelivered"],
    "DELETE /v1/webhooks/{}": ["webhook:endpoint:deleted"],
    "POST /v1/admin/tenants": ["tenant:record:created"],
    "PATCH /v1/admin/tenants/{}": ["tenant:weight:changed", "tenant:limits:changed"],
    "POST /v1/admin/tenants/{}/keys": ["api-key:secret:issued"],
    "POST /v1/admin/keys/{}/rotate": ["api-key:secret:issued", "api-key:secret:rotated"],
    "DELETE /v1/admin/keys/{}": ["api-key:secret:revoked"],
}


class Calls:
    """A key's calls, and by route the events that each of them appended: (event, tenant)."""

    def __init__(self, http, database, key: str, tenant: str) -> None:
        self.http, self.database, self.tenant = http, database, tenant
        self.headers, self.actor = bearer(key), f"key:{key.split('_')[1]}"
        self.appended: dict[str, list[tuple[str, str]]] = {}

    def __call__(self, method: str, path: str, *, status: int, **options: Any) -> Any:
        with transaction(self.database) as session:
            before = session.scalar(text("SELECT clock_timestamp()"))
        answer = self.http.open(path, method=method, headers=self.headers, **options)
        assert answer.status_code == status, answer.text
        query = """SELECT event, chain FROM audit_log WHERE at > :before AND actor = :actor
                   ORDER BY chain, seq"""
        told = {"before": before, "actor": self.actor}
        with transaction(self.database) as session:
            rows = session.execute(text(query), told).all()
        self.appended[f"{method} {self._rule(method, path)}"] = [tuple(row) for row in rows]
        return answer.json

    def _rule(self, method: str, path: str) -> str:
        adapter = self.http.application.url_map.bind("here")
        rule, _ = adapter.match(path, method=method, return_rule=True)
        return _plain(rule.rule)


def _plain(rule: str) -> str:
    return re.sub(r"<[^>]+>", "{}", rule)


def _changing_routes(app) -> set[str]:
    reading = {"GET", "HEAD", "OPTIONS"}
    rules = [(method, rule) for rule in app.url_map.iter_rules() for method in rule.methods]
    return {f"{method} {_plain(rule.rule)}" for method, rule in rules if method not in reading}


@pytest.fixture
def calls(a_house, stack, stack_database):
    """Open the calls of a new tenant's key with these scopes; nobody renders what they ask for."""
    house = a_house().with_workers()
    impatient = house.parts.settings.model_copy(update={"images_wait_s": 0.05})
    house.http.application.extensions["darkroom"] = replace(house.parts, settings=impatient)

    def calls(*scopes: str) -> Calls:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            own = {"tenant_id": tenant.id, "name": "tests", "scopes": scopes, "actor": "tests"}
            _, key = api_keys.issue(session, **own, pepper=stack.env["API_KEY_PEPPER"])
        return Calls(house.http, stack_database, key, tenant.name)

    return calls


def _call_tenants_routes(call: Calls) -> None:
    job_body = {"prompt": JOB_BODY["prompt"], "tier": "batch"}
    call("POST", "/v1/estimate", json=job_body, status=200)
    job = call("POST", "/v1/jobs", json=job_body, status=202)
    call("POST", "/v1/jobs:batch", json={"jobs": [job_body, {}, job_body]}, status=200)
    call("POST", job["urls"]["replay"], status=202)
    call("POST", job["urls"]["cancel"], status=200)
    call("DELETE", job["urls"]["self"], status=204)
    file = call("POST", "/v1/files", data=PICTURE, content_type="image/png", status=201)
    call("DELETE", f"/v1/files/{file['id']}", status=204)
    call("POST", "/v1/images/generations", json=job_body, status=504)  # nobody renders here
    picture = {"image": [_data_url(PICTURE)]}
    call("POST", "/v1/images/edits", json=job_body | picture, status=504)
    call("POST", "/v1/images/variations", json={"tier": "batch", **picture}, status=504)
    endpoint = call("POST", "/v1/webhooks", json={"url": "https://example.com/"}, status=201)
    own = endpoint["urls"]["self"]
    call("PATCH", own, json={"enabled": False}, status=200)
    call("POST", f"{own}/rotate", status=200)
    delivery = call("POST", f"{own}/test", status=202)
    call("POST", f"/v1/webhooks/deliveries/{delivery['id']}/redeliver", status=202)
    call("DELETE", own, status=204)


def _call_operators_routes(call: Calls) -> str:
    """The name of the tenant that they are about."""
    name = f"app-{uuid.uuid4().hex[:8]}"
    tenant = call("POST", "/v1/admin/tenants", json={"name": name}, status=201)
    own = f"/v1/admin/tenants/{tenant['id']}"
    call("PATCH", own, json={"weight": 2.0, "url_inputs": True}, status=200)
    key = call("POST", f"{own}/keys", json={}, status=201)
    call("POST", f"/v1/admin/keys/{key['id']}/rotate", status=201)
    call("DELETE", f"/v1/admin/keys/{key['id']}", status=204)
    return name


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def test_every_route_that_changes_something_appends_its_audit_events_in_its_key_s_name(calls):
    tenant, operator = calls("generate", "read"), calls("admin")

    _call_tenants_routes(tenant)
    name = _call_operators_routes(operator)

    assert _changing_routes(tenant.http.application) == set(EVENTS)
    for appended, chain in ((tenant.appended, tenant.tenant), (operator.appended, name)):
        for route, told in appended.items():
            assert told == [(event, chain) for event in EVENTS[route]], route
    assert set(tenant.appended) | set(operator.appended) == set(EVENTS)
