"""What a body may cost: bounded before anything looks at its fields, and what is answered of it is
bounded, too.
"""

import io
import json
import uuid

import pytest

from app.http.body import MAX_ENTRIES, MAX_ERRORS, MAX_MEMBERS, MAX_VALUES, check_bounds
from app.problems import InvalidImageRequest, MalformedBody
from app.schemas.bodies import JobBody
from policy.text import is_human
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.pictures import a_picture, png

JSON = {"Content-Type": "application/json"}
BATCH = "/v1/jobs:batch"
MOST_TOLD = 20_000  # bytes of an answer to one body; a problem with 20 errors has some 8,000


def many(count: int, value="0") -> str:
    return "{" + ",".join(f'"{number:x}":{value}' for number in range(count)) + "}"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(many(100_000), id="unknown fields"),
        pytest.param(
            '{"prompt": "x", "metadata": ' + many(100_000) + "}", id="entries of metadata"
        ),
        pytest.param('{"prompt": "x", "adapters": [' + "0," * 500_000 + "0]}", id="adapters"),
        pytest.param(
            '{"prompt": "x", "adapters": [' + ",".join([many(60)] * 200) + "]}",
            id="fields of adapters",
        ),
        pytest.param(
            '{"prompt": ' + "[" * 15 + "[]," * 300 + "[]" + "]" * 15 + "}", id="a list of lists"
        ),
        pytest.param(
            '{"prompt": "x", "steps": ' + many(60, '"' + "y" * 5000 + '"') + "}",
            id="long values of the wrong kind",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/estimate", "/v1/images/generations", BATCH])
def test_a_body_of_many_wrong_values_is_refused_in_few_words(api, path, body):
    answer = api.post(path, content=body, headers=JSON)

    assert answer.status_code in (400, 422, 413)
    assert answer.json()["detail"]
    assert len(answer.content) < MOST_TOLD


@pytest.mark.parametrize("path", ["/v1/webhooks", "/v1/admin/tenants"])
@pytest.mark.parametrize(
    "body", [many(20_000), '{"events": [' + "0," * 100_000 + '0], "url": "x"}']
)
def test_other_routes_have_the_same_bounds(api, path, body):
    answer = api.post(path, content=body, headers=JSON)

    assert answer.status_code in (403, 422)
    assert len(answer.content) < MOST_TOLD


@pytest.mark.parametrize("path", ["/v1/files", "/v1/images/edits"])
@pytest.mark.parametrize(("parts", "status"), [(64, 400), (65, 413)])
def test_a_form_has_up_to_64_parts(api, path, parts, status):
    fields = {f"field-{number}": ("", b"x") for number in range(parts - 1)}

    answer = api.post(path, files={"image": ("a.png", png()), **fields})

    assert answer.status_code == status, answer.json()


def test_a_field_of_a_form_may_be_as_large_as_a_body(gateway_with, new_key):
    gateway = gateway_with(max_body_bytes=1_000_000)

    for size_bytes, status in ((900_000, 400), (1_000_001, 413)):
        form = {"prompt": "x" * size_bytes, "image": (io.BytesIO(png()), "a.png")}
        answer = gateway.post("/v1/images/edits", data=form, headers=bearer(new_key()))
        assert answer.status_code == status, answer.json


@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/estimate", BATCH, "/v1/images/generations", "/v1/webhooks"]
)
def test_a_body_of_unknown_length_is_refused_for_its_size(api, path):
    """Cut off where it is too large, it would be no JSON."""
    pieces = iter([b'{"prompt": "', *[b"x" * 1_000_000] * 5, b'"}'])

    answer = api.post(path, content=pieces, headers=JSON)

    assert_problem(answer, 413, "body-too-large")


@pytest.mark.parametrize(
    ("setting", "routes"),
    [
        ("max_body_bytes", {"/v1/webhooks", "/v1/images/generations"}),
        ("max_job_body_bytes", {"/v1/jobs", "/v1/estimate", "/v1/images/edits"}),
        ("max_batch_bytes", {BATCH}),
        ("max_upload_bytes", {"/v1/files"}),
    ],
)
def test_a_body_is_held_to_the_limit_of_its_own_route(gateway_with, new_key, setting, routes):
    gateway, headers = gateway_with(**{setting: 2_000}), bearer(new_key())
    paths = [
        "/v1/jobs",
        "/v1/estimate",
        BATCH,
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/webhooks",
    ]
    body = json.dumps({"prompt": "x" * 3_000, "unknown": 1})

    answers = {path: gateway.post(path, data=body, headers=headers | JSON) for path in paths}
    picture = {"data": b"x" * 3_000, "content_type": "image/png"}
    answers["/v1/files"] = gateway.post("/v1/files", headers=headers, **picture)

    assert {path for path, answer in answers.items() if answer.status_code == 413} == routes
    assert {answer.status_code for answer in answers.values()} <= {400, 413, 422}


