"""Clients that wait for a job's end, and streams.

How many may, for how long, and whose keys end them.
"""

import threading
import time
import uuid

import httpx
import pytest
from sqlalchemy import select

from models import api_keys, tenants
from models.database import transaction
from models.tables import ApiKey, Job
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.app.test_event_streams import following, kinds
from tests.builders import until

FEW = {
    "gateway_threads": 8,
    "gateway_max_waits": 4,
    "gateway_max_streams": 4,
    "gateway_max_uploads": 2,
    "event_heartbeat_s": 30,
}
JOB_BODY = {"prompt": "a red circle", "tier": "batch"}


@pytest.fixture(scope="module")
def gateway(a_gateway, unserved):
    """One that lets few wait, and of which nothing is rendered."""
    return a_gateway(**FEW, **unserved)


@pytest.fixture
def as_tenant(gateway):
    """HTTP to that gateway, with a key."""
    opened = []

    def as_tenant(key):
        opened.append(
            httpx.Client(base_url=gateway, headers=bearer(key), timeout=30, trust_env=False)
        )
        return opened[-1]

    yield as_tenant
    for client in opened:
        client.close()


@pytest.fixture
def a_key(stack, stack_database):
    """A key of a tenant of its own, and what revokes it."""

    def a_key():
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            row, key = api_keys.issue(
                session,
                tenant_id=tenant.id,
                name="tests",
                pepper=stack.env["API_KEY_PEPPER"],
                actor="tests",
            )

        def revoke():
            with transaction(stack_database) as session:
                api_keys.revoke(session, row.id, actor="tests")

        return key, revoke

    return a_key


class Asking:
    """Requests that wait, each in a thread of its own.

    `answers` comes to hold what they are told.
    """

    def __init__(self, ask, count):
        self.answers, self.took_s = [], []
        self._threads = [
            threading.Thread(target=self._ask, args=(ask,), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, ask):
        asked_at = time.monotonic()
        answer = ask()
        self.took_s.append(time.monotonic() - asked_at)
        self.answers.append(answer)

    def finish(self):
        for thread in self._threads:
            thread.join(timeout=60)
        return self.answers


def waiting_for(client, job, wait_s=20):
    return lambda: client.get(job["urls"]["self"], headers={"Prefer": f"wait={wait_s}"}, timeout=60)


def test_a_client_without_room_to_wait_is_answered_at_once(as_tenant, new_key):
    client = as_tenant(new_key())
    job = client.post("/v1/jobs", json=JOB_BODY).json()

    asking = Asking(waiting_for(client, job), 8)
    until(
        lambda: len(asking.answers) == 5,
        within_s=60,
        what="answering those for whom there is no room",
    )
    client.post(job["urls"]["cancel"])

    applied = [answer.headers["Preference-Applied"] for answer in asking.finish()]
    assert {answer.status_code for answer in asking.answers} == {200}
    # three of four are one tenant's share
    assert sorted(applied) == ["wait=0"] * 5 + ["wait=20"] * 3
    assert [
        answer.json()["state"]
        for answer in asking.answers
        if answer.headers["Preference-Applied"] == "wait=0"
    ] == ["queued"] * 5


def test_a_new_job_is_accepted_without_room_to_wait_for_it(as_tenant, new_key):
    client = as_tenant(new_key())
    job = client.post("/v1/jobs", json=JOB_BODY).json()
    asking = Asking(waiting_for(client, job), 4)
    until(
        lambda: len(asking.answers) == 1,
        within_s=60,
        what="answering the one for whom there is no room",
    )

    answer = client.post("/v1/jobs", json=JOB_BODY, headers={"Prefer": "wait=20"})

    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "wait=0")
    for each in (job, answer.json()):
        client.post(each["urls"]["cancel"])
    asking.finish()


def test_one_tenant_that_waits_leaves_room_to_another(as_tenant, new_key):
    greedy, other = as_tenant(new_key()), as_tenant(new_key())
    job = greedy.post("/v1/jobs", json=JOB_BODY).json()
    asking = Asking(waiting_for(greedy, job), 8)
    until(lambda: len(asking.answers) == 5, within_s=60, what="the greedy tenant's share")

    answer = other.post("/v1/jobs", json=JOB_BODY, headers={"Prefer": "wait=1"})

    assert answer.headers["Preference-Applied"] == "wait=1"
    greedy.post(job["urls"]["cancel"])
    asking.finish()


def test_an_image_call_for_which_there_is_no_room_makes_no_job(as_tenant, new_key, count_jobs):
    client = as_tenant(new_key())
    job = client.post("/v1/jobs", json=JOB_BODY).json()
    asking = Asking(waiting_for(client, job), 4)
    until(
        lambda: len(asking.answers) == 1,
        within_s=60,
        what="answering the one for whom there is no room",
    )
    before = count_jobs()

    answer = client.post("/v1/images/generations", json={"prompt": "a red circle"})

    assert_problem(answer, 503, "waits-exhausted")
    assert int(answer.headers["Retry-After"]) > 0
    assert count_jobs() == before
    client.post(job["urls"]["cancel"])
    asking.finish()


