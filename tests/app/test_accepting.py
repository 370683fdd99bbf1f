"""POST /v1/jobs and what the tenant can ask about its job.

Accepted, shown, waited for, canceled.
"""

import time
import uuid
from datetime import datetime

import pytest

from policy.fleet import parse_fleet
from settings import REPO
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import until

FINAL = {"succeeded", "failed", "rejected", "canceled", "expired"}


def create(api, headers=None, **fields):
    return api.post(
        "/v1/jobs", json={"prompt": "a red circle", "tier": "batch", **fields}, headers=headers
    )


@pytest.fixture
def accepted(api):
    """Accept a job, and take it back in the end: its image is nobody's concern."""
    ids = []

    def accepted(**fields):
        answer = create(api, **fields)
        ids.append(answer.json().get("id"))
        return answer

    yield accepted
    for job_id in filter(None, ids):
        api.post(f"/v1/jobs/{job_id}/cancel")


def test_a_job_is_accepted_with_a_link_to_it(api, accepted):
    answer = accepted()

    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert uuid.UUID(job["id"]).version == 7
    assert api.get(answer.headers["Location"]).json()["id"] == job["id"]


def test_every_resolved_parameter_is_echoed(accepted):
    tier = parse_fleet((REPO / "fleet.toml").read_text()).tiers["quality"]

    job = accepted(tier="quality").json()

    assert {
        key: job[key]
        for key in ("object", "model", "model_version", "tier", "size", "sampler", "precision")
    } == {
        "object": "job",
        "model": "pocket",
        "model_version": "1",
        "tier": "quality",
        "size": "128x128",
        "sampler": "ddim",
        "precision": "fp32",
    }
    assert (job["prompt"], job["negative_prompt"], job["steps"], job["guidance"]) == (
        "a red circle",
        "",
        tier.default_steps,
        1.5,
    )
    assert (job["n"], job["output_format"], job["determinism"], job["bucket_rows"]) == (
        1,
        "png",
        "reproducible",
        8,
    )
    assert isinstance(job["seed"], int)
    assert [image["seed"] for image in job["images"]] == [job["seed"]]


def test_parameters_that_were_asked_for_are_echoed_as_they_were(accepted):
    job_body = {
        "prompt": "ein roter Kreis, 赤い円 🔴",
        "negative_prompt": "blue",
        "model": "pocket",
        "tier": "batch",
        "size": "128x128",
        "steps": 3,
        "guidance": 0,
        "sampler": "euler_a",
        "seed": 2**53 - 9,
        "n": 4,
        "output_format": "webp",
    }

    job = accepted(**job_body).json()

    assert {key: job[key] for key in job_body} == job_body
    assert [image["seed"] for image in job["images"]] == [
        job_body["seed"] + index for index in range(4)
    ]


def test_a_seed_is_drawn_where_none_was_asked_for(accepted):
    assert len({accepted().json()["seed"] for _ in range(3)}) == 3


JOB_BODY = (
    "prompt",
    "negative_prompt",
    "model",
    "tier",
    "size",
    "steps",
    "guidance",
    "sampler",
    "seed",
    "n",
    "output_format",
)


def test_the_resolved_parameters_are_enough_to_ask_for_the_same_again(accepted):
    job = accepted(tier="quality").json()

    again = accepted(**{key: job[key] for key in JOB_BODY}).json()

    for key in (*JOB_BODY, "model_version", "bucket_rows"):
        assert again[key] == job[key]


def test_instants_are_aware_and_in_order(finished_job):
    instants = [
        datetime.fromisoformat(finished_job[key])
        for key in ("created_at", "started_at", "rendered_at", "finished_at")
    ]

    assert instants == sorted(instants)
    assert all(instant.tzinfo for instant in instants)


