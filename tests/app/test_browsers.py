"""Pages that call the gateway from a browser: who may, and what they may read."""

import pytest

from tests.app.conftest import bearer
from tests.app.problem import assert_problem

PAGE = "https://app.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
}
KEYED = [
    "/v1/jobs",
    "/v1/images/generations",
    "/v1/models",
    "/v1/files",
    "/v1/admin/tenants",
    "/v1/jobs:batch",
]

# Every header of our answers that tells more; pages cannot read any other.
EXPOSED = {
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Length",
    "Content-Range",
    "ETag",
    "Idempotency-Replayed",
    "Link",
    "Location",
    "Preference-Applied",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-Darkroom-Job-Id",
    "X-Request-Id",
    "X-Should-Retry",
}


@pytest.fixture(scope="module")
def open_to_pages(gateway_with):
    return gateway_with(cors_allowed_origins=f"{PAGE}, http://localhost:5173".replace(" ", ""))


def told(answer) -> dict[str, str]:
    return {
        name: value for name, value in answer.headers.items() if name.startswith("Access-Control-")
    }


@pytest.mark.parametrize("path", KEYED)
def test_a_preflight_needs_no_key(open_to_pages, path):
    answer = open_to_pages.options(path, headers=PREFLIGHT)

    assert answer.status_code == 204
    assert told(answer)["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in told(answer)["Access-Control-Allow-Methods"]
    assert (
        told(answer)["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    )
    assert {"Origin", "Access-Control-Request-Headers"} <= {
        name.strip() for name in answer.headers["Vary"].split(",")
    }


def test_pages_may_read_answers_and_refusals_with_the_headers_that_tell_more(
    open_to_pages, new_key
):
    good = open_to_pages.get("/v1/models", headers={"Origin": PAGE, **bearer(new_key())})
    refusal = open_to_pages.get("/v1/models", headers={"Origin": PAGE})

    assert (good.status_code, refusal.status_code) == (200, 401)
    for answer in (good, refusal):
        assert told(answer)["Access-Control-Allow-Origin"] == PAGE
        exposed = {
            name.strip() for name in told(answer)["Access-Control-Expose-Headers"].split(",")
        }
        assert exposed == EXPOSED


def test_cookies_are_never_allowed(open_to_pages, gateway_with):
    for gateway in (open_to_pages, gateway_with(cors_allowed_origins="*")):
        assert (
            "Access-Control-Allow-Credentials"
            not in gateway.options("/v1/jobs", headers=PREFLIGHT).headers
        )
        assert (
            "Access-Control-Allow-Credentials"
            not in gateway.get("/v1/models", headers={"Origin": PAGE}).headers
        )


def test_a_page_that_is_not_named_may_not_call(open_to_pages):
    for origin in ("https://evil.example", "https://app.example.evil", "null"):
        assert (
            told(open_to_pages.options("/v1/jobs", headers={**PREFLIGHT, "Origin": origin})) == {}
        )
        assert told(open_to_pages.get("/v1/models", headers={"Origin": origin})) == {}


def test_an_answer_to_no_page_is_not_kept_for_one(open_to_pages):
    assert "Origin" in open_to_pages.get("/openapi.json").headers["Vary"]


def test_with_a_star_every_page_may_call_and_answers_do_not_vary_by_page(gateway_with):
    answer = gateway_with(cors_allowed_origins="*").get(
        "/openapi.json", headers={"Origin": "https://any.example"}
    )

    assert told(answer)["Access-Control-Allow-Origin"] == "*"
    assert "Origin" not in answer.headers.get("Vary", "")


def test_by_default_no_page_may_call(nobody):
    answer = nobody.options("/v1/jobs", headers=PREFLIGHT)

    assert (answer.status_code, told(answer)) == (204, {})
    assert told(nobody.get("/openapi.json", headers={"Origin": PAGE})) == {}


def test_options_tells_the_methods_of_a_route_to_anybody(nobody):
    answer = nobody.options("/v1/jobs")

    assert answer.status_code == 204
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
    assert_problem(nobody.options("/v1/nothing"), 404, "not-found")


def test_a_page_can_read_that_a_route_does_not_exist(open_to_pages):
    assert open_to_pages.options("/v1/nothing", headers=PREFLIGHT).status_code == 204
    answer = open_to_pages.post("/v1/nothing", headers={"Origin": PAGE})
    assert assert_problem(answer, 404, "not-found")
    assert told(answer)["Access-Control-Allow-Origin"] == PAGE


def test_headers_that_a_preflight_names_are_not_put_into_the_answer_unread(open_to_pages):
    for odd in ("x y", "a\tb", "ä", "x" * 65, ", ".join(["x"] * 65)):
        answer = open_to_pages.options(
            "/v1/jobs", headers={**PREFLIGHT, "Access-Control-Request-Headers": odd}
        )
        assert "Access-Control-Allow-Headers" not in answer.headers
