"""Pictures that a tenant brings: kept once, shown, listed, erased; nobody else's business."""

import base64
import hashlib
import io
import uuid

import httpx
import pytest
from PIL import Image
from sqlalchemy import text

from models.database import transaction
from tests.app.pictures import a_picture, encoded, png
from tests.app.problem import assert_problem
from tests.builders import until


@pytest.fixture
def tenant(new_tenant):
    """HTTP as a tenant that has no files."""
    return new_tenant()


def bring(tenant, content=None, **options):
    return tenant.post("/v1/files", files={"file": ("picture", png() if content is None else content)}, **options)


def fetched(tenant, file) -> bytes:
    redirect = tenant.get(file["url"])
    assert redirect.status_code == 302
    return httpx.get(redirect.headers["Location"], trust_env=False).content


def test_a_picture_is_kept_and_comes_back_with_the_same_pixels(tenant):
    picture = a_picture(60, 40)

    answer = bring(tenant, png(picture))

    file = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/v1/files/{file['id']}")
    assert (file["width_px"], file["height_px"], file["mode"], file["content_type"]) == (60, 40, "RGB", "image/png")
    content = fetched(tenant, file)
    assert hashlib.sha256(content).hexdigest() == file["content_sha256"]
    assert len(content) == file["size_bytes"]
    assert Image.open(io.BytesIO(content)).tobytes() == picture.tobytes()
    assert tenant.get(file["urls"]["self"]).json() == file


def test_the_picture_may_be_the_body_itself(tenant):
    answer = tenant.post("/v1/files", content=png(), headers={"Content-Type": "image/png"})

    assert answer.status_code == 201
    assert answer.json()["id"] == bring(tenant).json()["id"]


def test_the_same_picture_twice_is_one_file(tenant):
    first = bring(tenant, png(compress_level=9)).json()
    second = bring(tenant, png(compress_level=0)).json()

    assert first == second
    assert len(tenant.get("/v1/files").json()["data"]) == 1


def test_a_job_starts_from_a_picture(tenant):
    file = bring(tenant, png(a_picture(128, 128))).json()

    wish = {"prompt": "a red circle", "steps": 4, "init_image": file["id"], "strength": 0.5}
    job = tenant.post("/v1/jobs", json=wish, headers={"Prefer": "wait=60"}).json()

    assert job["state"] == "succeeded", job
    assert (job["init_image"], job["strength"]) == (file["id"], 0.5)
