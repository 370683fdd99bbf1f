"""The served OpenAPI document: complete, valid, and true of what the gateway answers; and the page
that shows it.
"""

import ast
import re
import shutil
import uuid
from collections import defaultdict

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from playwright.sync_api import sync_playwright

from app import problems
from app.http.idempotency import MAX_KEY_CHARS, read_key
from app.openai.body import GENERATION, KNOWN_FIELDS, read
from app.spec.document import paths_of
from app.spec.job_fields import _bounds
from app.spec.operations import OPERATIONS
from models import api_keys, tenants
from models.database import transaction
from policy.params import Param, PassThrough
from policy.version import VERSION
from policy.webhooks import EVENTS, TEST_EVENT
from settings import REPO
from tests.app.conftest import bearer
from tests.app.witness import Witness
from tests.builders import a_fleet

CHROMIUM = shutil.which("chromium")
DOT = "data:image/webp;base64,UklGRh4AAABXRUJQVlA4TBEAAAAvAUAAAAdQjyLXo/+BiOh/AAA="


@pytest.fixture(scope="module")
def spec(nobody) -> dict:
    return nobody.get("/openapi.json").json()


@pytest.fixture(scope="module")
def fleet():
    return a_fleet()


@pytest.fixture(scope="module")
def everything(stack, stack_database):
    """HTTP as a tenant whose key has every scope."""
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        own = {
            "tenant_id": tenant.id,
            "name": "all",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["admin", "generate", "read"], **own)
    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"],
        headers=bearer(key),
        timeout=90,
        trust_env=False,
    ) as client:
        client.tenant_id = str(tenant.id)
        yield client


def test_it_is_a_valid_document_of_openapi_3_1(spec):
    validate(spec)
    assert spec["openapi"] == "3.1.0"
    assert spec["info"]["version"] == VERSION


def test_every_route_is_in_it_and_nothing_else(gateway_with):
    assert set(paths_of(gateway_with().application)) == set(OPERATIONS)


def test_every_operation_says_what_it_does_in_a_few_words_of_its_own_and_at_length(spec):
    operations = [operation for methods in spec["paths"].values() for operation in methods.values()]
    summaries = [operation["summary"] for operation in operations]

    assert len(set(summaries)) == len(summaries)
    assert [
        summary for summary in summaries if not re.fullmatch(r"[A-Z][A-Za-z' ()]{5,39}", summary)
    ] == []
    assert [
        operation["operationId"] for operation in operations if len(operation["description"]) < 20
    ] == []


def test_it_is_served_to_anybody_and_cheaply(nobody):
    first = nobody.get("/openapi.json")

    assert (
        nobody.get("/openapi.json", headers={"If-None-Match": first.headers["ETag"]}).status_code
        == 304
    )


def test_another_document_has_another_tag_and_says_what_this_gateway_does(gateway_with):
    answers = [gateway_with(max_wait_s=wait_s).get("/openapi.json") for wait_s in (7, 8)]

    assert answers[0].headers["ETag"] != answers[1].headers["ETag"]
    told = [answer.json["paths"]["/v1/jobs"]["post"]["parameters"][1] for answer in answers]
    assert [each["name"] for each in told] == ["Prefer", "Prefer"]
    assert ["at most 7" in told[0]["description"], "8" in told[1]["description"]] == [
        True,
        True,
    ]


def test_every_example_runs(spec, everything):
    ids = {"tenant_id": everything.tenant_id}
    ids["endpoint_id"] = everything.post(
        "/v1/webhooks", json={"url": "https://example.com/"}
    ).json()["id"]
    ids["key_id"] = everything.post(f"/v1/admin/tenants/{ids['tenant_id']}/keys", json={}).json()[
        "id"
    ]
    ran = []
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            for content in operation.get("requestBody", {"content": {}})["content"].values():
                example = content.get("example") or content["schema"].get("example")
                if example is None:
                    continue
                body = {
                    **example,
                    **(
                        {"name": f"app-{uuid.uuid4().hex[:8]}"}
                        if path == "/v1/admin/tenants"
                        else {}
                    ),
                }
                answer = everything.request(method, path.format(**ids), json=body)
                good = next(status for status in operation["responses"] if status[0] == "2")
                assert str(answer.status_code) == good, (path, answer.text)
                Witness(spec).look(answer)
                ran.append(path)
    assert {
        "/v1/jobs",
        "/v1/jobs:batch",
        "/v1/estimate",
        "/v1/webhooks",
        "/v1/images/generations",
        "/v1/images/edits",
    } <= set(ran)
    assert {"/v1/images/variations", "/v1/admin/tenants"} <= set(ran)


