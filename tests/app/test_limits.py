"""What a tenant may use: exact under races, over processes, and whatever becomes of Redis."""

import contextlib
import json
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import httpx
import pytest
import redis
from flask import Flask, Response, g
from sqlalchemy import text

from app.caller import Caller, LimitsUse
from app.http.ratelimit import add_ratelimit_headers
from app.problems import QuotaExceeded
from app.services.quotas import _check_totals
from edges.limits import BudgetResult
from edges.progress import JobSignals
from models import api_keys, jobs, tenants, usage
from models.database import transaction
from policy.limits import Limits, UsageTotals
from tests.app.conftest import NO_TLS, bearer
from tests.app.problem import assert_problem
from tests.builders import until

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 10}
COST = 128 * 128 / 1e6 * 10


@pytest.fixture
def limited(stack, stack_database):
    """HTTP as a new tenant with these limits; its jobs are taken back in the end."""
    made, signals = [], JobSignals(stack.env["HANDOFF_URL"])

    def limited(**limits) -> httpx.Client:
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
            tenants.limit(session, tenant, changes=limits, actor="tests")
            _, key = api_keys.issue(
                session,
                tenant_id=tenant.id,
                name="tests",
                pepper=stack.env["API_KEY_PEPPER"],
                actor="tests",
            )
        client = httpx.Client(
            base_url=stack.env["DARKROOM_URL"],
            headers=bearer(key),
            timeout=90,
            trust_env=False,
            verify=NO_TLS,
        )
        made.append((tenant.id, client))
        return client

    yield limited
    for tenant_id, client in made:
        client.close()
        with transaction(stack_database) as session:
            query = """SELECT id FROM jobs WHERE tenant_id = :id AND state IN ('queued', 'running')
                       ORDER BY id"""
            ids = list(session.scalars(text(query), {"id": tenant_id}))
        for job_id in ids:
            with (
                contextlib.suppress(jobs.JobAlreadyFinished),
                transaction(stack_database) as session,
            ):
                jobs.cancel(session, job_id, tenant_id=tenant_id, actor="tests")
            signals.publish_cancel(job_id)


def racing(sends, count=40) -> Counter:
    """So many requests at once, in turns through the ways to send one.

    How many answers there were of each status.
    """
    with ThreadPoolExecutor(20) as threads:
        return Counter(threads.map(lambda number: sends[number % len(sends)](), range(count)))


def through(client):
    return lambda: client.post("/v1/jobs", json=BODY).status_code


def in_process(gateway_with, client):
    """The same through another gateway, a process's worth of its own.

    Nothing is shared but the stack's Redis and Postgres.
    """
    app = gateway_with(max_wait_s=59).application
    key = {"Authorization": client.headers["Authorization"]}
    return lambda: app.test_client().post("/v1/jobs", json=BODY, headers=key).status_code


def test_of_racing_requests_exactly_as_many_pass_as_the_minute_allows(limited, gateway_with):
    client = limited(requests_per_minute=15)

    answers = racing([through(client), in_process(gateway_with, client)])

    assert answers == {202: 15, 429: 25}
    problem = assert_problem(refused := client.get("/v1/jobs"), 429, "rate-limited")
    assert problem["quota"] == 15
    assert 1 <= int(refused.headers["Retry-After"]) <= 120


def test_the_headers_tell_where_one_stands(limited):
    client = limited(
        requests_per_minute=100, megapixel_steps_per_minute=600, burst_megapixel_steps=60
    )

    answer = client.post("/v1/jobs", json=BODY)

    assert (
        answer.headers["RateLimit-Policy"] == '"requests";q=100;w=60, "megapixel-steps";q=600;w=60'
    )
    requests, budget = answer.headers["RateLimit"].split(", ")
    assert requests.startswith('"requests";r=99;t=')
    assert budget == '"megapixel-steps";r=59;t=0'


def test_a_tenant_without_limits_is_told_of_none(api):
    assert not {"RateLimit", "RateLimit-Policy"} & set(api.get("/v1/jobs").headers)


