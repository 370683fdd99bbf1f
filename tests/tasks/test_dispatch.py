"""The whole path on the running stack.

Accept, queue, lease, render in company, hand off, store; and what happens when parts of it die.
"""

import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest
import redis
from sqlalchemy import text

from darkroom_client import Client, Job, ProblemError
from edges.broker import Broker, make_celery
from models.database import make_engine
from policy import queues
from policy.fleet import parse_fleet
from settings import REPO, BrokerSettings
from tests.builders import until
from tests.pictures import a_picture, png

SHAPES = (
    "a large red circle on a blue background",
    "a small green star at the top on a white background",
    "a yellow square on black",
)


@pytest.fixture(scope="session")
def sql(stack):
    """Ask the database as its owner: rows as dicts."""
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)

    def ask(query: str, **values):
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    yield ask
    engine.dispose()


def finished(client: Client, job: Job, within_s: float = 120) -> Job:
    return client.wait(job.id, timeout_s=within_s)


def eventually(is_true: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def attempts_of(sql, job: Job) -> list[dict]:
    return sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job.id)


def test_forty_jobs_over_all_tiers_all_succeed_and_share_batches(client, sql):
    jobs = [
        client.create_job(
            SHAPES[n % 3], tier=("fast", "quality", "batch")[n % 3], seed=n, steps=4 + n % 5
        )
        for n in range(40)
    ]

    ended = [finished(client, job) for job in jobs]

    assert {job.state for job in ended} == {"succeeded"}
    ids = [uuid.UUID(job.id) for job in jobs]
    rows = sql(
        "SELECT max_images, shared_steps, outcome FROM attempts WHERE job_id = ANY(:ids)", ids=ids
    )
    assert len(rows) == 40, "one attempt each"
    assert max(row["max_images"] for row in rows) > 1
    assert sum(row["shared_steps"] for row in rows) > 0
    assert sql("SELECT * FROM audit_verify()") == []
    stored = sql("SELECT count(*) AS n FROM artifacts WHERE job_id = ANY(:ids)", ids=ids)
    assert stored == [{"n": 40}]


def test_a_burst_of_large_jobs_never_takes_more_slots_than_its_tiers_have(
    client, second_tenant, sql
):
    """Of 16 slots batch has 10 beside those kept for better tiers, quality 12.

    The last job of each may stick out by 7 images.
    """
    job_bodies = [
        {
            "prompt": SHAPES[n % 3],
            "tier": ("batch", "quality")[n % 2],
            "seed": n,
            "steps": 30,
            "n": 8,
        }
        for n in range(12)
    ]
    burst = [submission.job_id for submission in client.create_jobs(job_bodies)]
    held: list[dict[str, int]] = []

    def took_what_it_may() -> bool:
        rows = sql(
            "SELECT j.tier, count(*) AS images FROM jobs j JOIN images i ON i.job_id = j.id"
            " WHERE j.state = 'running' AND i.state = 'pending' GROUP BY j.tier"
        )
        held.append({row["tier"]: row["images"] for row in rows})
        return held[-1].get("batch", 0) >= 10 and held[-1].get("quality", 0) >= 10

    try:
        eventually(took_what_it_may)
        for _ in range(8):
            assert (
                finished(
                    second_tenant.client, second_tenant.client.create_job(SHAPES[0], tier="fast")
                ).state
                == "succeeded"
            )
            took_what_it_may()
    finally:
        for job_id in burst:
            with suppress(ProblemError):  # it has ended
                client.cancel(job_id)

    assert max(images.get("batch", 0) for images in held) <= 17
    assert max(images.get("quality", 0) for images in held) <= 19


def test_a_reproducible_image_is_the_same_alone_and_in_company(client, sql):
    fields = {"prompt": SHAPES[0], "tier": "quality", "seed": 77, "steps": 12}
    alone = finished(client, client.create_job(**fields))

    crowd = [
        client.create_job(SHAPES[n % 3], tier="quality", seed=n, steps=9 + n, guidance=2.0 + n)
        for n in range(6)
    ]
    together = finished(client, client.create_job(**fields))
    for job in crowd:
        finished(client, job)

    assert attempts_of(sql, alone)[0]["shared_steps"] == 0
    in_company = attempts_of(sql, together)[0]
    assert in_company["shared_steps"] > 0, "neighbours really shared the forward"
    assert (
        in_company["bucket_rows"]
        == attempts_of(sql, alone)[0]["bucket_rows"]
        == together.members["bucket_rows"]
    )
    assert together.images[0].pixels_sha256 == alone.images[0].pixels_sha256


def test_weights_stay_loaded_from_task_to_task(client, sql, stack):
    before = (stack.pid("worker"), sql("SELECT started_at FROM workers"))

    for seed in range(3):
        finished(client, client.create_job(SHAPES[1], tier="fast", seed=seed))

    assert (stack.pid("worker"), sql("SELECT started_at FROM workers")) == before


