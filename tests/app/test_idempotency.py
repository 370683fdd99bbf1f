"""Idempotency-Key: a request under a key comes to one job, however often and from however many
places it is sent.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from flask import Flask, request
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from app.http.idempotency import MAX_KEY_CHARS, REPLAYED, read_idempotent, read_key
from app.problems import InvalidQuery
from models import idempotency
from models.database import transaction
from models.tables import Job, UsageDay
from tests.app.conftest import bearer
from tests.app.moments import of_this_moment
from tests.app.problem import assert_problem

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 60}


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": f'"{uuid.uuid4()}"'}


@pytest.fixture
def age(stack_database):
    """Make a key's entry older."""

    def age(key, hours):
        with transaction(stack_database) as session:
            query = (
                "UPDATE idempotency_keys "
                "SET created_at = created_at - make_interval(hours => :hours) WHERE key = :key"
            )
            session.execute(text(query), {"hours": hours, "key": read_key(key["Idempotency-Key"])})

    return age


def bare(key: dict[str, str]) -> str:
    return read_key(key["Idempotency-Key"])


def test_the_same_request_under_the_same_key_is_the_same_job(new_tenant, key):
    api = new_tenant()

    first, second = (api.post("/v1/jobs", json=BODY, headers=key) for _ in range(2))

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    assert (REPLAYED in first.headers, second.headers[REPLAYED]) == (False, "true")
    assert second.headers["Location"] == first.headers["Location"]
    assert len(api.get("/v1/jobs").json()["data"]) == 1


def test_a_replayed_answer_shows_the_job_as_it_is_now(api, key):
    job = api.post("/v1/jobs", json=BODY, headers=key).json()
    api.post(job["urls"]["cancel"])

    assert api.post("/v1/jobs", json=BODY, headers=key).json()["state"] == "canceled"


def test_a_key_stands_for_what_is_asked_for_and_not_for_how_it_is_written(api, key):
    job = api.post("/v1/jobs", json=BODY, headers=key).json()
    otherwise = '{"steps": 60,   "tier":"batch", "n": 1, "prompt": "a red circle", "metadata": {}}'

    again = api.post(
        "/v1/jobs", content=otherwise, headers={**key, "Content-Type": "application/json"}
    )
    without_quotes = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": bare(key)})

    assert again.json()["id"] == without_quotes.json()["id"] == job["id"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue circle"},
        {"seed": 1},
        {"metadata": {"a": "b"}},
        {"start_deadline_s": 60.0},
    ],
)
def test_another_request_under_the_same_key_is_refused(api, key, change):
    api.post("/v1/jobs", json=BODY, headers=key)

    problem = assert_problem(
        api.post("/v1/jobs", json=BODY | change, headers=key), 422, "idempotency-key-reused"
    )

    assert problem["error"]["param"] == "Idempotency-Key"


def test_two_tenants_may_use_the_same_key(api, new_tenant, key):
    ids = {
        client.post("/v1/jobs", json=BODY, headers=key).json()["id"]
        for client in (api, new_tenant())
    }

    assert len(ids) == 2


def test_a_refused_request_leaves_no_key(api, key):
    assert api.post("/v1/jobs", json=BODY | {"steps": 100_000}, headers=key).status_code == 422

    assert api.post("/v1/jobs", json=BODY, headers=key).status_code == 202


def test_a_request_that_cannot_be_served_now_leaves_no_key(a_house, key):
    house = a_house()
    tenant = house.tenant()
    assert tenant.post(headers=key).status_code == 503

    house.with_workers()

    assert of_this_moment(lambda: tenant.post(headers=key)).status_code == 202


def test_an_accepted_key_is_answered_even_when_nothing_can_be_served_any_more(a_house, key):
    house = a_house().with_workers()
    tenant = house.tenant()
    job = tenant.post(headers=key).json

    house.without_workers()

    assert of_this_moment(tenant.post).status_code == 503
    assert tenant.post(headers=key).json["id"] == job["id"]


def test_a_key_is_free_again_after_a_day(api, key, age):
    first = api.post("/v1/jobs", json=BODY, headers=key).json()
    age(key, 23)
    assert api.post("/v1/jobs", json=BODY, headers=key).json()["id"] == first["id"]

    age(key, 2)
    other = api.post("/v1/jobs", json=BODY | {"seed": 5}, headers=key)

    assert (other.status_code, other.json()["id"] != first["id"]) == (202, True)
    assert (
        api.post("/v1/jobs", json=BODY | {"seed": 5}, headers=key).json()["id"]
        == other.json()["id"]
    )