@pytest.mark.parametrize(
    ("left", "wait_s", "told"),
    [(1.99, 0.0, "r=1;t=0"), (0.5, 0.01, "r=0;t=1"), (-0.5, 1.2, "r=0;t=2"), (7.0, 3.0, "r=7;t=3")],
)
def test_the_headers_promise_no_more_of_a_budget_than_there_is(left, wait_s, told):
    limits = Limits(megapixel_steps_per_minute=600.0, burst_megapixel_steps=60.0)
    used = LimitsUse(budget=BudgetResult(passes=not wait_s, left=left, wait_s=wait_s))
    answer = Response()

    with Flask("here").test_request_context():
        g.caller = Caller(
            uuid.uuid4(), uuid.uuid4(), "kid", "key:kid", frozenset(), limits, used=used
        )
        add_ratelimit_headers(answer)

    assert answer.headers["RateLimit"] == f'"megapixel-steps";{told}'


def test_the_budget_is_exact_under_racing_requests_and_fills_again(limited, gateway_with):
    burst = 15 * COST + 0.01
    client = limited(megapixel_steps_per_minute=0.06, burst_megapixel_steps=burst)

    answers = racing([through(client), in_process(gateway_with, client)])

    assert answers == {202: 15, 429: 25}
    answer = client.post("/v1/jobs", json=BODY)
    problem = assert_problem(answer, 429, "budget-spent")
    assert problem["policy"] == "megapixel-steps"
    assert 1 <= int(answer.headers["Retry-After"]) <= COST / 0.001 + 1


def test_a_job_that_no_budget_ever_holds_is_refused_for_good(limited):
    client = limited(megapixel_steps_per_minute=60, burst_megapixel_steps=COST / 2)

    problem = assert_problem(client.post("/v1/jobs", json=BODY), 422, "invalid-image-request")

    assert problem["errors"][0]["accepted"] == {"max_megapixel_steps": COST / 2}


def test_requests_that_come_to_nothing_cost_no_budget(limited):
    client = limited(
        megapixel_steps_per_minute=0.06, burst_megapixel_steps=COST * 1.5, max_concurrent_jobs=1
    )
    key = {"Idempotency-Key": uuid.uuid4().hex}

    first = client.post("/v1/jobs", json=BODY, headers=key)
    replayed = client.post("/v1/jobs", json=BODY, headers=key)

    assert (first.status_code, replayed.status_code) == (202, 202)
    assert first.json()["id"] == replayed.json()["id"]
    small = {**BODY, "steps": 4}
    assert_problem(client.post("/v1/jobs", json=small), 429, "too-many-jobs")
    client.post(first.json()["urls"]["cancel"])
    assert client.post("/v1/jobs", json=small).status_code == 202  # the refused one was given back


def test_of_racing_jobs_exactly_as_many_are_under_way_as_may_be(limited, gateway_with):
    client = limited(max_concurrent_jobs=15)

    answers = racing([through(client), in_process(gateway_with, client)])

    active = sum(
        job["state"] in ("queued", "running", "storing")
        for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]
    )
    assert answers[202] >= 15
    assert answers[202] + answers[429] == 40
    assert active <= 15


def test_the_daily_quota_is_exact_under_racing_jobs_and_survives_a_flushed_redis(
    limited, gateway_with, stack
):
    client = limited(daily_megapixel_steps=Decimal("15") * Decimal(str(COST)))

    answers = racing([through(client), in_process(gateway_with, client)])
    with redis.Redis.from_url(stack.env["HANDOFF_URL"]) as handoff:
        handoff.flushall()

    assert answers == {202: 15, 429: 25}
    answer = client.post("/v1/jobs", json=BODY)
    problem = assert_problem(answer, 429, "quota-exceeded")
    assert (problem["period"], problem["error"]["type"]) == ("day", "insufficient_quota")
    assert 1 <= int(answer.headers["Retry-After"]) <= 86_400
    used = client.get("/v1/usage").json()
    assert used["used_megapixel_steps"]["today"] == pytest.approx(15 * COST)
    assert used["limits"]["daily_megapixel_steps"] == pytest.approx(15 * COST)


def test_a_canceled_job_s_quota_is_released_and_a_successful_one_s_is_settled(limited):
    # one job, and what may have been done of another
    client = limited(monthly_megapixel_steps=Decimal(str(1.99 * COST)))
    first = client.post("/v1/jobs", json=BODY).json()
    assert (
        assert_problem(client.post("/v1/jobs", json=BODY), 429, "quota-exceeded")["period"]
        == "month"
    )

    client.post(first["urls"]["cancel"])
    second = client.post("/v1/jobs", json=BODY, headers={"Prefer": "wait=60"}).json()

    assert second["state"] == "succeeded"
    [day] = client.get("/v1/usage").json()["data"]
    assert (day["jobs_accepted"], day["jobs_succeeded"], day["reserved_megapixel_steps"]) == (
        2,
        1,
        0.0,
    )
    assert day["settled_megapixel_steps"] == pytest.approx(COST)
    assert Decimal(day["cost"]) == Decimal(second["cost"]["amount"])
    assert_problem(client.post("/v1/jobs", json=BODY), 429, "quota-exceeded")


