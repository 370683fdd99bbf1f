"""Pictures are looked at last: what is refused anyhow costs no decoding, no fetch and no room.

What is stored counts against a quota.
"""

import base64
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import httpx
import pytest
from sqlalchemy import text

from app.services.inputs import MAX_NEW_PICTURES
from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import NO_TLS, bearer
from tests.app.problem import assert_problem
from tests.builders import a_closed_port
from tests.pictures import a_picture, png

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 10}
COST = 128 * 128 / 1e6 * 10


@pytest.fixture
def limited(stack, stack_database):
    """HTTP as a new tenant with these limits."""
    made = []

    def limited(**limits) -> httpx.Client:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            if limits:
                tenants.limit(session, tenant, changes=limits, actor="tests")
            _, key = api_keys.issue(
                session,
                tenant_id=tenant.id,
                name="tests",
                pepper=stack.env["API_KEY_PEPPER"],
                actor="tests",
            )
        made.append(
            httpx.Client(
                base_url=stack.env["DARKROOM_URL"],
                headers=bearer(key),
                timeout=90,
                trust_env=False,
                verify=NO_TLS,
            )
        )
        return made[-1]

    yield limited
    for client in made:
        for job in client.get("/v1/jobs", params={"limit": 100, "state": "queued"}).json()["data"]:
            client.post(job["urls"]["cancel"])
        client.close()


def data_url(seed: int = 0, width_px: int = 30) -> str:
    return "data:image/png;base64," + base64.b64encode(png(a_picture(width_px, 20 + seed))).decode()


def files_of(client) -> list[dict]:
    return client.get("/v1/files", params={"limit": 100}).json()["data"]


REFUSED = [
    pytest.param({}, {"steps": -1}, 422, id="a field out of range"),
    pytest.param({}, {"tier": "nosuch"}, 422, id="an unknown tier"),
    pytest.param({}, {"start_deadline_s": 1e9}, 422, id="a deadline that is too long"),
    pytest.param({"allowed_tiers": ["fast"]}, {}, 403, id="a tier that the tenant may not use"),
    pytest.param({"daily_megapixel_steps": Decimal("0")}, {}, 403, id="no quota"),
    pytest.param(
        {"megapixel_steps_per_minute": 1.0, "burst_megapixel_steps": COST / 2},
        {},
        422,
        id="a budget that never holds it",
    ),
]


@pytest.mark.parametrize(("limits", "change", "status"), REFUSED)
def test_a_job_that_is_refused_leaves_no_picture(limited, limits, change, status):
    client = limited(**limits)

    answer = client.post("/v1/jobs", json={**BODY, "init_image": data_url(), **change})

    assert answer.status_code == status, answer.json()
    assert files_of(client) == []


@pytest.mark.parametrize(("limits", "change", "status"), REFUSED)
def test_a_batch_that_is_refused_leaves_none_either(limited, limits, change, status):
    client = limited(**limits)

    answer = client.post(
        "/v1/jobs:batch",
        json={"jobs": [{**BODY, "init_image": data_url(seed), **change} for seed in range(3)]},
    )

    assert answer.status_code in (status, 200)
    if answer.status_code == 200:
        assert {item["status"] for item in answer.json()["data"]} == {status}
    assert files_of(client) == []


@pytest.mark.parametrize(
    ("limits", "change", "status"),
    [case for case in REFUSED if case.id not in ("a deadline that is too long",)],
)
def test_neither_does_an_edit(limited, limits, change, status):
    client = limited(**limits)

    answer = client.post(
        "/v1/images/edits",
        data={**BODY, **change},
        files={"image": ("a.png", png()), "mask": ("m.png", png())},
    )

    assert answer.status_code == (400 if status == 422 else status), answer.json()
    assert files_of(client) == []


def test_a_spent_budget_is_found_before_a_picture_is_decoded_and_nothing_is_taken(
    limited,
):
    client = limited(megapixel_steps_per_minute=0.06, burst_megapixel_steps=COST * 1.5)
    assert client.post("/v1/jobs", json={**BODY, "init_image": data_url(1)}).status_code == 202

    answers = [
        client.post("/v1/jobs", json={**BODY, **more}) for more in ({"init_image": data_url(2)}, {})
    ]

    for answer in answers:
        assert assert_problem(answer, 429, "budget-spent")["policy"] == "megapixel-steps"
        assert 10 < int(answer.headers["Retry-After"]) <= COST / 2 / 0.001 + 1
    assert len(files_of(client)) == 1
    assert client.post("/v1/jobs", json={**BODY, "steps": 4}).status_code == 202