def test_a_finished_job_tells_images_time_and_cost(finished_job):
    assert [image["state"] for image in finished_job["images"]] == ["stored", "stored"]
    assert finished_job["progress"] == {"step": 4, "num_steps": 4, "images_done": 2}
    assert finished_job["timing"]["total_s"] >= finished_job["timing"]["render_s"] >= 0
    assert (float(finished_job["cost"]["amount"]) > 0, finished_job["cost"]["currency"]) == (
        True,
        "USD",
    )
    assert finished_job["failure"] is None


def test_a_client_that_waits_gets_the_finished_job(api):
    answer = create(api, tier="fast", steps=1, headers={"Prefer": "respond-async, wait=60"})

    assert (answer.status_code, answer.json()["state"]) == (202, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=60"


def test_waiting_for_a_finished_job_takes_no_time(api, finished_job):
    started = time.monotonic()

    answer = api.get(finished_job["urls"]["self"], headers={"Prefer": 'wait="30"'})

    assert (answer.json()["state"], answer.headers["Preference-Applied"]) == (
        "succeeded",
        "wait=30",
    )
    assert time.monotonic() - started < 5


def test_a_wait_for_a_canceled_job_is_over(api, accepted):
    job = accepted(steps=60, n=8).json()
    api.post(job["urls"]["cancel"])

    assert api.get(job["urls"]["self"], headers={"Prefer": "wait=20"}).json()["state"] == "canceled"


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [("wait=0", None), ("wait=61", "wait=60"), ("WAIT = 7", "wait=7"), ("return=minimal", None)],
)
def test_a_preference_is_applied_as_far_as_it_goes(api, finished_job, prefer, applied):
    answer = api.get(finished_job["urls"]["self"], headers={"Prefer": prefer})

    assert (answer.status_code, answer.headers.get("Preference-Applied")) == (200, applied)


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "1e3", "", "7s", "9999999"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(api, finished_job, value, count_jobs):
    before = count_jobs()

    shown = api.get(finished_job["urls"]["self"], headers={"Prefer": f"wait={value}"})
    made = create(api, headers={"Prefer": f"wait={value}"})

    for answer in (shown, made):
        problem = assert_problem(answer, 422, "invalid-query")
        assert (problem["header"], problem["accepted"]) == ("Prefer", {"max": 60})
    assert count_jobs() == before


def test_a_job_can_be_canceled_and_canceled_again(api, accepted):
    job = accepted(steps=60, n=8).json()

    first, again = api.post(job["urls"]["cancel"]), api.post(job["urls"]["cancel"])

    assert (first.status_code, first.json()["state"]) == (200, "canceled")
    assert (again.status_code, again.json()["finished_at"]) == (200, first.json()["finished_at"])


def test_a_job_that_succeeded_cannot_be_canceled(api, finished_job):
    problem = assert_problem(api.post(finished_job["urls"]["cancel"]), 409, "job-already-finished")

    assert problem["state"] == "succeeded"


def test_a_job_accepted_while_the_broker_is_away_is_rendered_all_the_same(
    elsewhere, new_key, gateway_with
):
    gateway = gateway_with(**elsewhere("broker"))
    headers, started = bearer(new_key()), time.monotonic()

    answer = gateway.post("/v1/jobs", json={"prompt": "a red circle", "steps": 1}, headers=headers)

    assert answer.status_code == 202
    assert time.monotonic() - started < 5
    state = until(
        lambda: (
            (now := gateway.get(answer.headers["Location"], headers=headers).json["state"]) in FINAL
            and now
        ),
        within_s=60,
    )
    assert state == "succeeded"


def test_a_job_is_accepted_while_the_hand_off_is_away(elsewhere, new_key, gateway_with):
    gateway = gateway_with(**elsewhere("handoff"))
    headers = bearer(new_key())

    answer = gateway.post(
        "/v1/jobs", json={"prompt": "a red circle", "tier": "batch"}, headers=headers
    )

    assert answer.status_code == 202
    assert gateway.post(answer.json["urls"]["cancel"], headers=headers).json["state"] == "canceled"