def test_errors_are_told_up_to_a_number_and_counted_beyond_it(api):
    answer = api.post(
        "/v1/jobs", json={"prompt": "x", **{f"field-{number}": 1 for number in range(50)}}
    )

    problem = assert_problem(answer, 422, "invalid-image-request")
    assert len(problem["errors"]) == MAX_ERRORS
    assert problem["errors_left_out"] == 50 - MAX_ERRORS


def test_a_member_that_is_too_large_is_pointed_at(api):
    problem = assert_problem(
        api.post(
            "/v1/jobs",
            json={"prompt": "x", "metadata": {str(n): "" for n in range(MAX_MEMBERS + 1)}},
        ),
        422,
        "invalid-image-request",
    )

    assert problem["errors"] == [
        {
            "pointer": "/metadata",
            "detail": f"has {MAX_MEMBERS + 1} members; at most {MAX_MEMBERS} are accepted",
            "accepted": {"max": MAX_MEMBERS},
        }
    ]


def test_an_adapter_s_fields_are_those_that_are_offered_for_one(api):
    answer = api.post(
        "/v1/jobs", json={"prompt": "x", "adapters": [{"name": "sepia", "weight": 1}]}
    )

    [error] = assert_problem(answer, 422, "invalid-image-request")["errors"]
    assert (error["pointer"], error["accepted"]) == ("/adapters/0/weight", ["name", "strength"])


@pytest.mark.parametrize(
    "body",
    ['{"prompt": "x", "seed": 1, "seed": 2}', '{"prompt": "x", "metadata": {"a": "1", "a": "2"}}'],
)
def test_a_member_that_is_there_twice_is_refused(api, body):
    problem = assert_problem(
        api.post("/v1/jobs", content=body, headers=JSON), 400, "malformed-body"
    )

    assert "more than once" in problem["detail"]


@pytest.mark.parametrize("depth", [17, 400, 900, 960, 980, 995])
def test_a_body_that_is_nested_deeply_is_malformed_whatever_comes_with_it(api, depth):
    body = '{"jobs": [' + "[" * depth + "]" * depth + "]}"

    answer = api.post(BATCH, content=body, headers={**JSON, "Idempotency-Key": str(uuid.uuid4())})

    assert "nested too deeply" in assert_problem(answer, 400, "malformed-body")["detail"]


def test_the_largest_batch_that_means_something_is_within_bounds():
    everything = {
        **dict.fromkeys(JobBody.model_fields),
        "metadata": {f"key-{n}": "" for n in range(16)},
    }
    everything["adapters"] = [{"name": "a", "strength": 1.0}] * 8

    check_bounds(
        {"jobs": [everything] * 1000, "defaults": everything},
        problem=InvalidImageRequest,
        lists={"/jobs": 1000},
    )


@pytest.mark.parametrize(
    "body", [[[0] * 256] * 256 * 2, {"a": [[[0] * 200] * 200] * 3}, [0] * (MAX_ENTRIES + 1)]
)
def test_a_value_beyond_the_bounds_is_found(body):
    with pytest.raises((InvalidImageRequest, MalformedBody)):
        check_bounds(body, problem=InvalidImageRequest)
    assert MAX_VALUES <= 100_000


def test_wrong_defaults_are_said_once_for_a_thousand_jobs(api):
    body = {"defaults": {"prompt": "x", "nosuch": 1, "steps": "many"}, "jobs": [{}] * 1000}

    answer = api.post(BATCH, json=body)

    problem = assert_problem(answer, 422, "invalid-image-request")
    assert [error["pointer"] for error in problem["errors"]] == [
        "/defaults/steps",
        "/defaults/nosuch",
    ]
    assert len(answer.content) < MOST_TOLD


def test_the_answer_to_a_thousand_wrong_jobs_is_bounded(api):
    wrong = {f"field-{number}": 1 for number in range(60)}

    answer = api.post(
        BATCH,
        json={"jobs": [{"prompt": "x", "tier": "batch"}, *[wrong] * 999]},
        headers={"Idempotency-Key": str(uuid.uuid4())},
    )

    batch = answer.json()
    assert (answer.status_code, batch["accepted"], batch["refused"]) == (200, 1, 999)
    assert len(answer.content) < 1_000_000
    first, last = batch["data"][1]["problem"], batch["data"][-1]["problem"]
    assert len(first["errors"]) == MAX_ERRORS
    assert (last["type"], last["status"], len(last["errors"]), last["errors_left_out"]) == (
        first["type"],
        422,
        1,
        60,
    )
    api.post(batch["data"][0]["job"]["urls"]["cancel"])


