"""POST /v1/jobs:batch: up to a thousand jobs in one request, each checked by itself, all written or
none.
"""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app.http.idempotency import REPLAYED
from app.problems import FleetSaturated, InvalidImageRequest
from app.services.batches import MAX_PROBLEM_CHARS, MAX_SHORT_DETAIL_CHARS, _noted
from models.database import transaction
from tests.app.conftest import bearer
from tests.app.moments import of_this_moment
from tests.app.problem import assert_problem

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 60}
URL = "/v1/jobs:batch"
_SECOND = timedelta(seconds=1)
DEEP = {"tiers.batch.max_queued_s_per_tenant": 1e9}


@pytest.mark.slow
def test_a_thousand_jobs_are_accepted_in_their_order_within_seconds(a_house, stack):
    tenant = a_house(DEEP).with_workers().tenant()
    began = time.monotonic()

    answer = tenant.send(URL, {"jobs": [{"seed": seed} for seed in range(1000)], "defaults": BODY})

    assert time.monotonic() - began < 20  # some 1.3 s of work on a machine that does nothing else
    batch = answer.json
    assert (answer.status_code, batch["accepted"], batch["refused"]) == (200, 1000, 0)
    assert {item["status"] for item in batch["data"]} == {202}
    ids = [item["job"]["id"] for item in batch["data"]]
    assert ids == sorted(set(ids))
    assert [item["job"]["seed"] for item in batch["data"]] == list(range(1000))


def test_a_batch_leaves_what_single_requests_would(a_house, stack_database):
    tenant = a_house().with_workers().tenant()
    job_bodies = [
        {**BODY, "seed": 3, "n": 2, "metadata": {"a": "b"}, "start_deadline_s": 600},
        {**BODY, "tier": "quality", "seed": 4},
    ]

    alone = [tenant.send("/v1/jobs", job_body).json for job_body in job_bodies]
    together = [
        tenant.get(item["job"]) for item in tenant.send(URL, {"jobs": job_bodies}).json["data"]
    ]

    own = {"id", "urls", "created_at", "start_by", "queue", "images"}
    for one, other in zip(alone, together, strict=True):
        assert {name: one[name] for name in one if name not in own} == {
            name: other[name] for name in other if name not in own
        }
        assert [{**image, "url": None} for image in one["images"]] == [
            {**image, "url": None} for image in other["images"]
        ]
    with transaction(stack_database) as session:
        rows = session.execute(
            text("SELECT * FROM jobs WHERE id = ANY(CAST(:ids AS uuid[]))"),
            {"ids": [job["id"] for job in alone + together]},
        )
        by_id = {str(row.id): row for row in rows}
    for one, other in zip(alone, together, strict=True):
        first, second = by_id[one["id"]], by_id[other["id"]]
        for column in (
            "api_key_id",
            "predicted_s",
            "run_within_s",
            "megapixel_steps",
            "usage_day",
            "currency",
            "metadata",
            "state",
        ):
            assert getattr(first, column) == getattr(second, column), column
        assert second.release_tag >= first.release_tag
        assert second.start_by - second.accepted_at == pytest.approx(
            first.start_by - first.accepted_at, abs=_SECOND
        )


def test_a_bad_item_does_not_refuse_the_others(api):
    jobs = [
        BODY,
        {**BODY, "steps": 100_000},
        "nonsense",
        {"prompt": 5},
        {**BODY, "nosuch": 1},
        {**BODY, "init_image": str(uuid.uuid4())},
        BODY,
    ]

    batch = api.post(URL, json={"jobs": jobs}).json()

    assert [item["status"] for item in batch["data"]] == [202, 422, 422, 422, 422, 422, 202]
    assert (batch["accepted"], batch["refused"]) == (2, 5)
    assert [
        item["problem"]["errors"][0]["pointer"]
        for item in batch["data"][1:6]
        if item["problem"]["errors"]
    ] == [
        "/steps",
        "/",
        "/prompt",
        "/nosuch",
        "/init_image",
    ]
    cancel_all(api, batch)


def test_defaults_say_once_what_the_items_have_in_common(api):
    batch = api.post(
        URL,
        json={
            "jobs": [{"prompt": "one"}, {"prompt": "two", "steps": 7}],
            "defaults": {**BODY, "seed": 9},
        },
    ).json()

    jobs = [api.get(item["job"]["urls"]["self"]).json() for item in batch["data"]]
    assert [(job["prompt"], job["steps"], job["seed"]) for job in jobs] == [
        ("one", 60, 9),
        ("two", 7, 9),
    ]
    cancel_all(api, batch)


def test_a_tenant_s_cap_on_waiting_jobs_holds_within_a_batch_too(a_house):
    """Each item of 8 images of 60 steps; the cap has room for a few of them."""
    house = a_house().with_workers()
    own_s = house.tenant().send("/v1/estimate", {**BODY, "n": 8}).json["cost"]["gpu_seconds"]
    capped = a_house({"tiers.batch.max_queued_s_per_tenant": own_s * 3.5}).with_workers().tenant()

    batch = capped.send(URL, {"jobs": [{**BODY, "n": 8}] * 5}).json

    assert [item["status"] for item in batch["data"]] == [202, 202, 202, 429, 429]
    problem = batch["data"][3]["problem"]
    assert (problem["type"], problem["retry_after_s"] >= 1) == ("/problems/tenant-queue-full", True)