def test_flower_lists_the_worker_its_queues_and_the_tasks(client, stack):
    finished(client, client.create_job(SHAPES[2], tier="fast"))
    env = stack.env
    flower = httpx.Client(base_url=env["FLOWER_URL"], timeout=20)

    assert flower.get("/api/workers").status_code == 401
    flower.auth = (env["FLOWER_USER"], env["FLOWER_PASSWORD"])
    workers = flower.get("/api/workers", params={"refresh": 1}).json()
    name, worker = next(
        (name, worker)
        for name, worker in workers.items()
        if queues.RENDER_JOB in worker.get("registered", [])
    )
    consumed = {queue["name"] for queue in worker["active_queues"]}
    assert consumed == {
        f"local.{tier}{front}" for tier in ("fast", "quality", "batch") for front in ("", ".front")
    }, name
    eventually(
        lambda: (
            queues.RENDER_JOB in {task["name"] for task in flower.get("/api/tasks").json().values()}
        )
    )


def test_flower_has_no_route_that_acts(stack):
    env = stack.env
    with httpx.Client(
        base_url=env["FLOWER_URL"], timeout=20, auth=(env["FLOWER_USER"], env["FLOWER_PASSWORD"])
    ) as flower:
        for route in (
            "worker/shutdown/x",
            "worker/pool/grow/x",
            "worker/queue/add-consumer/x",
            "task/revoke/x",
            "task/timeout/x",
        ):
            assert flower.post(f"/api/{route}").text.find("Unknown") < 0, route
        for route in ("task/apply", "task/async-apply", "task/send-task"):
            assert flower.post(f"/api/{route}/{queues.TIDY_STORE}", json={}).status_code == 404, (
                route
            )


def test_a_worker_answers_inspections_and_obeys_nobody(stack):
    celery = make_celery(
        BrokerSettings(broker_url=stack.env["BROKER_URL"]),
        parse_fleet((REPO / "fleet.toml").read_text()),
    )
    before = {name: stack.pid(name) for name in ("worker", "results", "webhooks")}
    asked = until(lambda: celery.control.inspect(timeout=2).ping())

    celery.control.broadcast("shutdown")
    celery.control.broadcast("cancel_consumer", arguments={"queue": queues.WEBHOOKS})

    assert until(
        lambda: (celery.control.inspect(timeout=2).ping() or {}).keys() == asked.keys(), within_s=30
    )
    assert {name: stack.pid(name) for name in before} == before
    consumed = celery.control.inspect(timeout=2).active_queues()
    assert queues.WEBHOOKS in {queue["name"] for own in consumed.values() for queue in own}


def test_a_killed_worker_loses_no_job_and_doubles_no_image(client, sql, stack):
    jobs = [client.create_job(SHAPES[n % 3], tier="batch", seed=n, steps=40, n=2) for n in range(6)]
    eventually(lambda: sql("SELECT count(*) AS n FROM jobs WHERE state = 'running'")[0]["n"] > 0)

    stack.kill("worker", signal.SIGKILL)

    ended = [finished(client, job) for job in jobs]
    assert {job.state for job in ended} == {"succeeded"}
    assert all(len({image.content_sha256 for image in job.images}) == 2 for job in ended)
    assert max(job.attempt for job in ended) == 2
    lost = sql(
        "SELECT count(*) AS n FROM attempts WHERE outcome = 'lease_lost' AND job_id = ANY(:ids)",
        ids=[uuid.UUID(job.id) for job in jobs],
    )
    assert lost[0]["n"] >= 1
    assert sql("SELECT * FROM audit_verify()") == []


def test_flushed_redises_lose_no_job(client, stack):
    jobs = [client.create_job(SHAPES[n % 3], tier="batch", seed=n, steps=20) for n in range(24)]

    for url in ("BROKER_URL", "HANDOFF_URL"):
        redis.Redis.from_url(stack.env[url]).flushall()

    assert {finished(client, job).state for job in jobs} == {"succeeded"}


@pytest.mark.parametrize("url", ["BROKER_URL", "HANDOFF_URL"])
def test_a_failover_ends_no_process_and_no_job(client, stack, url):
    before, server = (
        {status.name: status.pid for status in stack.status()},
        redis.Redis.from_url(stack.env[url]),
    )

    server.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        jobs = [client.create_job(SHAPES[n % 3], tier="fast", seed=n) for n in range(4)]
        time.sleep(3)  # as long as the servers need to agree on a new primary
    finally:
        server.execute_command("REPLICAOF", "NO", "ONE")

    assert {finished(client, job).state for job in jobs} == {"succeeded"}
    assert {status.name: status.pid for status in stack.status()} == before


def test_rendered_jobs_wait_for_a_results_worker_and_are_stored_once(client, sql, stack):
    stack.stop("results")
    try:
        job = client.create_job(SHAPES[0], tier="fast", seed=5)
        eventually(lambda: client.job(job.id).state == "storing")
    finally:
        stack.start("results")

    ended = finished(client, job)

    assert ended.state == "succeeded"
    assert sql("SELECT count(*) AS n FROM artifacts WHERE job_id = :id", id=job.id) == [{"n": 1}]