def test_a_job_that_is_canceled_while_it_runs_uses_up_quota_by_the_steps_that_it_had_done(
    limited, stack_database
):
    client = limited(daily_megapixel_steps=Decimal(100))
    job = client.post("/v1/jobs", json={**BODY, "steps": 60, "n": 8}).json()
    until(lambda: progress_of(client, job) > 8, within_s=60, what="its second step")

    client.post(job["urls"]["cancel"])

    def day_of_work() -> dict | None:
        [day] = client.get("/v1/usage").json()["data"]
        return day if day["abandoned_megapixel_steps"] else None

    day = until(day_of_work, within_s=60, what="the worker's last word")
    of_a_step = 128 * 128 / 1e6
    assert (
        day["reserved_megapixel_steps"],
        day["settled_megapixel_steps"],
        Decimal(day["cost"]),
    ) == (0, 0, 0)
    assert 8 * of_a_step < day["abandoned_megapixel_steps"] < 8 * 60 * of_a_step
    assert client.get("/v1/usage").json()["used_megapixel_steps"]["today"] == pytest.approx(
        day["abandoned_megapixel_steps"]
    )
    with transaction(stack_database) as session:
        query = "SELECT sum(steps_done) FROM images WHERE job_id = :id"
        steps = session.scalar(text(query), {"id": job["id"]})
        shown = session.scalar(
            text("SELECT steps_abandoned FROM job_history WHERE job_id = :id"), {"id": job["id"]}
        )
    assert day["abandoned_megapixel_steps"] == pytest.approx(float(steps) * of_a_step)
    assert shown == steps


def progress_of(client, job) -> int:
    progress = client.get(job["urls"]["status"]).json()["progress"]
    return progress["step"] if progress else 0


def test_a_batch_that_does_not_fit_is_refused_as_a_whole(limited):
    client = limited(max_concurrent_jobs=3)

    active = client.post("/v1/jobs", json=BODY).json()

    assert_problem(client.post("/v1/jobs:batch", json={"jobs": [BODY] * 3}), 429, "too-many-jobs")
    assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [active["id"]]

    assert client.post("/v1/jobs:batch", json={"jobs": [BODY] * 2}).json()["accepted"] == 2


def test_a_batch_of_more_jobs_than_a_tenant_may_have_is_no_matter_of_waiting(limited):
    answer = limited(max_concurrent_jobs=3).post("/v1/jobs:batch", json={"jobs": [BODY] * 4})

    [error] = assert_problem(answer, 422, "invalid-image-request")["errors"]
    assert (error["pointer"], error["accepted"]) == ("/jobs", {"max_items": 3})
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize("period", ["daily", "monthly"])
def test_a_request_larger_than_a_whole_quota_is_no_matter_of_waiting(limited, period):
    quota = f"{period}_megapixel_steps"
    client = limited(**{quota: Decimal(str(1.5 * COST))})

    assert client.post("/v1/jobs", json=BODY).status_code == 202
    for way, body in (("/v1/jobs", BODY | {"n": 2}), ("/v1/jobs:batch", batch_of(2))):
        answer = client.post(way, json=body)
        [error] = assert_problem(answer, 422, "invalid-image-request")["errors"]
        assert (error["pointer"], set(error["accepted"])) == ("/steps", {"max_megapixel_steps"})
        assert "Retry-After" not in answer.headers
    none = limited(**{quota: Decimal(0)}).post("/v1/jobs", json=BODY)
    assert_problem(none, 403, "forbidden")


def batch_of(count: int, **fields) -> dict:
    return {"jobs": [{**BODY, **fields}] * count}