def members_of(spec) -> dict[str, dict]:
    """Every member of every component, by `Component.member`."""
    schemas = spec["components"]["schemas"]
    return {
        f"{name}.{member}": says
        for name, schema in schemas.items()
        for member, says in schema.get("properties", {}).items()
    }


def parameters_of(spec) -> dict[tuple[str, str, str], dict]:
    """Every parameter, by (method, path, name)."""
    operations = {
        (method, path): described
        for path, methods in spec["paths"].items()
        for method, described in methods.items()
    }
    return {
        (*route, each["name"]): each
        for route, described in operations.items()
        for each in described["parameters"]
    }


def test_every_member_and_every_parameter_is_described(spec):
    plain = {"id", "object"}
    members = [
        name
        for name, says in members_of(spec).items()
        if "$ref" not in says and not says.get("description")
    ]
    parameters = [
        name
        for name, says in parameters_of(spec).items()
        if says["in"] != "path" and not says.get("description")
    ]

    assert [name for name in members if name.partition(".")[2] not in plain] == []
    assert parameters == []


def test_components_are_named_as_programs_name_their_classes(spec):
    assert [
        name
        for name in spec["components"]["schemas"]
        if not re.fullmatch(r"[A-Z][A-Za-z0-9]+", name)
    ] == []


