"""The way to the images: a redirect to a URL that is its own permission, and the bytes that the job
told of.
"""

import hashlib
import io
import subprocess
import urllib.request
import uuid
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from app.signing import LinkSigner
from edges.handoff import pixels_sha256
from models.database import transaction
from models.tables import Artifact
from tests.app.conftest import bearer
from tests.app.problem import assert_problem


def fetch(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


@pytest.mark.parametrize("index", [0, 1])
def test_the_image_comes_without_a_key_and_is_the_one_that_the_job_told_of(
    api, finished_job, index
):
    told = finished_job["images"][index]

    redirect = api.get(told["url"])
    answer = fetch(redirect.headers["Location"])

    assert (redirect.status_code, redirect.headers["Cache-Control"]) == (302, "no-store")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
    assert hashlib.sha256(answer.content).hexdigest() == told["content_sha256"]
    assert len(answer.content) == told["size_bytes"]
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    assert pixels.shape == (told["height_px"], told["width_px"], 3)
    assert pixels_sha256(pixels) == told["pixels_sha256"]


def test_neither_key_nor_tenant_s_secret_is_in_the_url(stack, api, finished_job):
    location = api.get(finished_job["images"][0]["url"]).headers["Location"]

    assert stack.env["S3_SECRET_ACCESS_KEY"] not in location
    assert "dr_" not in location


def test_an_image_that_the_job_does_not_have_is_not_found(api, finished_job):
    assert_problem(api.get(f"{finished_job['urls']['self']}/images/2"), 404, "image-not-found")
    assert_problem(
        api.get(f"{finished_job['urls']['self']}/images/99999999999999999999"),
        404,
        "image-not-found",
    )
    assert_problem(api.get(f"{finished_job['urls']['self']}/images/-1"), 404, "not-found")


def test_an_image_that_may_still_come_is_worth_waiting_for(api):
    job = api.post(
        "/v1/jobs", json={"prompt": "a red circle", "tier": "batch", "steps": 60, "n": 8}
    ).json()

    answer = api.get(f"{job['urls']['self']}/images/7")

    assert_problem(answer, 409, "image-not-ready")
    assert answer.headers["Retry-After"] == "1"
    api.post(job["urls"]["cancel"])


def test_an_image_that_will_not_come_is_not(api, canceled_job):
    answer = api.get(f"{canceled_job['urls']['self']}/images/0")

    assert assert_problem(answer, 409, "image-not-ready")["state"] == "canceled"
    assert "Retry-After" not in answer.headers
    assert canceled_job["images"][0]["url"] is None


# --- through the gateway --------------------------------------------------------------------------


@pytest.fixture
def image(finished_job) -> dict:
    return finished_job["images"][0]


@pytest.fixture(scope="module")
def proxy(gateway_with, new_key):
    """A gateway that hands images out itself, and the headers of its tenant."""
    return gateway_with(image_delivery="proxy")


def test_the_bytes_come_from_the_gateway_for_whoever_asks(api, image):
    answer = api.get(image["url"], params={"redirect": "false"})

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
    assert hashlib.sha256(answer.content).hexdigest() == image["content_sha256"]
    assert int(answer.headers["Content-Length"]) == len(answer.content) == image["size_bytes"]
    assert answer.headers["ETag"] == f'"{image["content_sha256"]}"'
    assert answer.headers["Content-Disposition"].startswith('inline; filename="')


def test_a_picture_is_kept_by_no_cache_but_its_client_s(api, image):
    direct = api.get(image["url"], params={"redirect": "false"})
    from_store = fetch(api.get(image["url"]).headers["Location"])

    for answer in (direct, from_store):
        assert answer.headers["Cache-Control"] == "private, max-age=600"


def test_a_key_that_is_kept_on_the_way_does_no_harm(stack, api, image):
    """As urllib and wget keep it."""
    url = f"{stack.env['DARKROOM_URL']}{image['url']}?redirect=false"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    content = opener.open(
        urllib.request.Request(url, headers={"Authorization": api.headers["Authorization"]})
    ).read()

    assert hashlib.sha256(content).hexdigest() == image["content_sha256"]


def test_head_tells_what_get_would_bring(api, image):
    for params, headers in (({}, {}), ({"redirect": "false"}, {"Range": "bytes=0-9"})):
        answer = api.head(image["url"], params=params, headers=headers, follow_redirects=True)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["Content-Type"] == "image/png"
        assert int(answer.headers["Content-Length"]) == image["size_bytes"]
        assert answer.headers["ETag"] == f'"{image["content_sha256"]}"'


def test_curl_follows_head(stack, api, image):
    command = [
        "curl",
        "-sIL",
        "--noproxy",
        "*",
        "-H",
        f"Authorization: {api.headers['Authorization']}",
    ]
    told = subprocess.run(
        [*command, stack.env["DARKROOM_URL"] + image["url"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )

    assert told.stdout.startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-99", 0, 99), ("bytes=100-", 100, None), ("bytes=-50", -50, None)],
)
def test_a_part_comes_where_a_part_is_asked_for(api, image, asked, first, last):
    whole = api.get(image["url"], params={"redirect": "false"}).content

    answer = api.get(image["url"], params={"redirect": "false"}, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.content == whole[first : None if last is None else last + 1]
    start = first if first >= 0 else len(whole) + first
    assert (
        answer.headers["Content-Range"]
        == f"bytes {start}-{start + len(answer.content) - 1}/{len(whole)}"
    )
    assert int(answer.headers["Content-Length"]) == len(answer.content)


def test_a_part_that_is_not_there_is_refused_with_the_size(api, image):
    answer = api.get(
        image["url"], params={"redirect": "false"}, headers={"Range": "bytes=99999999-"}
    )

    assert assert_problem(answer, 416, "range-not-satisfiable")["size_bytes"] == image["size_bytes"]
    assert answer.headers["Content-Range"] == f"bytes */{image['size_bytes']}"


def test_a_part_that_a_file_of_the_page_does_not_have_is_refused_too(nobody):
    answer = nobody.get("/static/docs/rapidoc-min.js", headers={"Range": "bytes=99999999-"})

    assert_problem(answer, 416, "http-416")


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-1,5-6"},
        {"Range": "lines=1-2"},
        {"Range": "bytes=0-9", "If-Range": '"older"'},
    ],
)
def test_where_no_part_can_be_given_all_of_it_comes(api, image, headers):
    answer = api.get(image["url"], params={"redirect": "false"}, headers=headers)

    assert (answer.status_code, len(answer.content)) == (200, image["size_bytes"])


def test_a_part_of_the_very_picture_that_a_client_has_comes(api, image):
    headers = {"Range": "bytes=0-9", "If-Range": f'"{image["content_sha256"]}"'}

    assert api.get(image["url"], params={"redirect": "false"}, headers=headers).status_code == 206


@pytest.mark.parametrize("told", ['W/"{}"', '"{}-"', "Thu, 26 Nov 2026 18:00:00 GMT"])
def test_a_part_of_what_may_be_another_picture_is_all_of_it(api, image, told):
    """RFC 9110: If-Range compares strongly, and no date is as strong as a digest."""
    headers = {"Range": "bytes=0-9", "If-Range": told.format(image["content_sha256"])}

    assert api.get(image["url"], params={"redirect": "false"}, headers=headers).status_code == 200


def test_a_picture_that_a_client_has_is_not_sent_again(api, image):
    answer = api.get(
        image["url"],
        params={"redirect": "false"},
        headers={"If-None-Match": f'"{image["content_sha256"]}"'},
    )

    assert (answer.status_code, answer.content) == (304, b"")


def test_redirect_takes_true_and_false(api, image):
    assert api.get(image["url"], params={"redirect": "true"}).status_code == 302
    assert_problem(api.get(image["url"], params={"redirect": "maybe"}), 422, "invalid-query")


def test_an_installation_may_hand_out_every_picture_itself(proxy, api, image):
    headers = bearer(api.headers["Authorization"].partition(" ")[2])
    file = api.post(
        "/v1/files", files={"file": proxy.get(image["url"], headers=headers).data}
    ).json()

    shown, content = (
        proxy.get(image["url"], headers=headers),
        proxy.get(file["url"], headers=headers),
    )

    assert hashlib.sha256(shown.data).hexdigest() == image["content_sha256"]
    assert hashlib.sha256(content.data).hexdigest() == file["content_sha256"]
    assert len(content.data) == content.content_length == file["size_bytes"]
    assert (
        proxy.get(image["url"], headers=headers, query_string={"redirect": "true"}).status_code
        == 302
    )


def test_a_store_that_is_away_is_told_with_when_to_come_again(gateway_with, elsewhere, api, image):
    headers = bearer(api.headers["Authorization"].partition(" ")[2])

    answer = gateway_with(image_delivery="proxy", **elsewhere("object_store")).get(
        image["url"], headers=headers
    )

    assert assert_problem(answer, 503, "part-unavailable")["part"] == "object_store"
    assert answer.headers["Retry-After"] == "2"


@pytest.mark.parametrize("streams", [False, True])
def test_an_image_call_whose_store_is_away_says_so(gateway_with, elsewhere, api, streams):
    headers = {"Authorization": api.headers["Authorization"], "Idempotency-Key": uuid.uuid4().hex}
    body = {"prompt": "a red circle", "steps": 1, "tier": "fast", "stream": streams}
    made = gateway_with().post("/v1/images/generations", json=body, headers=headers)
    assert (made.status_code, "part_unavailable" in made.text) == (200, False)

    away = gateway_with(**elsewhere("object_store"))
    answer = away.post("/v1/images/generations", json=body, headers=headers)

    assert '"part_unavailable"' in answer.text
    if streams:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert assert_problem(answer, 503, "part-unavailable")["part"] == "object_store"
        assert answer.headers["Retry-After"] == "2"


def test_a_picture_that_the_store_has_lost_is_not_found(proxy, api, stack_database):
    job_body = {"prompt": "a green square", "steps": 2}
    job = api.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"}).json()
    with transaction(stack_database) as session:
        key = session.scalar(
            select(Artifact.object_key).where(Artifact.job_id == uuid.UUID(job["id"]))
        )
    proxy.application.extensions["darkroom"].store.delete(key)

    assert_problem(
        api.get(job["images"][0]["url"], params={"redirect": "false"}), 404, "image-not-found"
    )


@pytest.fixture
def link(proxy, api) -> str:
    """A link to an image, as an answer of the OpenAI dialect brings it."""
    headers = bearer(api.headers["Authorization"].partition(" ")[2])
    job_body = {"prompt": "a red circle", "steps": 2, "response_format": "url"}
    answer = proxy.post(
        "/v1/images/generations", json=job_body, headers={**headers, "Host": "images.example"}
    )
    return answer.json["data"][0]["url"]


def test_a_link_of_the_gateway_opens_without_a_key_and_with_one(proxy, link):
    path = link.removeprefix("http://images.example")
    assert path.startswith("/links/images/")

    for headers in ({}, bearer("dr_whatever")):
        answer = proxy.get(path, headers=headers)
        assert (answer.status_code, answer.content_type) == (200, "image/png")
        assert Image.open(io.BytesIO(answer.data)).size == (128, 128)
        assert answer.headers["Cache-Control"] == "private, max-age=600"
    assert proxy.head(path).status_code == 200


def test_a_link_that_was_changed_or_is_over_opens_nothing(proxy, link, gateway_with):
    path, query = (
        urlsplit(link).path,
        {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()},
    )

    for changes in (
        {"expires": "99999999999"},
        {"expires": "1"},
        {"expires": "soon"},
        {"signature": "ä"},
        {"signature": ""},
    ):
        assert_problem(proxy.get(path, query_string=query | changes), 403, "link-expired")
    assert_problem(
        proxy.get(f"/links/images/{'0' * 8}-0000-7000-8000-{'0' * 12}", query_string=query),
        403,
        "link-expired",
    )
    other = gateway_with(image_delivery="proxy", api_key_pepper="another pepper of this test")
    assert_problem(other.get(path, query_string=query), 403, "link-expired")


def test_a_link_holds_until_its_time_is_over(proxy, link, stack):
    path, pepper = urlsplit(link).path, stack.env["API_KEY_PEPPER"]
    artifact_id = uuid.UUID(path.rpartition("/")[2])

    answers = {
        ttl_s: proxy.get(path, query_string=LinkSigner(pepper, ttl_s=ttl_s).signed(artifact_id))
        for ttl_s in (60, -1)
    }

    assert answers[60].status_code == 200
    assert_problem(answers[-1], 403, "link-expired")


def test_a_link_ends_with_the_job(proxy, api, link):
    job = api.get("/v1/jobs", params={"limit": 1}).json()["data"][0]
    assert api.delete(job["urls"]["self"]).status_code == 204

    assert_problem(proxy.get(link.removeprefix("http://images.example")), 410, "erased")


def test_links_begin_with_the_public_address(gateway_with, api):
    headers = bearer(api.headers["Authorization"].partition(" ")[2])
    gateway = gateway_with(image_delivery="proxy", public_url="https://images.example/darkroom")

    job_body = {"prompt": "a red circle", "steps": 2, "response_format": "url"}
    answer = gateway.post("/v1/images/generations", json=job_body, headers=headers)

    assert answer.json["data"][0]["url"].startswith("https://images.example/darkroom/links/images/")