def test_old_keys_are_forgotten_in_pieces(stack_database, api, key, age):
    for number in range(3):
        api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": f"{bare(key)}-{number}"})
        age({"Idempotency-Key": f"{bare(key)}-{number}"}, 25)
    api.post("/v1/jobs", json=BODY, headers=key)

    with transaction(stack_database) as session:
        assert idempotency.forget_old(session, limit=2) == 2
        assert idempotency.forget_old(session, limit=1000) >= 1
        assert idempotency.forget_old(session, limit=1000) == 0
        left = session.scalars(
            text("SELECT key FROM idempotency_keys WHERE key LIKE :key"), {"key": f"{bare(key)}%"}
        ).all()
    assert left == [bare(key)]


def test_racing_requests_through_two_gateways_come_to_one_job_each(
    stack, gateway_with, new_key, stack_database
):
    """Eighty requests at once for four keys.

    Half of them to the stack's gateway process, half to one of our own.
    """
    own, here = bearer(new_key()), gateway_with().application
    keys = [str(uuid.uuid4()) for _ in range(4)]

    def send(number: int):
        headers, key = {**own, "Idempotency-Key": keys[number // 2 % 4]}, number // 2 % 4
        if number % 2:
            answer = here.test_client().post("/v1/jobs", json=BODY, headers=headers)
            return key, answer.status_code, answer.json["id"], REPLAYED in answer.headers
        answer = httpx.post(
            f"{stack.env['DARKROOM_URL']}/v1/jobs",
            json=BODY,
            headers=headers,
            trust_env=False,
            timeout=60,
        )
        return key, answer.status_code, answer.json()["id"], REPLAYED in answer.headers

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(send, range(80)))

    assert {status for _, status, _, _ in answers} == {202}
    assert len({(key, job_id) for key, _, job_id, _ in answers}) == 4
    assert sum(not is_replayed for *_, is_replayed in answers) == 4
    with transaction(stack_database) as session:
        booked = select(UsageDay.jobs_accepted).join(Job, Job.tenant_id == UsageDay.tenant_id)
        assert session.scalar(booked.where(Job.id == uuid.UUID(answers[0][2]))) == 4


def test_of_racing_requests_that_differ_one_wins_and_the_others_are_refused(
    gateway_with, new_key, key
):
    own, client = bearer(new_key()), gateway_with()

    def send(seed: int):
        return (
            client.application.test_client()
            .post("/v1/jobs", json=BODY | {"seed": seed}, headers={**own, **key})
            .status_code
        )

    with ThreadPoolExecutor(12) as threads:
        assert sorted(threads.map(send, range(12))) == [202] + [422] * 11


def test_the_same_body_asks_for_something_else_elsewhere():
    """No two routes take the same body by now, but a digest must not rely on that."""

    def digest(method, path, asks_for=None):
        key = {"Idempotency-Key": "k"}
        with Flask("here").test_request_context(path, method=method, headers=key):
            return read_idempotent(request, asks_for or {}).request_sha256

    one = digest("POST", "/v1/jobs")

    assert one == digest("POST", "/v1/jobs")
    others = {digest("PUT", "/v1/jobs"), digest("POST", "/v1/files")}
    assert len({one, *others, digest("POST", "/v1/jobs", {"a": 1})}) == 4


@pytest.mark.parametrize(
    "value",
    [
        "",
        '""',
        '"open',
        'a"b',
        "a,b",
        "a;b",
        "a b",
        "é",
        "x" * (MAX_KEY_CHARS + 1),
        '"a";p=1',
        '"a\\b"',
        "a\tb",
    ],
)
def test_a_key_that_cannot_be_used_is_refused_and_named(api, value):
    answer = api.post("/v1/jobs", json=BODY, headers=[("Idempotency-Key", value.encode())])

    assert assert_problem(answer, 422, "invalid-query")["header"] == "Idempotency-Key"


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=MAX_KEY_CHARS)
)
def test_every_printable_text_can_be_a_quoted_key(text):
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    assert read_key(quoted) == text


@given(st.text(max_size=300))
def test_every_text_is_a_key_or_is_refused(text):
    try:
        key = read_key(text)
    except InvalidQuery:
        return
    assert 1 <= len(key) <= MAX_KEY_CHARS
    assert key.isascii()
    assert key.isprintable()