def test_one_job_too_many_is_found_before_its_picture_is_decoded(limited):
    client = limited(max_concurrent_jobs=1)
    client.post("/v1/jobs", json={**BODY, "n": 8, "steps": 60})

    assert_problem(
        client.post("/v1/jobs", json={**BODY, "init_image": data_url(2)}), 429, "too-many-jobs"
    )

    assert files_of(client) == []


def test_a_batch_of_too_many_jobs_is_found_before_its_pictures_are_decoded(limited):
    client = limited(max_concurrent_jobs=2)
    jobs = [{**BODY, "init_image": data_url(seed)} for seed in range(3)]

    refused = client.post("/v1/jobs:batch", json={"jobs": jobs})

    assert_problem(refused, 422, "invalid-image-request")
    assert files_of(client) == []
    assert client.post("/v1/jobs:batch", json={"jobs": jobs[:2]}).json()["accepted"] == 2


def test_a_key_that_only_reads_brings_nothing(stack, stack_database, limited):
    client = limited()
    tenant_id = uuid.UUID(client.get("/v1/key").json()["tenant_id"])
    with transaction(stack_database) as session:
        own = {
            "tenant_id": tenant_id,
            "name": "reads",
            "pepper": stack.env["API_KEY_PEPPER"],
            "actor": "tests",
        }
        _, key = api_keys.issue(session, scopes=["read"], **own)

    refused = client.post(
        "/v1/files", content=png(), headers={**bearer(key), "Content-Type": "image/png"}
    )
    estimate = client.post(
        "/v1/estimate", json={**BODY, "init_image": data_url()}, headers=bearer(key)
    )

    assert_problem(refused, 403, "forbidden")
    assert (estimate.status_code, estimate.json()["strength"]) == (200, 0.8)
    assert files_of(client) == []


def test_a_request_brings_only_so_many_new_pictures(limited):
    client = limited()
    jobs = [{**BODY, "init_image": data_url(seed)} for seed in range(MAX_NEW_PICTURES + 3)]

    batch = client.post("/v1/jobs:batch", json={"jobs": [*jobs, jobs[0]]}).json()

    assert [item["status"] for item in batch["data"]] == [202] * MAX_NEW_PICTURES + [422] * 3 + [
        202
    ]
    error = batch["data"][-2]["problem"]["errors"][0]
    assert (error["pointer"], error["accepted"]) == (
        "/init_image",
        {"max_new_pictures": MAX_NEW_PICTURES},
    )
    assert len(files_of(client)) == MAX_NEW_PICTURES


def test_pictures_that_are_no_pictures_count_as_new_ones_and_are_decoded_once(limited):
    client = limited()
    nothing = [
        "data:image/png;base64," + base64.b64encode(f"nothing {n}".encode()).decode()
        for n in range(MAX_NEW_PICTURES)
    ]

    batch = client.post(
        "/v1/jobs:batch",
        json={"jobs": [{**BODY, "init_image": url} for url in [*nothing, nothing[0], data_url()]]},
    ).json()

    kinds = [item["problem"]["type"] for item in batch["data"]]
    assert kinds == ["/problems/invalid-picture"] * (MAX_NEW_PICTURES + 1) + [
        "/problems/invalid-image-request"
    ]


def test_files_that_are_there_are_no_new_pictures(limited):
    client = limited()
    file = client.post("/v1/files", content=png(), headers={"Content-Type": "image/png"}).json()

    batch = client.post(
        "/v1/jobs:batch", json={"jobs": [{**BODY, "init_image": file["id"]}] * 30}
    ).json()

    assert batch["accepted"] == 30


def test_nothing_is_fetched_for_a_job_that_is_refused(limited):
    """There is nothing at that address: an attempt to fetch it would be what the refusal tells."""
    client, url = limited(url_inputs=True), f"http://127.0.0.1:{a_closed_port()}/a.png"

    def pointer(**change):
        problem = assert_problem(
            client.post("/v1/jobs", json={**BODY, "init_image": url, **change}),
            422,
            "invalid-image-request",
        )
        return problem["errors"][0]["pointer"]

    assert (pointer(steps=-1), pointer()) == ("/steps", "/init_image")


