"""POST /v1/estimate: what a job would be, cost and wait for, and not a row of it."""

import pytest

from models import learning, workers
from models.database import transaction
from models.learning import ImageTimings
from tests.app.moments import of_this_moment
from tests.app.problem import assert_problem

BODY = {
    "prompt": "a red circle",
    "tier": "batch",
    "steps": 60,
    "seed": 7,
    "n": 2,
    "metadata": {"a": "b"},
}
URL = "/v1/estimate"


def test_an_estimate_says_what_the_job_would_be_and_writes_nothing(a_house, count_jobs):
    tenant, before = a_house().with_workers().tenant(), count_jobs()

    estimate = tenant.send(URL, BODY).json
    assert count_jobs() == before
    job = tenant.send("/v1/jobs", BODY).json

    same = set(estimate) & set(job) - {"object", "cost", "queue"}
    assert {
        "model_version",
        "sampler",
        "guidance",
        "size",
        "seed",
        "determinism",
        "megapixel_steps",
        "metadata",
    } <= same
    assert {name: estimate[name] for name in same} == {name: job[name] for name in same}
    assert estimate["queue"]["jobs_ahead"] == job["queue"]["jobs_ahead"] == 0
    assert 0 < estimate["queue"]["eta_p50_s"] <= estimate["queue"]["eta_p90_s"]
    assert (estimate["can_be_served"], estimate["refusal"]) == (True, None)


def test_it_has_a_price_as_a_job_has_its_cost(api, finished_job):
    job_body = {"prompt": "a red circle", "n": 2, "steps": 2}

    cost = api.post(URL, json=job_body).json()["cost"]

    assert set(cost) == set(finished_job["cost"])
    assert cost["gpu_seconds"] > 0
    assert 0 < float(cost["amount"]) < 100 * float(finished_job["cost"]["amount"])


def test_twice_the_steps_cost_more_and_count_twice(api):
    once, twice = (api.post(URL, json={**BODY, "steps": steps}).json() for steps in (30, 60))

    assert twice["megapixel_steps"] == 2 * once["megapixel_steps"]
    assert twice["cost"]["gpu_seconds"] > once["cost"]["gpu_seconds"]


def test_an_estimate_says_when_the_job_could_not_be_served_now_and_why(a_house):
    estimate = a_house().tenant().send(URL, BODY)

    assert (estimate.status_code, estimate.json["can_be_served"]) == (200, False)
    refusal = estimate.json["refusal"]
    assert (refusal["type"], refusal["status"], refusal["reason"]) == (
        "/problems/model-unserved",
        503,
        "unserved",
    )
    assert refusal["retry_after_s"] >= 1


def test_with_more_before_it_the_wait_is_longer(a_house):
    house = a_house().with_workers()
    tenant = house.tenant()
    before = of_this_moment(lambda: tenant.send(URL, BODY)).json["queue"]

    house.runs(predicted_s=300)

    assert (
        of_this_moment(lambda: tenant.send(URL, BODY)).json["queue"]["eta_p50_s"]
        > before["eta_p50_s"]
    )


def test_estimate_is_the_mean_of_the_classes_that_may_render_the_job(a_house, stack_database):
    classes = {"spot": {"gpu_hour_price": 3600.0}, "mine": {"gpu_hour_price": 36000.0}}
    house = a_house({"pools.POOL.classes": classes, "tiers.quality.price_weight": 1.0})
    with transaction(stack_database) as session:
        for name, slots in (("spot", 6), ("mine", 2)):
            workers.heartbeat(
                session,
                name=f"{name}@{house.pool}",
                pool=house.pool,
                capacity_class=name,
                device="cpu",
                slots=slots,
                facts={},
            )
            # One second a step on the spot market, two on the others.
            taken = ImageTimings(images=1, row_steps=1.0, denoise_s=1.0 if slots == 6 else 2.0)
            learning.observe(session, {(f"{house.pool}.{name}", "pocket", 128, 128): taken})

    body = BODY | {"tier": "quality", "size": "128x128", "steps": 10, "guidance": 1.0, "n": 1}
    cost = house.tenant().send(URL, body).json["cost"]

    assert cost["gpu_seconds"] == pytest.approx(0.75 * 10 + 0.25 * 20)
    assert float(cost["amount"]) == pytest.approx(0.75 * 10 + 0.25 * 20 * 10)


@pytest.mark.parametrize("asked", [{}, {"seed": None}, {"seed": -1}])
def test_a_seed_that_was_not_asked_for_is_not_promised(api, asked):
    assert api.post(URL, json={"prompt": "a red circle", **asked}).json()["seed"] is None


UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    "change",
    [{"steps": 100_000}, {"nosuch": 1}, {"start_deadline_s": 1e9}, {"init_image": UNKNOWN}],
)
def test_an_estimate_of_an_impossible_job_has_the_same_problem_as_the_job(api, change):
    problems = [
        assert_problem(api.post(url, json={**BODY, **change}), 422, "invalid-image-request")
        for url in (URL, "/v1/jobs")
    ]

    assert problems[0]["errors"] == problems[1]["errors"]


def test_a_picture_that_is_not_stored_yet_counts_without_being_stored(api):
    estimate = api.post(URL, json={**BODY, "init_image": "data:image/png;base64,AAAA"}).json()

    assert (estimate["strength"], estimate["init_image"]) == (0.8, None)
