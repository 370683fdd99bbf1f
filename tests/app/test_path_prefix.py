"""The gateway under a path of a proxy's, and programs that join a base URL with a path as they
like.
"""

import re

import pytest
from flask import json

from tests.app.conftest import bearer
from tests.app.problem import assert_problem

JOB_BODY = {"prompt": "a red circle", "tier": "batch", "steps": 2}
PUBLIC = {"public_url": "https://images.example/darkroom"}


@pytest.fixture(scope="module")
def headers(new_key) -> dict[str, str]:
    return bearer(new_key())


def links(value) -> list[str]:
    """Every path in an answer, wherever it stands."""
    if isinstance(value, dict):
        return [
            link
            for name, part in value.items()
            if name not in ("type", "instance")
            for link in links(part)
        ]
    if isinstance(value, list):
        return [link for part in value for link in links(part)]
    return [value] if isinstance(value, str) and value.startswith("/") else []


def test_every_link_of_every_answer_begins_with_the_path_of_the_public_address(
    gateway_with, headers
):
    gateway = gateway_with(**PUBLIC)

    answer = gateway.post("/v1/jobs", json=JOB_BODY, headers={**headers, "Prefer": "wait=60"})
    listed = gateway.get("/v1/jobs?limit=1", headers=headers)
    gateway.post("/v1/jobs", json=JOB_BODY, headers=headers)
    paged = gateway.get("/v1/jobs?limit=1", headers=headers)
    image = gateway.get(answer.json["images"][0]["url"], headers=headers)

    assert answer.headers["Location"] == answer.json["urls"]["self"]
    for document in (answer.json, listed.json):
        assert len(links(document)) >= 6
        assert [link for link in links(document) if not link.startswith("/darkroom/v1/")] == []
    assert paged.headers["Link"].startswith("</darkroom/v1/jobs?")
    assert image.status_code == 302


def test_the_documents_are_found_below_the_path(gateway_with):
    gateway = gateway_with(**PUBLIC)

    urls = gateway.get("/darkroom/v1").json["urls"]

    assert urls == {"openapi": "/darkroom/openapi.json", "docs": "/darkroom/docs"}
    assert {gateway.get(url).status_code for url in urls.values()} == {200}


def test_a_path_comes_to_the_same_route_with_the_prefix_and_without(gateway_with, headers):
    gateway = gateway_with(**PUBLIC)

    for path in ("/v1/models", "/darkroom/v1/models", "/darkroom//v1/models"):
        assert gateway.get(path, headers=headers).status_code == 200, path
    assert gateway.get("/darkroom/healthz").status_code == 200
    for path in ("/darkroomy/v1/models", "/darkroomv1/models"):
        assert_problem(gateway.get(path, headers=headers), 404, "not-found")


def test_two_prefixes_of_one_gateway_do_not_mix(gateway_with, headers):
    gateway = gateway_with(trust_forwarded_headers=True)
    job_id = gateway.post("/v1/jobs", json=JOB_BODY, headers=headers).json["id"]

    for prefix in ("/a", "/b", "/a"):  # within the second for which a status is kept
        status = gateway.get(
            f"/v1/jobs/{job_id}/status", headers={**headers, "X-Forwarded-Prefix": prefix}
        ).json
        assert status["urls"]["self"] == f"{prefix}/v1/jobs/{job_id}"


def test_a_proxy_that_is_trusted_says_its_prefix_itself(gateway_with, headers):
    gateway = gateway_with(trust_forwarded_headers=True)
    told = {**headers, "X-Forwarded-Prefix": "/a/b/"}

    assert (
        gateway.post("/v1/jobs", json=JOB_BODY, headers=told)
        .headers["Location"]
        .startswith("/a/b/v1/jobs/")
    )
    assert (
        gateway.post("/v1/jobs", json=JOB_BODY, headers=headers)
        .headers["Location"]
        .startswith("/v1/jobs/")
    )


@pytest.mark.parametrize(
    "told",
    [
        "//evil.example",
        "/a b",
        "https://evil.example",
        '/"><script>',
        "/a/../b",
        "/..",
        "/a?c",
        "a",
    ],
)
def test_a_prefix_that_is_no_path_is_not_believed(gateway_with, headers, told):
    gateway = gateway_with(trust_forwarded_headers=True)

    answer = gateway.post(
        "/v1/jobs", json=JOB_BODY, headers={**headers, "X-Forwarded-Prefix": told}
    )

    assert answer.headers["Location"].startswith("/v1/jobs/")


def test_by_default_nobody_is_believed(api):
    answer = api.post("/v1/jobs", json=JOB_BODY, headers={"X-Forwarded-Prefix": "/a"})

    assert answer.headers["Location"].startswith("/v1/jobs/")


def test_the_document_and_its_page_work_under_the_prefix(gateway_with):
    gateway = gateway_with(trust_forwarded_headers=True)
    told = {"X-Forwarded-Prefix": "/a"}

    assert gateway.get("/openapi.json", headers=told).json["servers"] == [{"url": "/a"}]
    assert gateway.get("/openapi.json").json["servers"] == [{"url": "/"}]
    assert gateway.get("/openapi.json", headers=told).json["servers"] == [{"url": "/a"}]
    page = gateway.get("/docs", headers=told).text
    sources = re.findall(r'(?:src|spec-url)="([^"]+)"', page)
    assert sources == ["/a/static/docs/rapidoc-min.js", "/a/openapi.json"]
    assert all(gateway.get(source.removeprefix("/a")).status_code == 200 for source in sources)


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "///v1///models"])
def test_repeated_slashes_count_as_one(api, path):
    answer = api.send(api.build_request("GET", f"{api.base_url}".rstrip("/") + path))

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")


def test_a_base_url_with_a_slash_reaches_the_images(api):
    answer = api.post(
        f"{str(api.base_url).rstrip('/')}/v1//images/generations",
        content=json.dumps({"prompt": ""}).encode(),
    )

    assert_problem(answer, 415, "unsupported-media-type")
