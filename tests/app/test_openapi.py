"""The served OpenAPI document: complete, valid, and true of what the gateway answers; and the page that shows it."""

import json
import re
import shutil
import subprocess
import uuid

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from app.spec.document import paths_of
from app.spec.operations import OPERATIONS
from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer


@pytest.fixture(scope="module")
def spec(nobody) -> dict:
    return nobody.get("/openapi.json").json()


@pytest.fixture(scope="module")
def everything(stack, stack_database):
    """HTTP as a tenant whose key has every scope."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        own = {"tenant_id": tenant.id, "name": "all", "pepper": stack.env["API_KEY_PEPPER"], "actor": "tests"}
        _, key = api_keys.issue(session, scopes=["admin", "generate", "read"], **own)
    with httpx.Client(base_url=stack.env["DARKROOM_URL"], headers=bearer(key), timeout=90, trust_env=False) as client:
        client.tenant_id = str(tenant.id)
        yield client


def assert_fits(spec, name, instance) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
    errors = [f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(schema).iter_errors(instance)]
    assert errors == []


def test_it_is_a_valid_document_of_openapi_3_1(spec):
    validate(spec)
    assert spec["openapi"] == "3.1.0"


def test_every_route_is_in_it_and_nothing_else(gateway_with):
    assert set(paths_of(gateway_with().application)) == set(OPERATIONS)


def test_every_operation_says_what_it_does_in_a_few_words_of_its_own_and_at_length(spec):
    operations = [operation for methods in spec["paths"].values() for operation in methods.values()]
    summaries = [operation["summary"] for operation in operations]

    assert len(set(summaries)) == len(summaries)
    assert [summary for summary in summaries if not re.fullmatch(r"[A-Z][A-Za-z' ()]{5,39}", summary)] == []
    assert [operation["operationId"] for operation in operations if len(operation["description"]) < 20] == []


def test_it_is_served_to_anybody_and_cheaply(nobody):
    first = nobody.get("/openapi.json")

    assert nobody.get("/openapi.json", headers={"If-None-Match": first.headers["ETag"]}).status_code == 304


def test_every_example_runs(spec, everything):
    ids = {"tenant_id": everything.tenant_id}
    ids["endpoint_id"] = everything.post("/v1/webhooks", json={"url": "https://example.com/"}).json()["id"]
    ids["key_id"] = everything.post(f"/v1/admin/tenants/{ids['tenant_id']}/keys", json={}).json()["id"]
    ran = []
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            for content in operation.get("requestBody", {"content": {}})["content"].values():
                example = content.get("example") or content["schema"].get("example")
                if example is None:
                    continue
                body = {**example, **({"name": f"app-{uuid.uuid4().hex[:8]}"} if path == "/v1/admin/tenants" else {})}
                answer = everything.request(method, path.format(**ids), json=body)
                good = next(status for status in operation["responses"] if status[0] == "2")
                assert str(answer.status_code) == good, (path, answer.text)
                schema = operation["responses"][good]["content"]["application/json"]["schema"]
                assert_fits(spec, schema["$ref"].rpartition("/")[2], answer.json())
                ran.append(path)
    assert {"/v1/jobs", "/v1/jobs:batch", "/v1/estimate", "/v1/webhooks", "/v1/images/generations", "/v1/images/edits"} <= set(ran)
    assert "/v1/admin/tenants" in ran


def test_real_answers_are_as_described(spec, api, finished_job, canceled_job):
    own = finished_job["urls"]["self"]
    file = api.post("/v1/files", content=api.get(f"{own}/images/0", follow_redirects=True).content, headers={"Content-Type": "image/png"})
    answers = {
        "Job": [finished_job, canceled_job, api.get(own).json()],
        "JobStatus": [api.get(f"{own}/status").json()],
        "JobPage": [api.get("/v1/jobs").json()],
        "File": [file.json()],
        "FilePage": [api.get("/v1/files").json()],
        "WebhookPage": [api.get("/v1/webhooks").json()],
        "Models": [api.get("/v1/models").json()],
        "Model": [api.get("/v1/models/pocket").json()],
        "Tiers": [api.get("/v1/tiers").json()],
        "OwnKey": [api.get("/v1/key").json()],
        "Usage": [api.get("/v1/usage").json()],
        "Problem": [api.get("/v1/jobs?limit=0").json(), api.get(f"/v1/jobs/{uuid.uuid4()}").json(), api.post("/v1/jobs", json={}).json()],
    }
    for name, instances in answers.items():
        for instance in instances:
            assert_fits(spec, name, instance)


def test_the_page_loads_nothing_from_elsewhere(nobody):
    page = nobody.get("/docs")

    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text) == ["/static/docs/rapidoc-min.js"]
    assert "http" not in page.text.replace("http-equiv", "")
    script = nobody.get("/static/docs/rapidoc-min.js")
    assert script.headers["Content-Type"].startswith("text/javascript")


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_shows_the_operations(stack, tmp_path):
    """In a real browser; what it draws is in shadow roots, so we look at the picture's size and at the dumped text."""
    picture = tmp_path / "docs.png"
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--virtual-time-budget=8000"]
    command += ["--window-size=1280,900", f"--screenshot={picture}", f"{stack.env['DARKROOM_URL']}/docs"]

    subprocess.run(command, check=True, capture_output=True, timeout=120)

    assert picture.stat().st_size > 30_000, json.dumps(picture.stat().st_size)