@pytest.mark.parametrize(
    "text",
    [
        "\u6771\u4eac\u3000\u592a\u90ce",  # an ideographic space
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family, joined
        "e\u0301 \u00fc",
        "non-breaking\u00a0space",
        "thin\u2009space",
        "\u0644\u064a\u0644\u0649\u200f",  # from right to left, with its mark
        "\u0915\u094d\u200d\u0937",
        "line\u2028separator",
        "\U0001fae9",  # younger than what Python knows of Unicode
        "",
    ],
)
def test_text_that_people_write_is_kept(api, text):
    job = api.post(
        "/v1/jobs", json={"prompt": "a dot", "tier": "batch", "metadata": {"title": text}}
    ).json()

    assert job["metadata"] == {"title": text}
    if text:
        found = api.get("/v1/jobs", params={"metadata.title": text}).json()["data"]
        assert job["id"] in [each["id"] for each in found]
    hook = api.post("/v1/webhooks", json={"url": "http://127.0.0.1:1/x", "description": text})
    assert hook.json()["description"] == text
    api.delete(hook.json()["urls"]["self"])
    api.post(job["urls"]["cancel"])


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "\x1b[31m", "\x00", "\x7f", "\x85", "\ud83d"])
def test_text_that_steers_a_terminal_is_not(api, text):
    answer = api.post(
        "/v1/jobs",
        content=json.dumps({"prompt": "a dot", "metadata": {"title": text}}),
        headers=JSON,
    )

    assert_problem(answer, 422, "invalid-image-request")
    assert not is_human(text)


@pytest.mark.parametrize(
    "fields", [{"n": 1.0, "seed": 42.0, "steps": 4.0}, {"n": 1, "seed": 4.2e1, "steps": 4.0}]
)
def test_json_has_one_kind_of_number(api, fields):
    job = api.post("/v1/jobs", json={"prompt": "a dot", "tier": "batch", **fields}).json()
    batch = api.post(BATCH, json={"jobs": [{"prompt": "a dot", "tier": "batch", **fields}]}).json()

    assert (job["n"], job["seed"], job["steps"]) == (1, 42, 4)
    for each in (job, batch["data"][0]["job"]):
        assert '"seed":42,' in api.get(each["urls"]["self"]).text.replace(" ", "")
        api.post(each["urls"]["cancel"])


@pytest.mark.parametrize("value", [True, False, 1.5, 1e-9, "1"])
@pytest.mark.parametrize("field", ["n", "seed", "steps"])
def test_a_number_that_is_not_whole_is_refused(api, field, value):
    problem = assert_problem(
        api.post("/v1/jobs", json={"prompt": "a dot", field: value}), 422, "invalid-image-request"
    )

    assert [error["pointer"] for error in problem["errors"]] == [f"/{field}"]


def test_a_seed_of_minus_one_is_drawn(api):
    jobs = [
        api.post("/v1/jobs", json={"prompt": "a dot", "tier": "batch", "seed": -1}).json()
        for _ in range(2)
    ]

    assert jobs[0]["seed"] != jobs[1]["seed"]
    assert api.post("/v1/estimate", json={"prompt": "a dot", "seed": -1}).json()["seed"] is None
    for job in jobs:
        api.post(job["urls"]["cancel"])


def test_an_estimate_takes_the_bodies_that_a_job_does(api):
    body = {
        "prompt": "a dot",
        "tier": "batch",
        "init_image": "data:image/png;base64," + "A" * 300_000,
    }

    assert api.post("/v1/estimate", json=body).status_code == 200
    assert_problem(api.post("/v1/jobs", json=body), 422, "invalid-picture")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/usage?from=9999-12-31&to=9999-12-31",
        "/v1/usage?from=0001-01-01&to=9999-12-31",
        "/v1/usage?from=9999-12-31",
        "/v1/files?limit=1&endpoint=x",
        "/v1/files?limit=1&_external=1&_anchor=x&values=y",
        "/v1/files?limit=1&endpoint=x&endpoint=y&self=1",
        "/v1/files?limit=1&limit=2",
        "/v1/files?cursor=a&cursor=b",
        "/v1/jobs?created_after=0001-01-01T00:00:00%2B14:00",
        "/v1/jobs?created_before=9999-12-31T23:59:59-14:00",
        "/v1/jobs?metadata.a=%00",
        "/v1/jobs/00000000-0000-7000-8000-000000000000/images/" + "9" * 400,
    ],
)
def test_odd_queries_are_answered(api, path):
    for size in (3, 5):
        api.post(
            "/v1/files", content=png(a_picture(size, 2)), headers={"Content-Type": "image/png"}
        )

    answer = api.get(path)

    assert answer.status_code in (200, 404, 422), answer.text


def test_the_next_page_is_found_whatever_else_the_query_says(api):
    for size in (3, 5, 7):
        api.post(
            "/v1/files", content=png(a_picture(size, 2)), headers={"Content-Type": "image/png"}
        )

    first = api.get("/v1/files", params={"limit": 1, "endpoint": "x", "a&b": "c=d"})
    second = api.get(first.links["next"]["url"])

    assert second.status_code == 200
    assert second.json()["data"][0]["id"] != first.json()["data"][0]["id"]
    assert "endpoint=x" in first.links["next"]["url"]