def test_a_batch_takes_what_all_its_jobs_count_out_of_the_budget_or_nothing(limited):
    client = limited(megapixel_steps_per_minute=0.006, burst_megapixel_steps=3.5 * COST)
    assert client.post("/v1/jobs", json=BODY).status_code == 202  # 2.5 are left

    refused = client.post("/v1/jobs:batch", json=batch_of(3))
    accepted = client.post("/v1/jobs:batch", json=batch_of(2))  # 0.5 are left
    small = [client.post("/v1/jobs", json={**BODY, "steps": 4}) for _ in range(2)]

    assert assert_problem(refused, 429, "budget-spent")["policy"] == "megapixel-steps"
    assert accepted.json()["accepted"] == 2
    assert [answer.status_code for answer in small] == [202, 429]
    assert len(client.get("/v1/jobs").json()["data"]) == 4
    too_much = client.post("/v1/jobs:batch", json=batch_of(4))
    refusal = assert_problem(too_much, 422, "invalid-image-request")
    assert refusal["errors"][0]["accepted"] == {"max_megapixel_steps": 3.5 * COST}


def test_a_batch_that_comes_to_nothing_costs_no_budget(limited):
    budget = {"megapixel_steps_per_minute": 0.006, "burst_megapixel_steps": 3.5 * COST}
    client = limited(**budget, max_concurrent_jobs=2)
    assert client.post("/v1/jobs", json=BODY).status_code == 202  # 2.5 are left

    for _ in range(2):
        assert_problem(client.post("/v1/jobs:batch", json=batch_of(2)), 429, "too-many-jobs")


@pytest.mark.parametrize("period", ["day", "month"])
def test_a_batch_counts_as_a_whole_against_a_quota(limited, period):
    name = {"day": "daily_megapixel_steps", "month": "monthly_megapixel_steps"}[period]
    client = limited(**{name: Decimal("3.5") * Decimal(str(COST))})
    assert client.post("/v1/jobs", json=BODY).status_code == 202

    refused = client.post("/v1/jobs:batch", json=batch_of(3))
    assert assert_problem(refused, 429, "quota-exceeded")["period"] == period
    assert [day["jobs_accepted"] for day in client.get("/v1/usage").json()["data"]] == [1]

    assert client.post("/v1/jobs:batch", json=batch_of(2)).json()["accepted"] == 2
    [day] = client.get("/v1/usage").json()["data"]
    assert (day["jobs_accepted"], day["reserved_megapixel_steps"]) == (3, pytest.approx(3 * COST))
    assert_problem(client.post("/v1/jobs", json=BODY), 429, "quota-exceeded")


def test_tiers_and_models_that_are_not_allowed_are_forbidden_and_not_shown(limited):
    client = limited(allowed_tiers=["batch"])

    for way in ("/v1/jobs", "/v1/estimate"):
        problem = assert_problem(
            client.post(way, json={**BODY, "tier": "fast", "steps": 4}), 403, "forbidden"
        )
        assert problem["accepted"] == {"tiers": ["batch"]}
    assert [tier["id"] for tier in client.get("/v1/tiers").json()["data"]] == ["batch"]
    for model in (
        client.get("/v1/models").json()["data"][0],
        client.get("/v1/models/pocket").json(),
    ):
        assert list(model["tiers"]) == ["batch"]
    assert client.post("/v1/jobs", json=BODY).status_code == 202

    without = limited(allowed_models=["another"])
    assert without.get("/v1/models").json()["data"] == []
    assert_problem(without.get("/v1/models/pocket"), 404, "model-not-found")
    assert_problem(without.post("/v1/jobs", json=BODY), 403, "forbidden")


def test_a_batch_refuses_items_of_a_tier_that_is_not_allowed(limited):
    client = limited(allowed_tiers=["batch"])

    jobs = [BODY, {**BODY, "tier": "fast", "steps": 4}]
    batch = client.post("/v1/jobs:batch", json={"jobs": jobs}).json()

    assert [item["status"] for item in batch["data"]] == [202, 403]
    assert batch["data"][1]["problem"]["accepted"] == {"tiers": ["batch"]}


