"""Who is let in and what is said of the wait.

Gateways of our own, for pools that only the test knows.
"""

import pytest
from sqlalchemy import text

import app.live.forecast
from models.database import transaction
from models.tables import Job, Tenant
from tests.app.conftest import JOB_BODY
from tests.app.moments import of_this_moment
from tests.app.problem import assert_problem
from tests.builders import a_redis, until


def refused(answer, status, slug, reason, *, seconds=None) -> dict:
    """The members of a refusal that asks to come back, up to a fifth sooner or later than in so
    many seconds.
    """
    problem = assert_problem(answer, status, slug)
    retry_after_s = int(answer.headers["Retry-After"])
    assert problem["reason"] == reason
    assert 1 <= retry_after_s <= 600
    assert seconds is None or 0.8 * seconds <= retry_after_s <= 1.2 * seconds + 1
    return problem


def test_a_waiting_job_tells_how_many_go_before_it_and_when_it_will_be_done(a_house):
    tenant = a_house().with_workers().tenant()
    accepted = [of_this_moment(tenant.post).json for _ in range(4)]

    queues = of_this_moment(lambda: [tenant.get(job)["queue"] for job in accepted])

    assert [queue["jobs_ahead"] for queue in queues] == [0, 1, 2, 3]
    for name in ("eta_p50_s", "eta_p90_s"):
        etas = [queue[name] for queue in queues]
        assert 0 < etas[0] < etas[1] < etas[2] < etas[3]
    assert all(queue["eta_p50_s"] <= queue["eta_p90_s"] for queue in queues)


def test_a_job_is_not_kept_waiting_by_another_tenant_s_dump_behind_it(a_house):
    house = a_house().with_workers()
    tenant, other = house.tenant(), house.waits(count=4, predicted_s=30)
    job = of_this_moment(tenant.post).json
    before = of_this_moment(lambda: tenant.get(job)["queue"])

    house.waits(tenant=other, count=40, predicted_s=30)

    assert of_this_moment(lambda: tenant.get(job)["queue"]) == before


def test_jobs_whose_pictures_do_not_come_are_before_no_job_that_needs_none(
    a_house, stack_database, monkeypatch
):
    monkeypatch.setattr(app.live.forecast, "PICTURES_LATE_S", 0.6)
    house = a_house().with_workers()
    tenant = house.tenant()
    job = of_this_moment(tenant.post).json
    with transaction(stack_database) as session:
        own = session.get(Tenant, session.get_one(Job, job["id"]).tenant_id)
    house.waits(tenant=own, count=40, predicted_s=30)
    lacking = text(
        "UPDATE jobs SET lacks_inputs = true, inputs_asked_at = clock_timestamp() "
        "WHERE pool = :pool AND id <> :id"
    )
    with transaction(stack_database) as session:
        session.execute(lacking, {"pool": house.pool, "id": job["id"]})

    def ahead(**job_body):
        estimate = of_this_moment(lambda: tenant.send("/v1/estimate", {**JOB_BODY, **job_body}))
        return estimate.json["queue"]["jobs_ahead"]

    before = ahead()

    until(lambda: ahead() == 1, what="a way past them")

    assert before == 41
    assert ahead(init_image="data:image/png;base64,AAAA", strength=0.5) == 41


def test_with_twice_the_workers_the_same_wait_is_shorter(a_house):
    house = a_house().with_workers(1)
    house.runs(predicted_s=60)
    tenant = house.tenant()
    job = of_this_moment(tenant.post).json
    before = of_this_moment(lambda: tenant.get(job)["queue"]["eta_p50_s"])

    house.with_workers(2)

    assert of_this_moment(lambda: tenant.get(job)["queue"]["eta_p50_s"]) < 0.7 * before


def test_the_answer_to_the_request_itself_says_it_already(a_house):
    house = a_house().with_workers()
    house.runs(predicted_s=60)

    answer = house.tenant().post()

    assert answer.status_code == 202
    assert answer.json["queue"]["jobs_ahead"] == 0
    assert answer.json["queue"]["eta_p90_s"] >= answer.json["queue"]["eta_p50_s"] > 60


def test_a_job_that_is_over_stands_in_no_queue(finished_job, canceled_job):
    assert (finished_job["queue"], canceled_job["queue"]) == (None, None)


def test_a_tenant_with_enough_waiting_is_refused_while_another_is_let_in(a_house, count_jobs):
    house = a_house({"tiers.batch.max_queued_s_per_tenant": 4.0}).with_workers()
    greedy, modest = house.tenant(), house.tenant()
    assert greedy.post().status_code == 202
    before = count_jobs()

    no = of_this_moment(greedy.post)

    problem = refused(no, 429, "tenant-queue-full", "tenant_queue_full")
    assert "4 may wait" in problem["detail"]
    assert count_jobs() == before
    assert modest.post().status_code == 202
    assert greedy.post(tier="quality", n=1).status_code == 202


def test_a_pool_that_nothing_serves_is_refused_by_name(a_house, count_jobs):
    house, before = a_house(), count_jobs()

    problem = refused(house.tenant().post(), 503, "model-unserved", "unserved", seconds=60)

    assert house.pool in problem["detail"]
    assert count_jobs() == before


@pytest.mark.parametrize(
    "change",
    [{"pools.POOL.warm_floor": 1}, {"pools.POOL.scalable": True}],
    ids=["warm", "scalable"],
)
def test_where_workers_are_still_to_come_jobs_wait_for_them(a_house, change):
    assert a_house(change).tenant().post().status_code == 202


def test_a_model_that_no_live_worker_could_load_is_refused_by_its_name_alone(a_house, count_jobs):
    house, before = a_house(), count_jobs()
    house.with_workers(held=["other@1"], failed={"pocket@1": "/srv/pocket/unet is missing"})

    problem = refused(house.tenant().post(), 503, "model-unserved", "unserved", seconds=60)

    assert problem["detail"] == "No live worker serves version 1 of model pocket."
    assert count_jobs() == before


def test_when_its_last_worker_leaves_a_pool_is_unserved(a_house):
    house = a_house().with_workers()
    tenant = house.tenant()
    assert tenant.post().status_code == 202

    house.leave()

    # by itself the gateway looks at its queues again
    until(lambda: tenant.post().status_code == 503)
    refused(tenant.post(), 503, "model-unserved", "unserved")


def test_a_job_that_could_not_start_in_time_is_refused(a_house, count_jobs):
    house = a_house().with_workers(2)
    house.runs(tier="fast", predicted_s=160)
    tenant, before = house.tenant(), count_jobs()

    no = of_this_moment(lambda: tenant.post(tier="fast", n=1))

    problem = refused(no, 503, "fleet-saturated", "saturated", seconds=50)
    assert "80 s" in problem["detail"]
    assert count_jobs() == before
    assert tenant.post(tier="quality", n=1).status_code == 202, "it has more time"


def test_images_that_are_made_faster_than_they_are_stored_are_a_reason_too(
    a_house, tmp_path, count_jobs
):
    before = count_jobs()
    with a_redis(tmp_path, maxmemory="512kb") as full:
        tenant = a_house(handoff_url=full).with_workers().tenant()

        refused(tenant.post(), 503, "fleet-saturated", "handoff_full", seconds=5)

    assert count_jobs() == before


@pytest.mark.parametrize("slug", ["tenant-queue-full", "fleet-saturated", "model-unserved"])
def test_the_type_of_a_refusal_leads_to_what_can_be_done_about_it(nobody, slug):
    about = nobody.get(f"/problems/{slug}").json()

    assert (about["type"], bool(about["about"])) == (f"/problems/{slug}", True)