@pytest.mark.parametrize("part", ["results", "s3"])
def test_jobs_that_wait_for_their_pictures_are_in_nobody_s_way(
    client, second_tenant, sql, stack, part
):
    file = client.upload(png(a_picture(128, 128)))
    fields = {"tier": "quality", "steps": 4, "init_image": file.id}
    stack.stop(part)
    try:
        waiting = client.create_jobs(
            [{"prompt": SHAPES[n % 3], "seed": n, **fields} for n in range(40)]
        )
        waiting_ids = [uuid.UUID(submission.job_id) for submission in waiting]
        for tenant in (client, second_tenant.client):
            for tier in ("fast", "quality", "batch"):
                job = tenant.create_job(SHAPES[0], tier=tier, steps=4)
                eventually(lambda job=job, tenant=tenant: tenant.job(job.id).state == "storing")
        assert sql(
            "SELECT DISTINCT state, attempt FROM jobs WHERE id = ANY(:ids)", ids=waiting_ids
        ) == [{"state": "queued", "attempt": 0}]
    finally:
        stack.start(part)

    assert {finished(client, client.job(str(job_id))).state for job_id in waiting_ids} == {
        "succeeded"
    }
    rows = sql(
        "SELECT count(*) AS attempts FROM attempts WHERE job_id = ANY(:ids)", ids=waiting_ids
    )
    assert rows == [{"attempts": 40}], "each got its lease once, when its picture was there"


def test_a_vanished_hand_off_is_rendered_again_without_counting_as_a_try(client, sql, stack):
    stack.stop("results")
    try:
        job = client.create_job(SHAPES[1], tier="fast", seed=6)
        eventually(lambda: client.job(job.id).state == "storing")
        redis.Redis.from_url(stack.env["HANDOFF_URL"]).flushall()
    finally:
        stack.start("results")

    ended = finished(client, job)

    assert (ended.state, ended.attempt) == ("succeeded", 2)
    assert sql("SELECT counted_attempts FROM jobs WHERE id = :id", id=job.id) == [
        {"counted_attempts": 0}
    ]


def test_an_object_store_that_is_away_only_delays(client, stack):
    stack.stop("s3")
    try:
        job = client.create_job(SHAPES[2], tier="fast", seed=8)
        eventually(lambda: client.job(job.id).state == "storing")
    finally:
        stack.start("s3")

    assert finished(client, job).state == "succeeded"


def test_a_running_job_stops_when_it_is_canceled(client, sql):
    job = client.create_job(SHAPES[0], tier="batch", seed=1, steps=60, n=8)
    eventually(lambda: client.job(job.id).state == "running")
    # Right after a heartbeat, so that the next renewal, 5 s later, cannot be what tells the worker.
    fresh = "SELECT clock_timestamp() - seen_at < interval '0.5 s' AS is_fresh FROM workers"
    eventually(lambda: sql(fresh) == [{"is_fresh": True}])

    canceled = client.cancel(job.id)

    assert canceled.state == "canceled"
    # Dropped, and its waste is on record.
    eventually(lambda: attempts_of(sql, job)[0]["device_seconds"] > 0, within_s=2)
    attempt = attempts_of(sql, job)[0]
    assert (attempt["outcome"], attempt["waste_class"]) == ("canceled", "canceled")
    assert client.job(job.id).state == "canceled"
    assert client.cancel(job.id).state == "canceled", "harmless when repeated"


def test_a_message_delivered_twice_renders_once(client, sql, stack):
    job = finished(client, client.create_job(SHAPES[1], tier="fast", seed=3))

    broker = Broker(
        BrokerSettings(broker_url=stack.env["BROKER_URL"]),
        parse_fleet((REPO / "fleet.toml").read_text()),
    )
    for _ in range(3):
        broker.announce(queues.RENDER_JOB, queues.render_queue("local", "fast"), uuid.UUID(job.id))
        broker.announce(queues.STORE_IMAGES, "results.fast", uuid.UUID(job.id))
    eventually(lambda: broker.waiting("local.fast") == 0 and broker.waiting("results.fast") == 0)
    time.sleep(0.5)

    assert len(attempts_of(sql, job)) == 1
    assert sql("SELECT count(*) AS n FROM artifacts WHERE job_id = :id", id=job.id) == [{"n": 1}]


def test_the_price_of_a_job_is_its_device_seconds_times_its_tiers_weight(client, sql):
    job = finished(client, client.create_job(SHAPES[2], tier="batch", seed=4, steps=6, n=2))

    seconds = sum(
        row["device_seconds"]
        for row in sql("SELECT device_seconds FROM images WHERE job_id = :id", id=job.id)
    )
    assert job.cost.gpu_seconds == pytest.approx(seconds, abs=1e-5)
    assert float(job.cost.amount) == pytest.approx(seconds * 1.20 * 0.5 / 3600, abs=2e-6)
    assert job.cost.currency == "USD"


def test_everything_listens_on_the_loopback_only(stack):
    for name in (
        "DARKROOM_URL",
        "FLOWER_URL",
        "S3_ENDPOINT_URL",
        "BROKER_URL",
        "HANDOFF_URL",
        "DATABASE_URL",
    ):
        assert "@127.0.0.1:" in stack.env[name] or "//127.0.0.1:" in stack.env[name], name