def stored(client) -> dict:
    return client.get("/v1/usage").json()["stored_files"]


def upload(client, content: bytes):
    return client.post("/v1/files", content=content, headers={"Content-Type": "image/png"})


def test_files_are_counted_while_they_are_stored_and_no_more_once_they_are_erased(limited):
    client = limited()
    files = [upload(client, png(a_picture(20, 20 + seed))).json() for seed in (0, 1, 1)]

    assert stored(client) == {
        "count": 2,
        "size_bytes": files[0]["size_bytes"] + files[1]["size_bytes"],
    }
    for _ in range(2):
        client.delete(files[0]["urls"]["self"])
    assert stored(client) == {"count": 1, "size_bytes": files[1]["size_bytes"]}


def test_a_quota_of_bytes_is_told_and_refuses_what_does_not_fit(limited):
    first = png(a_picture(20, 20))
    client = limited(max_stored_bytes=len(first) * 2)
    assert client.get("/v1/key").json()["limits"]["max_stored_bytes"] == len(first) * 2
    file = upload(client, first).json()

    refused = upload(client, png(a_picture(200, 200)))
    job = client.post("/v1/jobs", json={**BODY, "init_image": data_url(width_px=300)})
    again = upload(client, first)

    problem = assert_problem(refused, 409, "storage-quota-exceeded")
    assert (problem["max_stored_bytes"], refused.headers["X-Should-Retry"]) == (
        len(first) * 2,
        "false",
    )
    assert_problem(job, 409, "storage-quota-exceeded")
    assert again.json()["id"] == file["id"]
    assert stored(client) == {"count": 1, "size_bytes": file["size_bytes"]}


@pytest.mark.parametrize(("spare_bytes", "status"), [(0, 201), (-1, 409)])
def test_pictures_may_fill_the_quota_of_bytes_to_the_last_one(limited, spare_bytes, status):
    size_bytes = upload(limited(), png()).json()["size_bytes"]
    client = limited(max_stored_bytes=size_bytes + spare_bytes)

    assert upload(client, png()).status_code == status


def test_the_quota_of_bytes_is_exact_under_racing_uploads(limited, gateway_with):
    pictures = [png(a_picture(64, 64, seed=0).rotate(7 * turn)) for turn in range(20)]
    client = limited()
    sizes = [upload(client, picture).json()["size_bytes"] for picture in pictures]
    most = sum(sizes) // 2
    racing = limited(max_stored_bytes=most)
    app, key = gateway_with().application, {"Authorization": racing.headers["Authorization"]}

    def send(place):
        if place % 2:
            return (
                app.test_client()
                .post("/v1/files", data=pictures[place], headers=key, content_type="image/png")
                .status_code
            )
        return upload(racing, pictures[place]).status_code

    with ThreadPoolExecutor(12) as threads:
        answers = Counter(threads.map(send, range(20)))

    assert answers.keys() == {201, 409}
    assert stored(racing)["count"] == answers[201]
    assert most - max(sizes) < stored(racing)["size_bytes"] <= most


def test_a_quota_that_was_lowered_refuses_new_pictures_and_keeps_the_old(limited, stack_database):
    client = limited()
    file = upload(client, png()).json()
    tenant_id = client.get("/v1/key").json()["tenant_id"]
    with transaction(stack_database) as session:
        session.execute(
            text("UPDATE tenants SET max_stored_bytes = 0 WHERE id = :id"), {"id": tenant_id}
        )

    answers = [upload(client, png(a_picture(20, 20 + seed))) for seed in range(3)]
    while answers[-1].status_code == 201:  # keys know of it within a second
        answers.append(upload(client, png(a_picture(20, 40 + len(answers)))))

    assert_problem(answers[-1], 409, "storage-quota-exceeded")
    assert client.get(file["urls"]["self"]).status_code == 200
    assert upload(client, png()).json()["id"] == file["id"]
    assert client.post("/v1/jobs", json={**BODY, "init_image": file["id"]}).status_code == 202