@pytest.mark.parametrize("taken_away", ["tiers", "models"])
def test_a_replay_of_what_was_taken_away_is_forbidden(limited, stack_database, taken_away):
    client = limited()
    job = client.post("/v1/jobs", json=BODY).json()
    tenant_id = uuid.UUID(client.get("/v1/key").json()["tenant_id"])
    changes = {f"allowed_{taken_away}": {"tiers": ["fast"], "models": ["another"]}[taken_away]}
    with transaction(stack_database) as session:
        tenant = session.get(tenants.Tenant, tenant_id)
        tenants.limit(session, tenant, changes=changes, actor="tests")
    until(lambda: client.get("/v1/key").json()["limits"][f"allowed_{taken_away}"])

    answer = client.post(job["urls"]["replay"])

    problem = assert_problem(answer, 403, "forbidden")
    assert (
        problem["accepted"] == {"tiers": {"tiers": ["fast"]}, "models": {"models": []}}[taken_away]
    )
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_without_redis_requests_are_counted_by_each_process_and_budgets_by_nobody(
    limited, gateway_with, elsewhere
):
    client = limited(
        requests_per_minute=5, megapixel_steps_per_minute=0.06, burst_megapixel_steps=1.5 * COST
    )
    app = gateway_with(**elsewhere("handoff")).application
    key = {"Authorization": client.headers["Authorization"]}

    answers = [
        app.test_client().post("/v1/jobs", json=BODY, headers=key).status_code for _ in range(7)
    ]

    assert answers == [202] * 5 + [429] * 2


def test_a_changed_limit_holds_within_a_second(limited, stack_database):
    client = limited(requests_per_minute=1000)
    assert client.get("/v1/jobs").status_code == 200

    with transaction(stack_database) as session:
        tenant = session.get(tenants.Tenant, uuid.UUID(client.get("/v1/key").json()["tenant_id"]))
        tenants.limit(session, tenant, changes={"requests_per_minute": 1}, actor="tests")
    time.sleep(1)

    assert [client.get("/v1/jobs").status_code for _ in range(3)] == [200, 429, 429]


def test_a_tenant_that_waits_for_its_own_lock_keeps_no_tier_s_releases_from_others(
    limited, stack_database
):
    client = limited(max_concurrent_jobs=5)
    tenant_id = client.get("/v1/key").json()["tenant_id"]

    with ThreadPoolExecutor(1) as elsewhere, transaction(stack_database) as session:
        usage.lock(session, tenant_id=uuid.UUID(tenant_id))
        answer = elsewhere.submit(client.post, "/v1/jobs", json=BODY)
        until(
            lambda: (
                session.scalar(
                    text(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                    )
                )
                > 0
            )
        )
        free = text("SELECT pg_try_advisory_xact_lock(hashtext('release:local:batch'))")
        # the sweeper has it now and then
        until(lambda: session.scalar(free), what="a moment without a release")

    assert answer.result().status_code == 202


def test_a_model_s_cost_factor_multiplies_what_its_jobs_count_everywhere(a_house):
    house = a_house({"models.pocket.cost_factor": 2.5}).with_workers()
    tenant, counts = house.tenant(), 2.5 * COST

    estimate = tenant.send("/v1/estimate", BODY).json
    job = tenant.send("/v1/jobs", BODY).json
    tenant.send("/v1/jobs:batch", batch_of(2))
    replay = tenant.send(job["urls"]["replay"], {}).json

    told = [each["megapixel_steps"] for each in (estimate, job, tenant.get(job), replay)]
    assert told == [pytest.approx(counts)] * 4
    usage_now = json.loads(tenant.read("/v1/usage"))
    assert usage_now["used_megapixel_steps"]["today"] == pytest.approx(4 * counts)
    [day] = usage_now["data"]
    assert day["reserved_megapixel_steps"] == pytest.approx(4 * counts)


@pytest.mark.parametrize(
    ("at", "limits", "refusal"),
    [
        ({"used_today": 10, "used_this_month": 10}, {"daily_megapixel_steps": 10}, None),
        ({"used_today": 11, "used_this_month": 11}, {"daily_megapixel_steps": 10}, ("day", 90)),
        ({"used_today": 1, "used_this_month": 11}, {"monthly_megapixel_steps": 10}, ("month", 901)),
        (
            {"used_today": 11, "used_this_month": 11},
            {"daily_megapixel_steps": 10, "monthly_megapixel_steps": 10},
            ("day", 90),
        ),
    ],
)
def test_a_quota_s_refusal_says_when_its_own_period_ends(at, limits, refusal):
    """The totals are said by the test: the month's end is the day's on one day of the month."""
    totals = UsageTotals(active_jobs=0, day_ends_in_s=89.5, month_ends_in_s=900.1, **at)

    try:
        _check_totals(Limits(**limits), totals)
        told = None
    except QuotaExceeded as problem:
        told = (problem.members["period"], problem.retry_after_s)

    assert told == refusal
