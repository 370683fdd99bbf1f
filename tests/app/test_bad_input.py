"""Whatever a client sends: the right problem, that names the field and what is accepted.

Never a 500, never a row.
"""

import json

import pytest

from app.schemas.bodies import JobBody
from policy.catalog import MAX_SEED
from policy.fleet import parse_fleet
from settings import REPO
from tests.app.conftest import bearer
from tests.app.problem import assert_problem

MODELS = list(parse_fleet((REPO / "fleet.toml").read_text()).model_ids)

JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def no_row(count_jobs):
    """Nothing of this file is ever accepted."""
    before = count_jobs()
    yield
    assert count_jobs() == before


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"prompt=a+red+circle", id="a form"),
        pytest.param(b'{"prompt": "a red circle"', id="cut off"),
        pytest.param(b"{'prompt': 'a red circle'}", id="single quotes"),
        pytest.param(b'{"prompt": "a red circle"} {}', id="two bodies"),
        pytest.param(b'{"prompt": "a red circle", "guidance": NaN}', id="NaN"),
        pytest.param(b'{"prompt": "a red circle", "guidance": Infinity}', id="Infinity"),
        pytest.param(b'{"prompt": "a red circle", "guidance": -Infinity}', id="minus Infinity"),
        pytest.param(b'{"prompt": "a \xff circle"}', id="not UTF-8"),
        pytest.param(b'{"prompt": "a\x00circle"}', id="a raw NUL"),
        pytest.param(
            b'{"prompt": "a red circle", "seed": ' + b"9" * 5000 + b"}",
            id="a number of 5000 digits",
        ),
        pytest.param(b'{"a":' * 40_000 + b"1" + b"}" * 40_000, id="objects nested 40000 deep"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="lists nested 100000 deep"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"a red circle"', id="a string"),
        pytest.param(b"null", id="null"),
        pytest.param(b"7", id="a number"),
    ],
)
def test_a_body_that_is_no_json_object_is_malformed(api, body):
    assert_problem(api.post("/v1/jobs", content=body, headers=JSON), 400, "malformed-body")


@pytest.mark.parametrize(
    ("fields", "field", "accepted"),
    [
        pytest.param({"prompt": None}, "prompt", None, id="no prompt"),
        pytest.param({"prompt": 7}, "prompt", None, id="a number as prompt"),
        pytest.param({"prompt": ["a", "b"]}, "prompt", None, id="a list as prompt"),
        pytest.param({"prompt": {"text": "a"}}, "prompt", None, id="an object as prompt"),
        pytest.param({"prompt": ""}, "prompt", {"min_chars": 1}, id="empty prompt"),
        pytest.param({"prompt": " \n\t"}, "prompt", {"min_chars": 1}, id="blank prompt"),
        pytest.param({"prompt": "x" * 2001}, "prompt", {"max_chars": 2000}, id="long prompt"),
        pytest.param(
            {"prompt": "x" * 200_000}, "prompt", {"max_chars": 2000}, id="very long prompt"
        ),
        pytest.param({"prompt": "a\x00circle"}, "prompt", None, id="NUL in prompt"),
        pytest.param(
            {"negative_prompt": "a\x00circle"}, "negative_prompt", None, id="NUL in negative prompt"
        ),
        pytest.param(
            {"negative_prompt": None}, "negative_prompt", None, id="null as negative prompt"
        ),
        pytest.param({"prompt": "\ud800"}, "prompt", None, id="lone surrogate"),
        pytest.param({"model": "stable-diffusion-9"}, "model", MODELS, id="unknown model"),
        pytest.param({"model": ""}, "model", MODELS, id="empty model"),
        pytest.param({"model": "pocket\x00"}, "model", MODELS, id="NUL in model"),
        pytest.param({"model": "../../etc/passwd"}, "model", MODELS, id="path as model"),
        pytest.param({"model": 7}, "model", None, id="number as model"),
        pytest.param({"tier": "free"}, "tier", ["fast", "quality", "batch"], id="unknown tier"),
        pytest.param({"size": "-128x128"}, "size", ["128x128"], id="negative size"),
        pytest.param({"size": "0x0"}, "size", ["128x128"], id="no size"),
        pytest.param({"size": "99999x99999"}, "size", ["128x128"], id="huge size"),
        pytest.param({"size": "128X128"}, "size", ["128x128"], id="capital X"),
        pytest.param({"size": 128}, "size", None, id="number as size"),
        pytest.param({"size": [128, 128]}, "size", None, id="list as size"),
        pytest.param({"steps": 0}, "steps", {"min": 1, "max": 20}, id="no steps"),
        pytest.param({"steps": -1}, "steps", {"min": 1, "max": 20}, id="negative steps"),
        pytest.param(
            {"steps": 21}, "steps", {"min": 1, "max": 20}, id="too many steps for the tier"
        ),
        pytest.param({"steps": 10**400}, "steps", {"min": 1, "max": 20}, id="astronomic steps"),
        pytest.param({"steps": "20"}, "steps", None, id="text as steps"),
        pytest.param({"steps": 4.5}, "steps", None, id="fraction as steps"),
        pytest.param({"steps": True}, "steps", None, id="true as steps"),
        pytest.param(
            {"guidance": -0.5}, "guidance", {"min": 0.0, "max": 15.0}, id="negative guidance"
        ),
        pytest.param({"guidance": 1e30}, "guidance", {"min": 0.0, "max": 15.0}, id="huge guidance"),
        pytest.param({"guidance": "7.5"}, "guidance", None, id="text as guidance"),
        pytest.param(
            {"sampler": "plms"},
            "sampler",
            ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc"],
            id="unknown sampler",
        ),
        pytest.param({"seed": -2}, "seed", {"min": -1, "max": MAX_SEED - 1}, id="negative seed"),
        pytest.param(
            {"seed": 2**63}, "seed", {"min": -1, "max": MAX_SEED - 1}, id="seed beyond 63 bits"
        ),
        pytest.param({"seed": 1.5}, "seed", None, id="fraction as seed"),
        pytest.param({"n": 0}, "n", {"min": 1, "max": 4}, id="no images"),
        pytest.param({"n": -3}, "n", {"min": 1, "max": 4}, id="negative images"),
        pytest.param({"n": 1000}, "n", {"min": 1, "max": 4}, id="a thousand images"),
        pytest.param({"n": None}, "n", None, id="null as n"),
        pytest.param(
            {"output_format": "gif"}, "output_format", ["png", "webp", "jpeg"], id="unknown format"
        ),
    ],
)
def test_a_field_that_cannot_be_used_is_pointed_at(api, fields, field, accepted):
    answer = api.post(
        "/v1/jobs", content=json.dumps({"prompt": "a red circle", **fields}), headers=JSON
    )

    problem = assert_problem(answer, 422, "invalid-image-request")
    [error] = problem["errors"]
    assert (error["pointer"], error.get("accepted")) == (f"/{field}", accepted)
    assert error["detail"]