def docstrings() -> set[str]:
    """The docstrings of everything in app/, as prose."""
    found = set()
    for path in (REPO / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                found.add(" ".join(text.split()))
    return found


def texts(value) -> set[str]:
    """Every string in a document."""
    if isinstance(value, dict):
        return {text for each in value.values() for text in texts(each)}
    if isinstance(value, list):
        return {text for each in value for text in texts(each)}
    return {value} if isinstance(value, str) else set()


def test_no_docstring_is_served(spec, nobody):
    known = docstrings()
    explained = [
        nobody.get(f"/problems/{kind.slug}").json()
        for kind in problems.Problem.__subclasses__()
        if not kind.slug.startswith("http-")
    ]

    assert len(explained) > 40
    assert [about for about in explained if len(about["about"]) < 15] == []
    assert (texts(spec) | texts(explained)) & known == set()
    assert "title" not in {
        word for schema in spec["components"]["schemas"].values() for word in schema
    }


def test_every_member_that_a_problem_may_have_is_in_the_document(spec):
    """Wherever in app/ a problem is made: what it is given by name."""
    kinds = {kind.__name__ for kind in problems.Problem.__subclasses__()} | {"problem"}
    given = set()
    for path in (REPO / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in kinds
            ):
                given |= {keyword.arg for keyword in node.keywords if keyword.arg} - {
                    "retry_after_s",
                }

    facts = set(spec["components"]["schemas"]["Problem"]["properties"]) - {
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "error",
    }
    assert {"errors", "accepted", "parameter", "scopes"} <= given
    assert given <= facts
    assert facts - given == {"errors_left_out", "reason"}


def test_fields_of_an_image_call_are_those_that_it_reads(spec):
    schemas = spec["components"]["schemas"]
    known, pictures = KNOWN_FIELDS, {"image", "images", "mask"}

    assert set(schemas["GenerationBody"]["properties"]) == known - {"strength"}
    assert set(schemas["EditBody"]["properties"]) == known | pictures
    assert set(schemas["EditForm"]["properties"]) == known | pictures - {"images"}
    assert set(schemas["VariationBody"]["properties"]) == known | pictures - {"mask"}
    assert set(schemas["VariationForm"]["properties"]) == known | {"image"}


def bounds(spec, name) -> dict:
    """What the document says of a member that may be null, or not."""
    says = members_of(spec)[name]
    return says | next((each for each in says.get("anyOf", ()) if each.get("type") != "null"), {})


def so_many(entries) -> dict[str, str]:
    return dict.fromkeys(map(str, range(entries)), "")


@pytest.mark.parametrize(
    ("field", "bound", "good", "bad"),
    [
        ("steps", "maximum", lambda most: most, lambda most: most + 1),
        ("n", "maximum", lambda most: most, lambda most: most + 1),
        ("guidance", "maximum", lambda most: most, lambda most: most + 0.1),
        ("seed", "maximum", lambda most: most, lambda most: most + 1),
        ("seed", "minimum", lambda least: least, lambda least: least - 1),
        ("prompt", "maxLength", lambda most: "a" * most, lambda most: "a" * (most + 1)),
        ("negative_prompt", "maxLength", lambda most: "a" * most, lambda most: "a" * (most + 1)),
        ("metadata", "maxProperties", so_many, lambda most: so_many(most + 1)),
        (
            "metadata",
            "propertyNames",
            lambda key: {"k" * key["maxLength"]: ""},
            lambda key: {"k" * (key["maxLength"] + 1): ""},
        ),
        (
            "metadata",
            "propertyNames",
            lambda key: {"k" * key["minLength"]: ""},
            lambda key: {"k" * (key["minLength"] - 1): ""},
        ),
        (
            "metadata",
            "additionalProperties",
            lambda text: {"k": "v" * text["maxLength"]},
            lambda text: {"k": "v" * (text["maxLength"] + 1)},
        ),
        ("start_deadline_s", "maximum", lambda most: most, lambda most: most + 1),
    ],
)
def test_a_job_may_say_what_the_document_allows_and_not_more(spec, api, field, bound, good, bad):
    most = bounds(spec, f"JobBody.{field}")[bound]
    answers = [
        api.post(
            "/v1/estimate",
            json={"prompt": "a red circle", "tier": "batch", field: make(most)},
        )
        for make in (good, bad)
    ]

    assert [answer.status_code for answer in answers] == [200, 422], [
        answer.text for answer in answers
    ]


def test_a_job_may_have_every_value_that_the_document_lists(spec, api, new_key):
    headers = bearer(new_key(scopes=["generate", "versions"]))
    listed = {
        field: bounds(spec, f"JobBody.{field}")["enum"]
        for field in ("model", "tier", "size", "sampler", "output_format")
    }

    for field, values in listed.items():
        for value in values:
            job_body = {"prompt": "a red circle", field: value}
            answer = api.post("/v1/estimate", json=job_body, headers=headers)
            assert answer.status_code == 200, answer.text
        assert (
            api.post("/v1/estimate", json={"prompt": "a red circle", field: "no-such"}).status_code
            == 422
        )


@pytest.mark.parametrize(
    ("rule", "keywords"),
    [
        (PassThrough(), {}),
        (PassThrough(low=0), {"minimum": 0}),
        (PassThrough(high=9), {"maximum": 9}),
        (PassThrough(choices=("png", "webp")), {"enum": ["png", "webp"]}),
        (
            PassThrough(choices=("png",), low=0, high=9),
            {"enum": ["png"], "minimum": 0, "maximum": 9},
        ),
    ],
)
def test_a_document_says_every_part_of_a_parameter_s_rule(rule, keywords):
    assert _bounds(Param("vigour", "How lively it is.", pass_through=rule)) == keywords


def test_a_prompt_may_be_empty_where_a_picture_says_it_all(spec, api):
    assert "minLength" not in bounds(spec, "JobBody.prompt")
    assert api.post("/v1/estimate", json={"prompt": "", "init_image": DOT}).status_code == 200


def test_a_page_and_a_batch_may_be_as_long_as_the_document_says(spec, api):
    pages = [each["schema"] for name, each in parameters_of(spec).items() if name[2] == "limit"]
    longest = bounds(spec, "BatchBody.jobs")["maxItems"]

    assert {(page["minimum"], page["maximum"], page["default"]) for page in pages} == {(1, 100, 20)}
    assert [api.get("/v1/jobs", params={"limit": limit}).status_code for limit in (100, 101)] == [
        200,
        422,
    ]
    assert longest == 1000
    refused = [{"prompt": "", "tier": "batch"}] * longest
    assert api.post("/v1/jobs:batch", json={"jobs": refused}).json()["refused"] == longest
    assert api.post("/v1/jobs:batch", json={"jobs": [*refused, {}]}).status_code == 422


def test_a_limit_in_the_document_stays_as_clients_know_it(spec):
    """Public: a smaller one refuses what a program sends today."""
    metadata = bounds(spec, "JobBody.metadata")
    most = {
        name: bounds(spec, f"GenerationBody.{name}")["maximum"] for name in ("n", "partial_images")
    }
    key = parameters_of(spec)["post", "/v1/jobs", "Idempotency-Key"]["schema"]

    assert metadata["maxProperties"] == 16
    assert bounds(spec, "GenerationBody.metadata")["maxProperties"] == 16
    assert metadata["propertyNames"] == {"minLength": 1, "maxLength": 64}
    assert metadata["additionalProperties"]["maxLength"] == 512
    assert bounds(spec, "JobBody.seed")["maximum"] == 9_007_199_254_740_990
    assert bounds(spec, "EndpointBody.description")["maxLength"] == 256
    assert most == {"n": 10, "partial_images": 3}
    assert bounds(spec, "GenerationBody.user")["maxLength"] == 512
    assert key["maxLength"] == 512
    assert "at most 367 days" in spec["paths"]["/v1/usage"]["get"]["description"]


PICTURES = ["/v1/jobs/{job_id}/images/{index}", "/v1/files/{file_id}/content"]


@pytest.mark.parametrize("path", PICTURES)
def test_a_picture_s_answers_are_all_in_the_document(spec, path):
    described = spec["paths"][path]["get"]["responses"]

    assert set(described) == {"200", "206", "302", "304", "4XX", "5XX"}
    for status in ("200", "206"):
        assert set(described[status]["content"]) == {"image/png", "image/webp", "image/jpeg"}


def test_an_operation_that_answers_304_is_so_described(spec):
    cheap = {
        path
        for path, item in spec["paths"].items()
        if "304" in item.get("get", {"responses": ()})["responses"]
    }

    assert cheap == {"/v1/jobs/{job_id}", "/v1/jobs/{job_id}/status", *PICTURES}


def test_every_operation_names_the_headers_and_the_query_that_it_reads(spec):
    by_name = defaultdict(set)
    for method, path, name in parameters_of(spec):
        by_name[name].add(f"{method} {path}")
    job, images = "/v1/jobs/{job_id}", "post /v1/images/"
    pictures = {f"get {path}" for path in PICTURES}
    lists = {
        "get /v1/admin/tenants",
        "get /v1/files",
        "get /v1/jobs",
        "get /v1/webhooks/{endpoint_id}/deliveries",
    }
    usage = {"get /v1/usage", "get /v1/admin/tenants/{tenant_id}/usage"}
    accepting = {"post /v1/jobs", f"post {job}/replay"}

    read = {
        name: where
        for name, where in by_name.items()
        if not name.endswith(("_id", "index", "slug"))
    }
    assert read == {
        "Idempotency-Key": accepting
        | {"post /v1/jobs:batch"}
        | {images + name for name in ("generations", "edits", "variations")},
        "Prefer": accepting | {f"get {job}"},
        "If-None-Match": pictures | {f"get {job}", f"get {job}/status"},
        "Range": pictures,
        "If-Range": pictures,
        "redirect": pictures,
        "Last-Event-ID": {f"get {job}/events"},
        "previews": {f"get {job}/events"},
        "limit": lists,
        "cursor": lists,
        "state": {"get /v1/jobs", "get /v1/webhooks/{endpoint_id}/deliveries"},
        "created_after": {"get /v1/jobs"},
        "created_before": {"get /v1/jobs"},
        "metadata": {"get /v1/jobs"},
        "from": usage,
        "to": usage,
        "name": {"get /v1/models/{name}"},
    }


def test_an_item_of_a_batch_need_not_say_what_the_defaults_say(spec):
    fields = spec["components"]["schemas"]["JobFields"]

    assert "required" not in fields
    assert fields["properties"] == spec["components"]["schemas"]["JobBody"]["properties"]
    assert members_of(spec)["BatchBody.jobs"]["items"] == {"$ref": "#/components/schemas/JobFields"}


@pytest.mark.parametrize(
    ("field", "bound", "value"),
    [
        ("n", "maximum", lambda most: most),
        ("partial_images", "maximum", lambda most: most),
        ("user", "maxLength", lambda most: "u" * most),
    ],
)
def test_an_image_call_may_say_what_the_document_allows_and_not_more(
    spec,
    fleet,
    field,
    bound,
    value,
):
    most = bounds(spec, f"GenerationBody.{field}")[bound]

    read(GENERATION, {"prompt": "a", field: value(most)}, fleet)
    with pytest.raises(problems.InvalidImageRequest):
        read(GENERATION, {"prompt": "a", field: value(most + 1)}, fleet)


@pytest.mark.parametrize(
    "field",
    ["quality", "output_format", "response_format", "moderation", "style", "input_fidelity"],
)
def test_an_image_call_may_have_every_value_that_the_document_lists(spec, fleet, field):
    for value in bounds(spec, f"GenerationBody.{field}")["enum"]:
        read(GENERATION, {"prompt": "a", field: value}, fleet)
    with pytest.raises(problems.Problem):
        read(GENERATION, {"prompt": "a", field: "no-such"}, fleet)


def test_the_document_asks_of_headers_no_more_than_the_gateway(spec, api):
    parameters = parameters_of(spec)
    told = {name[:2] for name in parameters if name[2] == "Prefer"}
    assert told == {
        ("post", "/v1/jobs"),
        ("post", "/v1/jobs/{job_id}/replay"),
        ("get", "/v1/jobs/{job_id}"),
    }
    prefer = parameters["post", "/v1/jobs", "Prefer"]
    assert "pattern" not in prefer["schema"]
    assert "60" in prefer["description"]

    key = parameters["post", "/v1/jobs", "Idempotency-Key"]["schema"]
    validator = Draft202012Validator(key)
    longest = "".join(chr(33 + number % 94) for number in range(MAX_KEY_CHARS)).translate(
        {ord('"'): '\\"', ord("\\"): "\\\\"},
    )
    for text in ("k", "order 7", f'"{longest}"', '"' + '\\"' * MAX_KEY_CHARS + '"'):
        assert validator.is_valid(text), text
    assert len(read_key(f'"{longest}"')) == MAX_KEY_CHARS


def test_the_last_event_id_may_be_all_that_the_gateway_takes(spec):
    schema = parameters_of(spec)["get", "/v1/jobs/{job_id}/events", "Last-Event-ID"]["schema"]
    judged = [
        Draft202012Validator(schema).is_valid(text)
        for text in ("", "7", "17-3", "x", "17-3-1", "1" * 16)
    ]

    assert judged == [True, True, True, False, False, False]


def test_jobs_are_found_by_metadata_as_the_document_says(spec, api):
    parameter = parameters_of(spec)["get", "/v1/jobs", "metadata"]
    validator = Draft202012Validator(parameter["schema"])

    assert (parameter["style"], parameter["explode"]) == ("form", True)
    assert [
        validator.is_valid(each)
        for each in ({"metadata.order": "7"}, {"order": "7"}, {"metadata.": "7"})
    ] == [True, False, False]
    assert [
        api.get("/v1/jobs", params=each).status_code
        for each in ({"metadata.order": "7"}, {"order": "7"}, {"metadata.": "7"})
    ] == [
        200,
        422,
        422,
    ]


def test_only_what_needs_no_key_is_said_to_need_none(spec, nobody):
    free = {
        path
        for path, methods in spec["paths"].items()
        for described in methods.values()
        if described.get("security") == []
    }

    assert free == {"/v1", "/healthz", "/readyz", "/problems/{slug}"}
    for path in free:
        assert nobody.get(path.format(slug="not-found")).status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
def test_the_gateway_tells_its_version_and_where_it_is_described(nobody, path):
    answer = nobody.get(path)

    assert answer.status_code == 200
    assert answer.json() == {
        "name": "Darkroom",
        "version": VERSION,
        "api_version": "v1",
        "urls": {"openapi": "/openapi.json", "docs": "/docs"},
    }
    for url in answer.json()["urls"].values():
        assert nobody.get(url).status_code == 200


def test_webhooks_are_described_with_what_signs_them(spec):
    assert set(spec["webhooks"]) == {*EVENTS, TEST_EVENT}
    for described in spec["webhooks"].values():
        names = {each["name"] for each in described["post"]["parameters"]}
        assert names == {"webhook-id", "webhook-timestamp", "webhook-signature"}


def test_the_page_loads_nothing_from_elsewhere(nobody):
    page = nobody.get("/docs")

    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text) == [
        "/static/docs/rapidoc-min.js",
    ]
    assert "http" not in page.text.replace("http-equiv", "")
    script = nobody.get("/static/docs/rapidoc-min.js")
    assert script.headers["Content-Type"].startswith("text/javascript")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_every_operation_in_a_browser(stack, spec):
    troubles: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage"],
            timeout=0,  # here and below: the machine may be busy
        )
        page = chromium.new_page()
        page.set_default_timeout(0)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else ())

        page.goto(f"{stack.env['DARKROOM_URL']}/docs")
        page.get_by_text("/v1/estimate").first.wait_for()

        shown = page.locator("rapi-doc").evaluate("page => page.shadowRoot.textContent")
        chromium.close()
    assert [path for path in spec["paths"] if path not in shown] == []
    assert troubles == []


def test_members_that_an_answer_always_has_are_required_and_others_are_not(spec):
    required = {
        name: set(schema.get("required", ()))
        for name, schema in spec["components"]["schemas"].items()
    }

    assert required["RefusedItem"] == {"type", "title", "status", "detail"}
    assert required["JobWarning"] == {"code", "field", "detail"}
    assert required["Job"] == set(spec["components"]["schemas"]["Job"]["properties"])
    assert required["JobBody"] == {"prompt"}