def test_an_image_stream_for_which_there_is_no_room_makes_no_job(as_tenant, new_key, count_jobs):
    client = as_tenant(new_key())
    job = client.post("/v1/jobs", json=JOB_BODY).json()
    with (
        following(client, job) as one,
        following(client, job) as two,
        following(client, job) as three,
    ):
        next(one), next(two), next(three)
        before = count_jobs()

        answer = client.post(
            "/v1/images/generations", json={"prompt": "a red circle", "stream": True}
        )

        assert_problem(answer, 503, "streams-exhausted")
        assert count_jobs() == before
    client.post(job["urls"]["cancel"])


def test_an_image_stream_that_is_refused_leaves_its_place_to_the_next(as_tenant, new_key):
    client = as_tenant(new_key())
    call = {"prompt": "a red circle", "tier": "batch", "stream": True}

    for _ in range(FEW["gateway_max_streams"]):
        answer = client.post("/v1/images/generations", json=call | {"steps": 0})
        assert_problem(answer, 400, "invalid-image-request")

    with client.stream("POST", "/v1/images/generations", json=call) as answer:
        assert answer.status_code == 200, answer.read()
        client.post(f"/v1/jobs/{answer.headers['X-Darkroom-Job-Id']}/cancel")


def test_one_tenant_s_streams_leave_room_to_another(as_tenant, new_key):
    greedy, other = as_tenant(new_key()), as_tenant(new_key())
    job, theirs = (client.post("/v1/jobs", json=JOB_BODY).json() for client in (greedy, other))
    with (
        following(greedy, job) as one,
        following(greedy, job) as two,
        following(greedy, job) as three,
    ):
        next(one), next(two), next(three)

        assert_problem(greedy.get(job["urls"]["events"]), 503, "streams-exhausted")
        with following(other, theirs) as stream:
            assert next(stream)[1] == "queued"
    greedy.post(job["urls"]["cancel"])


def test_a_client_that_has_left_waits_no_longer(as_tenant, gateway, new_key):
    key = new_key()
    client = as_tenant(key)
    job = client.post("/v1/jobs", json=JOB_BODY).json()
    for _ in range(3):
        with (
            httpx.Client(
                base_url=gateway, headers=bearer(key), timeout=0.3, trust_env=False
            ) as impatient,
            pytest.raises(httpx.TimeoutException),
        ):
            impatient.get(job["urls"]["self"], headers={"Prefer": "wait=60"})

    def may_wait():
        return (
            client.get(job["urls"]["self"], headers={"Prefer": "wait=1"}).headers[
                "Preference-Applied"
            ]
            == "wait=1"
        )

    until(may_wait, within_s=30, what="room for those who are there")
    client.post(job["urls"]["cancel"])


def test_a_revoked_key_s_waits_end_with_it(as_tenant, a_key):
    key, revoke = a_key()
    client = as_tenant(key)
    job = client.post("/v1/jobs", json=JOB_BODY).json()
    asking = Asking(waiting_for(client, job, 60), 2)
    time.sleep(0.5)

    revoke()

    revoked_at = time.monotonic()
    for answer in asking.finish():
        assert_problem(answer, 401, "unauthenticated")
    assert time.monotonic() - revoked_at < 5


def test_a_revoked_key_s_streams_end_with_it(as_tenant, a_key):
    key, revoke = a_key()
    client = as_tenant(key)
    job = client.post("/v1/jobs", json=JOB_BODY).json()

    with following(client, job) as stream:
        assert next(stream)[1] == "queued"
        revoke()
        revoked_at = time.monotonic()
        rest = [event for event in stream if event[1]]

    assert "final" not in kinds(rest)
    assert time.monotonic() - revoked_at < 5  # no heartbeat would come for 30 s
    assert_problem(client.get(job["urls"]["events"]), 401, "unauthenticated")


def test_an_expired_key_s_streams_end_with_it(as_tenant, a_key, stack, stack_database):
    key, _ = a_key()
    client = as_tenant(key)
    job = client.post("/v1/jobs", json=JOB_BODY).json()

    with following(client, job) as stream:
        with transaction(stack_database) as session:
            key_id = session.scalar(select(ApiKey.id).where(ApiKey.kid == api_keys.kid_of(key)))
            api_keys.rotate(session, key_id, pepper=stack.env["API_KEY_PEPPER"], grace_s=1)
        rest = [event for event in stream if event[1]]

    assert kinds(rest) == ["queued"]


def test_a_revoked_key_s_image_stream_says_so_and_its_job_goes_on(as_tenant, a_key, stack_database):
    key, revoke = a_key()
    job_body = {"prompt": "a red circle", "stream": True}
    with as_tenant(key).stream("POST", "/v1/images/generations", json=job_body) as answer:
        job_id = answer.headers["X-Darkroom-Job-Id"]
        lines = answer.iter_lines()
        next(lines)
        revoke()
        told = [line for line in lines if line.startswith("data:")]

    assert len(told) == 1
    assert '"unauthenticated"' in told[0]
    with transaction(stack_database) as session:
        assert session.get(Job, uuid.UUID(job_id)).state == "queued"