def test_a_missing_prompt_is_pointed_at(api):
    problem = assert_problem(api.post("/v1/jobs", json={}), 422, "invalid-image-request")

    assert problem["errors"] == [{"pointer": "/prompt", "detail": "This field is required"}]


def test_an_infinity_by_exponent_is_a_wrong_field(api):
    answer = api.post(
        "/v1/jobs", content=b'{"prompt": "a red circle", "guidance": 1e999}', headers=JSON
    )

    assert [
        error["pointer"] for error in assert_problem(answer, 422, "invalid-image-request")["errors"]
    ] == ["/guidance"]


@pytest.mark.parametrize(
    ("name", "pointer"),
    [("promt", "/promt"), ("a/b~c", "/a~1b~0c"), ("", "/"), ("x" * 1000, "/" + "x" * 64)],
)
def test_an_unknown_field_is_refused_and_the_known_ones_are_told(api, name, pointer):
    answer = api.post(
        "/v1/jobs", content=json.dumps({"prompt": "a red circle", name: 1}), headers=JSON
    )

    [error] = assert_problem(answer, 422, "invalid-image-request")["errors"]
    assert error["pointer"] == pointer
    assert set(error["accepted"]) == set(JobBody.model_fields)


@pytest.mark.parametrize(
    ("name", "pointer"),
    [("a~b", "/a~0b"), ("a/b", "/a~1b"), ("~1", "/~01"), ("x" * 70, "/" + "x" * 64)],
)
def test_a_pointer_to_a_field_is_escaped_and_short(api, name, pointer):
    answer = api.post("/v1/jobs", json={"prompt": "a red circle", name: 1})

    problem = assert_problem(answer, 422, "invalid-image-request")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_a_field_whose_name_is_no_text_is_refused(api):
    answer = api.post("/v1/jobs", content=b'{"prompt": "a red circle", "\\ud800": 1}', headers=JSON)

    assert_problem(answer, 422, "invalid-image-request")


def test_every_wrong_field_is_told_at_once(api):
    answer = api.post("/v1/jobs", json={"prompt": 7, "steps": "many", "n": 1.5})

    errors = assert_problem(answer, 422, "invalid-image-request")["errors"]
    assert {error["pointer"] for error in errors} == {"/prompt", "/steps", "/n"}


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Content-Type": "text/plain"}, id="text"),
        pytest.param({"Content-Type": "application/x-www-form-urlencoded"}, id="form"),
        pytest.param({"Content-Type": "multipart/form-data; boundary=x"}, id="multipart"),
        pytest.param({"Content-Type": "application/jsonl"}, id="almost"),
        pytest.param({"Content-Type": ""}, id="none"),
    ],
)
def test_another_content_type_is_refused(api, headers):
    answer = api.post("/v1/jobs", content=b'{"prompt": "a red circle"}', headers=headers)

    assert assert_problem(answer, 415, "unsupported-media-type")["accepted"] == ["application/json"]


