"""Another tenant's job does not exist, whatever is asked about it."""

import uuid

import pytest

from tests.app.problem import assert_problem


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/images/0"),
        ("GET", "/images/1"),
        ("GET", "/images/99"),
    ],
)
def test_another_tenant_s_job_is_not_found(api, stranger, finished_job, method, path):
    theirs = stranger.request(method, finished_job["urls"]["self"] + path)
    nobodys = stranger.request(method, f"/v1/jobs/{uuid.uuid4()}{path}")

    problem, unknown = (
        assert_problem(theirs, 404, "job-not-found"),
        assert_problem(nobodys, 404, "job-not-found"),
    )
    assert set(problem) == set(unknown)
    assert api.get(finished_job["urls"]["self"]).json()["state"] == "succeeded"


def test_another_tenant_s_wait_is_not_held(stranger, finished_job):
    answer = stranger.get(finished_job["urls"]["self"], headers={"Prefer": "wait=30"})

    assert_problem(answer, 404, "job-not-found")


def test_another_tenant_s_running_job_is_not_canceled(api, stranger):
    job = api.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch", "steps": 60}).json()

    assert_problem(stranger.post(job["urls"]["cancel"]), 404, "job-not-found")

    assert api.get(job["urls"]["self"]).json()["state"] != "canceled"
    api.post(job["urls"]["cancel"])
