"""Uploads that are many, large or slow.

How many bodies come in at once, and what happens when the temporary folder is full.
"""

import base64
import io
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from flask import Flask, request
from PIL import Image

from app.http import uploads
from app.live.uploads import UploadRoom
from app.problems import UploadsExhausted
from settings import GatewaySettings
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import settings_for, until

ROOM = 4_000_000


@pytest.fixture(scope="module")
def gateway(a_gateway):
    """One whose temporary folder may hold little."""
    return a_gateway(upload_spool_bytes=ROOM, max_upload_bytes=3_000_000, gateway_threads=64)


def a_large_picture():
    """A PNG of some 1.5 MB: noise does not shrink."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (720, 720, 3), dtype=np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


@pytest.mark.parametrize("how", ["itself", "form"])
def test_more_uploads_than_there_is_room_for_are_asked_to_come_back(gateway, new_key, how):
    picture, key = a_large_picture(), new_key()

    def bring(_):
        if how == "form":
            return httpx.post(
                f"{gateway}/v1/files",
                files={"file": picture},
                headers=bearer(key),
                timeout=60,
                trust_env=False,
            )
        headers = {**bearer(key), "Content-Type": "image/png"}
        return httpx.post(
            f"{gateway}/v1/files", content=picture, headers=headers, timeout=60, trust_env=False
        )

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(bring, range(12)))

    assert {answer.status_code for answer in answers} == {201, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert_problem(answer, 503, "uploads-exhausted")
            assert int(answer.headers["Retry-After"]) > 0
    assert bring(None).status_code == 201  # what they held was given back


def test_a_full_temporary_folder_is_a_503_and_no_fault(monkeypatch, gateway_with, new_key):
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda *args, **options: open("/dev/full", "w+b"),  # noqa: SIM115
    )

    for body in (
        {"data": a_large_picture(), "content_type": "image/png"},
        {"data": {"file": (io.BytesIO(a_large_picture()), "x.png")}},
    ):
        answer = gateway_with().post("/v1/files", headers=bearer(new_key()), **body)

        assert_problem(answer, 503, "uploads-exhausted")
        assert int(answer.headers["Retry-After"]) > 0


class Room:
    """Room for uploads without an end, that tells what was taken of it."""

    largest_bytes = ROOM

    def __init__(self) -> None:
        self.taken = []

    def take_body(self, tenant_id):
        self.taken.append("a body")

    def take_spool(self, tenant_id, size_bytes):
        self.taken.append(size_bytes)


@pytest.mark.parametrize(
    ("size_bytes", "headers", "taken"),
    [
        (None, {}, []),
        (65_536, {}, []),
        (65_537, {}, ["a body", 65_537]),
        (65_537, {"Content-Type": "application/json"}, ["a body"]),
        (1, {"Expect": "100-continue"}, ["a body", 1]),
        (0, {"Expect": "100-continue"}, []),
        (None, {"Transfer-Encoding": "Chunked"}, ["a body", ROOM]),
        (None, {"Transfer-Encoding": "gzip"}, []),
        (ROOM, {}, ["a body", ROOM]),
        (ROOM + 1, {}, []),  # it is refused where it is read
    ],
)
def test_a_large_or_awaited_body_takes_room_before_it_is_read(size_bytes, headers, taken):
    room = Room()
    length = {} if size_bytes is None else {"CONTENT_LENGTH": str(size_bytes)}

    with Flask("here").test_request_context(headers=headers, environ_overrides=length):
        uploads.admit(request, room, uuid.uuid4())

    assert room.taken == taken


PICTURE = f"data:image/png;base64,{base64.b64encode(a_large_picture()).decode()}"
WAITS = [
    pytest.param(
        "/v1/jobs", {"tier": "batch", "init_image": PICTURE}, {"Prefer": "wait=30"}, id="a job"
    ),
    pytest.param("/v1/images/edits", {"tier": "batch", "image": PICTURE}, {}, id="an edit"),
]


@pytest.mark.parametrize(("path", "job_body", "headers"), WAITS)
def test_a_body_whose_job_is_waited_for_leaves_its_room_to_others(
    a_gateway,
    new_key,
    unserved,
    path,
    job_body,
    headers,
):
    few = {"gateway_max_uploads": 1, "gateway_threads": 8}
    gateway, key = a_gateway(**few, **unserved), new_key()
    options = {"headers": bearer(key), "timeout": 60, "trust_env": False}
    with httpx.Client(base_url=gateway, **options) as client, ThreadPoolExecutor(1) as threads:
        waits = threads.submit(
            client.post, path, json={"prompt": "a red circle", **job_body}, headers=headers
        )
        job = until(lambda: client.get("/v1/jobs").json()["data"], what="the job")[0]

        def brings():
            return client.post(
                "/v1/files", content=a_large_picture(), headers={"Content-Type": "image/png"}
            )

        until(lambda: brings().status_code == 201, what="room for another upload")
        assert not waits.done()
        client.post(job["urls"]["cancel"])
        assert waits.result().status_code in (202, 409)


def test_a_small_upload_needs_no_disk(monkeypatch):
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda *args, **options: open("/dev/full", "w+b"),  # noqa: SIM115
    )

    with uploads.Spool() as spool:
        spool.write(bytes(uploads.IN_MEMORY_BYTES))
        spool.seek(0)
        assert len(spool.read()) == uploads.IN_MEMORY_BYTES


def test_a_disk_that_is_full_is_told_whenever_it_shows(monkeypatch):
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda *args, **options: open("/dev/full", "w+b"),  # noqa: SIM115
    )
    spool = uploads.Spool()

    def fill():
        while True:
            spool.write(bytes(65_536))

    with pytest.raises(UploadsExhausted):
        fill()
    spool.close()  # which would write what is left


def test_one_upload_of_the_largest_size_has_room_on_the_smallest_disk(stack):
    settings = settings_for(GatewaySettings, stack.env, upload_spool_bytes=1)
    room, tenant_id = UploadRoom(settings), uuid.uuid4()

    with room.take_spool(tenant_id, room.largest_bytes), pytest.raises(UploadsExhausted):
        room.take_spool(uuid.uuid4(), room.largest_bytes)

    assert room.largest_bytes >= settings.max_upload_bytes
