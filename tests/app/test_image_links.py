"""The way to the images: a redirect to a URL that is its own permission, and the bytes that the job told of."""

import hashlib
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from edges.handoff import pixels_sha256
from tests.app.problem import assert_problem


def fetch(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


@pytest.mark.parametrize("index", [0, 1])
def test_the_image_comes_without_a_key_and_is_the_one_that_the_job_told_of(api, finished_job, index):
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
    assert_problem(api.get(f"{finished_job['urls']['self']}/images/99999999999999999999"), 404, "image-not-found")
    assert_problem(api.get(f"{finished_job['urls']['self']}/images/-1"), 404, "not-found")


def test_an_image_that_may_still_come_is_worth_waiting_for(api):
    job = api.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch", "steps": 60, "n": 8}).json()

    answer = api.get(f"{job['urls']['self']}/images/7")

    assert_problem(answer, 409, "image-not-ready")
    assert answer.headers["Retry-After"] == "1"
    api.post(job["urls"]["cancel"])


def test_an_image_that_will_not_come_is_not(api, canceled_job):
    answer = api.get(f"{canceled_job['urls']['self']}/images/0")

    assert assert_problem(answer, 409, "image-not-ready")["state"] == "canceled"
    assert "Retry-After" not in answer.headers
    assert canceled_job["images"][0]["url"] is None