def test_the_same_batch_under_the_same_key_is_the_same_jobs(api):
    key = {"Idempotency-Key": str(uuid.uuid4())}
    body = {"jobs": [BODY, {**BODY, "steps": 0}, {**BODY, "\x00\ud800": 1}]}
    content = {"content": json.dumps(body), "headers": {**key, "Content-Type": "application/json"}}

    first, second = (api.post(URL, **content) for _ in range(2))
    other = api.post(URL, json={"jobs": [BODY]}, headers=key)

    assert (first.status_code, second.status_code, second.headers[REPLAYED]) == (200, 200, "true")
    assert ids(first.json()) == ids(second.json())
    assert first.json()["data"][1] == second.json()["data"][1]
    assert_problem(other, 422, "idempotency-key-reused")
    cancel_all(api, first.json())


def test_racing_batches_under_one_key_are_one_batch(gateway_with, new_key):
    own, app = bearer(new_key()), gateway_with().application
    key = {"Idempotency-Key": str(uuid.uuid4())}

    def send(_):
        return app.test_client().post(URL, json={"jobs": [BODY] * 5}, headers={**own, **key})

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(send, range(12)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({item["job"]["id"] for answer in answers for item in answer.json["data"]}) == 5
    assert sum(REPLAYED not in answer.headers for answer in answers) == 1


def test_a_batch_of_which_nothing_was_accepted_may_come_again_under_its_key(a_house):
    house, key = a_house(), {"Idempotency-Key": str(uuid.uuid4())}
    tenant = house.tenant()
    assert tenant.send(URL, {"jobs": [BODY]}, headers=key).json["accepted"] == 0

    house.with_workers()

    assert (
        of_this_moment(lambda: tenant.send(URL, {"jobs": [BODY]}, headers=key)).json["accepted"]
        == 1
    )


def test_batches_and_single_jobs_of_one_tenant_do_not_lock_each_other_out(gateway_with, new_key):
    """Two flows, locked by every batch in one order, whatever the order of its items."""
    own, app = bearer(new_key()), gateway_with().application
    both = [{**BODY, "tier": "batch"}, {**BODY, "tier": "quality"}]

    def send(number):
        jobs = both if number % 2 else both[::-1]
        return app.test_client().post(URL, json={"jobs": jobs * 2}, headers=own).status_code

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(send, range(24))) == {200}


def test_problems_beyond_what_an_answer_holds_are_shortened_to_what_a_client_acts_on():
    errors = [{"pointer": f"/field{number}", "detail": "x" * 500} for number in range(3)]
    long = FleetSaturated("y" * MAX_PROBLEM_CHARS, retry_after_s=7)
    wrong = InvalidImageRequest("z" * 500, errors=errors, errors_left_out=4)

    saturated, invalid = (note["problem"] for note in _noted([long, wrong]))

    kept = {"type": "/problems/fleet-saturated", "title": "Fleet saturated", "status": 503}
    assert saturated == kept | {"detail": "y" * MAX_SHORT_DETAIL_CHARS, "retry_after_s": 7}
    assert (invalid["type"], len(invalid["detail"])) == (
        "/problems/invalid-image-request",
        MAX_SHORT_DETAIL_CHARS,
    )
    assert invalid["errors"] == [{"pointer": "/field0", "detail": "x" * MAX_SHORT_DETAIL_CHARS}]
    assert invalid["errors_left_out"] == 2 + 4


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/jobs"),
        ({"jobs": []}, "/jobs"),
        ({"jobs": {}}, "/jobs"),
        ({"jobs": [BODY] * 1001}, "/jobs"),
        ({"jobs": [BODY], "defaults": []}, "/defaults"),
        ({"jobs": [BODY], "prompt": "x"}, "/prompt"),
    ],
)
def test_a_batch_that_is_none_is_refused(api, body, pointer):
    problem = assert_problem(api.post(URL, json=body), 422, "invalid-image-request")

    assert problem["errors"][0]["pointer"] == pointer


def test_a_batch_may_be_larger_than_a_job_and_has_a_limit_of_its_own(api):
    long = {**BODY, "metadata": {f"note-{number}": "x" * 500 for number in range(16)}}
    batch = api.post(URL, json={"jobs": [long] * 40}).json()
    assert batch["accepted"] == 40

    assert_problem(
        api.post(URL, content=b" " * 4_200_000, headers={"Content-Type": "application/json"}),
        413,
        "body-too-large",
    )
    cancel_all(api, batch)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "seed", "n", "metadata", "adapters"]), inner)
    ),
    max_leaves=6,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(["jobs", "defaults", "x"]), JSON | st.lists(JSON, max_size=4), max_size=3
    )
)
def test_whatever_comes_is_answered(api, body):
    answer = api.post(URL, json=body)

    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        cancel_all(api, answer.json())


def ids(batch):
    return [item["job"]["id"] if "job" in item else None for item in batch["data"]]


def cancel_all(api, batch):
    for item in batch["data"]:
        if "job" in item:
            api.post(item["job"]["urls"]["cancel"])
