"""GET /v1/jobs/{id}/status and conditional reads.

Cheap to ask often, and never older than a second.
"""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from app.live.statuses import MAX_KEPT, MOST_ROOTS, Statuses
from models.database import transaction
from models.tables import Tenant
from tests.app.problem import assert_problem
from tests.builders import a_lease, hand_off, store

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 60}


def test_a_status_is_the_little_that_changes(api, finished_job):
    answer = api.get(finished_job["urls"]["status"])

    status = answer.json()
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "private, max-age=1")
    assert {
        name: status[name] for name in ("id", "state", "images_done", "n", "failure", "queue")
    } == {
        "id": finished_job["id"],
        "state": "succeeded",
        "images_done": 2,
        "n": 2,
        "failure": None,
        "queue": None,
    }
    assert status["progress"] == finished_job["progress"]
    assert "prompt" not in status


def test_a_waiting_job_s_status_has_its_place_and_eta(a_house):
    tenant = a_house().with_workers().tenant()

    queue = tenant.get(tenant.post().json, "status")["queue"]

    assert queue["jobs_ahead"] == 0
    assert 0 < queue["eta_p50_s"] <= queue["eta_p90_s"]


def test_a_status_counts_only_images_that_are_stored(api, stack_database):
    tenant_id = uuid.UUID(api.get("/v1/key").json()["tenant_id"])
    with transaction(stack_database) as session:
        tenant = session.get(Tenant, tenant_id)
        lease = a_lease(session, tenant=tenant, num_images=3, ttl_s=600)
        hand_off(session, lease, 0)
        hand_off(session, lease, 1)
        store(session, lease.job, 0)
        job_id = lease.job.id

    status = api.get(f"/v1/jobs/{job_id}/status").json()
    job = api.get(f"/v1/jobs/{job_id}").json()

    assert [image["state"] for image in job["images"]] == ["stored", "handed_off", "pending"]
    assert [image["url"] is not None for image in job["images"]] == [True, False, False]
    assert status["images_done"] == status["progress"]["images_done"] == 1
    assert job["progress"] == status["progress"]
    api.post(job["urls"]["cancel"])


def test_a_status_that_is_known_already_is_not_sent_again(api, finished_job):
    for url in (finished_job["urls"]["status"], finished_job["urls"]["self"]):
        first = api.get(url)
        again = api.get(url, headers={"If-None-Match": first.headers["ETag"]})
        changed = api.get(url, headers={"If-None-Match": '"something-else"'})

        assert (again.status_code, again.content, again.headers["ETag"]) == (
            304,
            b"",
            first.headers["ETag"],
        )
        assert (changed.status_code, changed.json()) == (200, first.json())


def test_a_cancel_shows_at_once(api):
    job = api.post("/v1/jobs", json=BODY).json()
    before = api.get(job["urls"]["status"])
    assert before.json()["state"] in ("queued", "running")

    api.post(job["urls"]["cancel"])
    after = api.get(job["urls"]["status"], headers={"If-None-Match": before.headers["ETag"]})

    assert (after.status_code, after.json()["state"]) == (200, "canceled")


def test_a_job_that_goes_on_shows_within_a_second(api):
    job = api.post("/v1/jobs", json={"prompt": "a red circle", "steps": 1}).json()
    api.get(job["urls"]["status"])
    api.get(job["urls"]["self"], headers={"Prefer": "wait=60"})
    time.sleep(1.0)

    assert api.get(job["urls"]["status"]).json()["state"] == "succeeded"


def test_another_tenant_s_status_does_not_exist_even_when_it_is_remembered(
    api, stranger, finished_job
):
    assert api.get(finished_job["urls"]["status"]).status_code == 200

    assert_problem(stranger.get(finished_job["urls"]["status"]), 404, "job-not-found")
    assert_problem(api.get(f"/v1/jobs/{uuid.uuid4()}/status"), 404, "job-not-found")


def test_a_thousand_looks_at_once_are_one_read(monkeypatch):
    monkeypatch.setattr("app.live.statuses.FRESH_FOR_S", 3600)  # however slow this machine is
    statuses, job_id, reads = Statuses(), uuid.uuid4(), []

    def read():
        reads.append(time.sleep(0.05))
        return b"{}"

    with ThreadPoolExecutor(16) as threads:
        seen = set(
            threads.map(lambda _: statuses.get(uuid.UUID(int=1), job_id, read).etag, range(1000))
        )

    assert (len(reads), len(seen)) == (1, 1)


def test_the_number_of_remembered_statuses_is_bounded():
    statuses = Statuses()
    for number in range(MAX_KEPT + 50):
        statuses.get(uuid.UUID(int=1), uuid.UUID(int=number), lambda: b"{}")

    assert len(statuses) == MAX_KEPT


def test_a_change_is_seen_even_by_who_asks_while_the_old_state_is_being_read():
    statuses, tenant_id, job_id = Statuses(), uuid.uuid4(), uuid.uuid4()
    entered, goes_on = threading.Event(), threading.Event()

    def read_old():
        entered.set()
        goes_on.wait(10)
        return b"queued"

    with ThreadPoolExecutor(1) as threads:
        old = threads.submit(statuses.get, tenant_id, job_id, read_old)
        entered.wait(10)
        statuses.forget(tenant_id, job_id)

        assert statuses.get(tenant_id, job_id, lambda: b"canceled").content == b"canceled"

        goes_on.set()
        assert old.result(5).content == b"queued"
    assert statuses.get(tenant_id, job_id, read_old).content == b"canceled"


def test_a_status_is_never_told_under_another_prefix():
    statuses, tenant_id, job_id = Statuses(), uuid.uuid4(), uuid.uuid4()

    seen = [
        statuses.get(tenant_id, job_id, root.encode, root=root).content
        for root in ("/a", "/b", "/a")
    ]

    assert seen == [b"/a", b"/b", b"/a"]


def test_statuses_under_more_prefixes_than_a_proxy_gives_are_not_remembered():
    """A client may make up as many as it likes.

    Each would have to be looked through at a cancel.
    """
    statuses, tenant_id, job_id = Statuses(), uuid.uuid4(), uuid.uuid4()
    reads = []

    def look(number):
        read = lambda: reads.append(number) or b"{}"  # noqa: E731
        return statuses.get(tenant_id, job_id, read, root=f"/{number}").content

    for number in [*range(MOST_ROOTS + 2), *range(MOST_ROOTS + 2)]:
        assert look(number) == b"{}"

    assert len(statuses) == MOST_ROOTS
    assert reads == [*range(MOST_ROOTS + 2), MOST_ROOTS, MOST_ROOTS + 1]