def test_a_prompt_of_five_megabytes_is_too_large(api):
    body = json.dumps({"prompt": "x" * 5_000_000}).encode()

    assert_problem(api.post("/v1/jobs", content=body, headers=JSON), 413, "body-too-large")


def test_five_megabytes_that_do_not_tell_their_length_are_too_large_too(api):
    body = json.dumps({"prompt": "x" * 5_000_000}).encode()
    pieces = (body[start : start + 65_536] for start in range(0, len(body), 65_536))

    assert_problem(api.post("/v1/jobs", content=pieces, headers=JSON), 413, "body-too-large")


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(None, id="nothing"),
        pytest.param("", id="empty"),
        pytest.param("Bearer", id="no key"),
        pytest.param("Bearer dr_abc", id="a stump"),
        pytest.param("Bearer dr_000000000000_" + "0" * 49, id="an invented key"),
        pytest.param("Basic b3BlcmF0b3I6cGFzcw==", id="another scheme"),
        pytest.param("Bearer \xe9t\xe9", id="not ASCII"),
        pytest.param("Bearer " + "x" * 4000, id="a very long key"),
    ],
)
@pytest.mark.parametrize(
    "route", ["POST /v1/jobs", "GET /v1/jobs", "GET /v1/models", "GET /v1/tiers"]
)
def test_without_a_live_key_nothing_is_told(nobody, authorization, route):
    method, path = route.split()
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}

    answer = nobody.request(
        method, path, json={"prompt": "a red circle"} if method == "POST" else None, headers=headers
    )

    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_mistyped_or_revoked_key_looks_like_an_unknown_one(nobody, new_key):
    key, revoked = new_key(), new_key(revoked=True)
    mistyped = key[:-1] + ("0" if key[-1] != "0" else "1")

    answers = [
        nobody.post("/v1/jobs", json={"prompt": "x"}, headers=bearer(bad))
        for bad in (mistyped, revoked)
    ]

    assert (
        len({assert_problem(answer, 401, "unauthenticated")["detail"] for answer in answers}) == 1
    )


def test_the_scheme_s_name_may_be_written_in_any_case(nobody, new_key):
    assert (
        nobody.get("/v1/tiers", headers={"Authorization": f"bEARER {new_key()}"}).status_code == 200
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/job",
        "/v1/jobs/",
        "/v1/jobs/not-an-id",
        "/v1/jobs/7/images/0",
        "/v2/jobs",
        "/v1/jobs/%00",
        "/%ff",
    ],
)
def test_an_unknown_route_is_a_problem(api, path):
    assert_problem(api.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", {"GET", "POST"}),
        ("PUT", "/v1/jobs/00000000-0000-7000-8000-000000000000", {"GET"}),
        ("GET", "/v1/jobs/00000000-0000-7000-8000-000000000000/cancel", {"POST"}),
        ("POST", "/v1/models", {"GET"}),
        ("POST", "/healthz", {"GET"}),
        ("TRACE", "/v1/jobs", {"GET", "POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(api, method, path, allowed):
    answer = api.request(method, path)

    assert_problem(answer, 405, "method-not-allowed")
    assert allowed <= set(answer.headers["Allow"].split(", "))


def test_a_request_id_that_was_sent_is_kept_and_one_that_could_hurt_is_not(api):
    kept = api.get("/v1/jobs/nope", headers={"X-Request-Id": "trace-7.A_b"})
    replaced = api.get("/v1/jobs/nope", headers={"X-Request-Id": 'x" onload="alert(1)'})

    assert assert_problem(kept, 404, "not-found")["instance"] == "/requests/trace-7.A_b"
    assert "onload" not in assert_problem(replaced, 404, "not-found")["instance"]


@pytest.mark.parametrize(
    "slug",
    [
        "malformed-body",
        "unauthenticated",
        "not-found",
        "job-not-found",
        "image-not-found",
        "model-not-found",
        "method-not-allowed",
        "image-not-ready",
        "job-already-finished",
        "body-too-large",
        "unsupported-media-type",
        "invalid-image-request",
        "invalid-query",
        "unexpected",
        "part-unavailable",
    ],
)
def test_a_problem_s_type_leads_to_its_explanation(nobody, slug):
    about = nobody.get(f"/problems/{slug}").json()

    assert about["type"] == f"/problems/{slug}"
    assert about["title"]
    assert about["about"]


def test_an_unknown_problem_is_one(nobody):
    assert_problem(nobody.get("/problems/none-such"), 404, "not-found")


@pytest.mark.parametrize("path", ["/v1/jobs", "/nowhere"])
def test_a_method_that_does_not_exist_is_told_so_wherever_it_leads(api, path):
    assert "POST" in assert_problem(api.request("BREW", path), 501, "method-unknown")["accepted"]
