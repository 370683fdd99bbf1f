"""DELETE /v1/jobs/{id}: what it was about is gone; that it was, and what it cost, stays."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import redis
from sqlalchemy import text

from edges.handoff import Handoff
from edges.inputs import Inputs
from edges.progress import JobSignals, ProgressWriter, Step
from edges.snapshots import Snapshots
from models import erasing, jobs, leases, uploads
from models.database import make_engine, transaction
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import (
    a_lease,
    a_succeeded_job,
    a_tenant,
    an_artifact,
    hand_off,
    some_pixels,
    store,
    until,
)

JOB_BODY = {
    "prompt": "a secret circle",
    "negative_prompt": "a secret square",
    "metadata": {"secret": "yes"},
    "steps": 1,
    "n": 2,
}


@pytest.fixture(scope="module")
def owner(stack):
    """Who may read what happened."""
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


def events_of(owner, job) -> list[str]:
    query = "SELECT event FROM audit_events WHERE job_id = :id ORDER BY seq"
    with transaction(owner) as session:
        return list(session.scalars(text(query), {"id": job["id"]}))


def test_an_erased_job_is_empty_and_its_bill_and_digests_stay(api, stack_database, owner):
    job = api.post(
        "/v1/jobs", json={**JOB_BODY, "seed": 987_001}, headers={"Prefer": "wait=60"}
    ).json()
    assert job["state"] == "succeeded"
    object_url = api.get(job["images"][0]["url"]).headers["Location"]
    assert httpx.get(object_url, trust_env=False).status_code == 200

    answers = [api.delete(job["urls"]["self"]) for _ in range(2)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(204, b"")] * 2
    after = api.get(job["urls"]["self"]).json()
    assert (after["prompt"], after["negative_prompt"], after["metadata"], after["state"]) == (
        None,
        None,
        {},
        "succeeded",
    )
    assert (after["erased_at"] is not None, after["cost"], after["seed"]) == (
        True,
        job["cost"],
        job["seed"],
    )
    assert [(image["url"], image["pixels_sha256"]) for image in after["images"]] == [
        (None, image["pixels_sha256"]) for image in job["images"]
    ]
    assert_problem(api.get(job["images"][0]["url"]), 410, "erased")
    assert api.get(job["urls"]["status"]).json()["erased_at"] is not None
    assert events_of(owner, job).count("job:content:erased") == 1
    with transaction(stack_database) as session:
        row = session.execute(
            text("SELECT prompt, negative_prompt, metadata FROM jobs WHERE id = :id"),
            {"id": job["id"]},
        ).one()
        assert tuple(row) == ("", "", None)
        assert (
            session.scalar(
                text("SELECT prompt FROM job_history WHERE job_id = :id"), {"id": job["id"]}
            )
            == ""
        )
    until(
        lambda: httpx.get(object_url, trust_env=False).status_code in (403, 404),
        within_s=75,
        what="the object's deletion",
    )


def test_a_job_under_way_is_taken_back_first(api, owner):
    job = api.post("/v1/jobs", json={**JOB_BODY, "tier": "batch", "steps": 60}).json()

    assert api.delete(job["urls"]["self"]).status_code == 204

    after = api.get(job["urls"]["self"]).json()
    assert (after["state"], after["prompt"]) == ("canceled", None)
    # A worker that had begun it says last what it abandoned.
    events = [event for event in events_of(owner, job) if event != "job:work:abandoned"]
    assert events[-2:] == ["job:state:canceled", "job:content:erased"]


def test_an_image_that_another_job_made_too_stays(api):
    """Images are kept by what they look like: the same job twice is one object."""
    job_body = {"prompt": "a blue square", "tier": "quality", "steps": 5, "seed": 31_337}
    first, second = (
        api.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"}).json() for _ in range(2)
    )
    assert first["images"][0]["content_sha256"] == second["images"][0]["content_sha256"]
    witness = api.post(
        "/v1/jobs", json={**job_body, "seed": 31_338}, headers={"Prefer": "wait=60"}
    ).json()
    gone = api.get(witness["images"][0]["url"]).headers["Location"]

    api.delete(first["urls"]["self"])
    api.delete(witness["urls"]["self"])
    until(
        lambda: httpx.get(gone, trust_env=False).status_code != 200,
        within_s=75,
        what="the other object's deletion",
    )

    kept = httpx.get(api.get(second["images"][0]["url"]).headers["Location"], trust_env=False)
    assert kept.status_code == 200
    api.delete(second["urls"]["self"])


def test_an_object_is_let_go_when_its_last_name_is_erased(stack_database):
    """And is not lost to sight when somebody is just looking whether it has a name."""
    artifact = an_artifact()
    with transaction(stack_database) as session:
        tenant = a_tenant(session)
        both = [a_lease(session, tenant=tenant) for _ in range(2)]
        for lease in both:
            hand_off(session, lease)
            store(session, lease.job, artifact=artifact)
        first, second = (lease.job.id for lease in both)

    def erase(job_id):
        with transaction(stack_database) as session:
            erasing.erase(session, job_id, tenant_id=tenant.id, actor="tests")

    def left_behind():
        with transaction(stack_database) as session:
            return uploads.left_behind(session, older_than_s=uploads.ORPHAN_AFTER_S)

    erase(first)
    assert left_behind() is None
    erase(second)
    assert left_behind() == artifact["object_key"]
    with transaction(stack_database) as session:
        uploads.end(session, artifact["object_key"])


def test_an_erased_job_that_was_accepted_under_a_key_comes_back_empty(api):
    key = {"Idempotency-Key": str(uuid.uuid4())}
    job = api.post("/v1/jobs", json={**JOB_BODY, "tier": "batch"}, headers=key).json()
    api.delete(job["urls"]["self"])

    again = api.post("/v1/jobs", json={**JOB_BODY, "tier": "batch"}, headers=key).json()

    assert (again["id"], again["prompt"], again["metadata"]) == (job["id"], None, {})


def test_an_erased_failure_is_not_tried_again(stack_database):
    with transaction(stack_database) as session:
        job = a_succeeded_job(session)
        session.execute(
            text("UPDATE jobs SET state = 'failed', failure_code = 'internal' WHERE id = :id"),
            {"id": job.id},
        )
        erasing.erase(session, job.id, tenant_id=job.tenant_id, actor="tests")
        assert jobs.requeue_dead(session, job.id, start_within_s=60, actor="tests") is None
        session.rollback()


def test_erasing_and_replaying_at_once_never_replays_nothing(gateway_with, new_key):
    own, app = bearer(new_key()), gateway_with().application
    made = [
        app.test_client().post("/v1/jobs", json={**JOB_BODY, "tier": "batch"}, headers=own).json
        for _ in range(6)
    ]

    def act(number):
        job, client = made[number // 2], app.test_client()
        if number % 2:
            return client.delete(job["urls"]["self"], headers=own)
        return client.post(job["urls"]["replay"], headers=own)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(act, range(12)))

    assert {answer.status_code for answer in answers} <= {202, 204, 409}
    for answer in answers:
        if answer.status_code == 202:
            assert answer.json["prompt"] == JOB_BODY["prompt"]
            app.test_client().delete(answer.json["urls"]["self"], headers=own)


def test_an_erased_job_leaves_nothing_in_redis(a_house, stack, stack_database):
    """At once: pixels on their way to the store, snapshots, pictures, progress, events and
    previews.
    """
    tenant = a_house().with_workers().tenant()
    kept, erased = (tenant.post(n=2).json for _ in range(2))
    jobs_of = {name: uuid.UUID(job["id"]) for name, job in (("kept", kept), ("erased", erased))}
    for job_id in jobs_of.values():
        _leave_traces(stack.env["HANDOFF_URL"], stack_database, job_id)

    answer = tenant.delete(erased["urls"]["self"])

    with redis.Redis.from_url(stack.env["HANDOFF_URL"], decode_responses=True) as handoff:
        left = {name: handoff.keys(f"*{job_id}*") for name, job_id in jobs_of.items()}
        assert (answer.status_code, left["erased"]) == (204, [])
        assert {key.partition(":")[0] for key in left["kept"]} == KINDS_OF_TRACES
        handoff.delete(*left["kept"])


KINDS_OF_TRACES = {"handoff", "snapshot", "input", "progress", "events"}


def _leave_traces(url, database, job_id) -> None:
    """Leave in Redis what a worker does that handed one of two images on and has rendered both."""
    with transaction(database) as session:
        lease = leases.take(session, job_id, worker="tests", device="cpu", ttl_s=600)
        hand_off(session, lease, 0)
    handoff, snapshots = Handoff(url, ttl_s=60), Snapshots(url, ttl_s=60)
    for index in range(2):
        handoff.put(job_id, index, lease.attempt, some_pixels())
    snapshots.put(job_id, 1, lease.attempt, 3, b"latents")
    Inputs(url, ttl_s=60).bring(job_id, {"init": some_pixels()})
    writer = ProgressWriter(url)
    writer.note(job_id, Step(1, 3, 20))
    until(lambda: JobSignals(url).steps(job_id), what="the progress")
    writer.close()


def test_another_tenant_s_job_cannot_be_erased(api, stranger, canceled_job):
    assert_problem(stranger.delete(canceled_job["urls"]["self"]), 404, "job-not-found")
    assert_problem(api.delete(f"/v1/jobs/{uuid.uuid4()}"), 404, "job-not-found")
    assert api.get(canceled_job["urls"]["self"]).json()["prompt"] is not None
