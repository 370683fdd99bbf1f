"""The whole path on the running stack.

Accept, queue, lease, render in company, hand off, store; and what happens when parts of it die.
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import psutil
import pytest
import redis
from click.testing import CliRunner
from sqlalchemy import text

from cli.main import darkroom
from darkroom_client import Client, Job, ProblemError
from edges.broker import Broker, make_celery
from models.database import make_engine
from policy import queues
from policy.fleet import parse_fleet
from policy.states import FINAL_STATES
from settings import REPO, BrokerSettings
from tests.builders import until
from tests.pictures import a_picture, png

SHAPES = (
    "a large red circle on a blue background",
    "a small green star at the top on a white background",
    "a yellow square on black",
)


def finished(client: Client, job: Job, within_s: float = 120) -> Job:
    return client.wait(job.id, timeout_s=within_s)


def attempts_of(sql, job: Job) -> list[dict]:
    return sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job.id)


def test_jobs_over_all_tiers_all_succeed_and_share_batches(client, sql):
    jobs = [
        client.create_job(
            SHAPES[n % 3], tier=("fast", "quality", "batch")[n % 3], seed=n, steps=4 + n % 5
        )
        for n in range(18)
    ]

    ended = [finished(client, job) for job in jobs]

    assert {job.state for job in ended} == {"succeeded"}
    ids = [uuid.UUID(job.id) for job in jobs]
    rows = sql(
        "SELECT max_images, shared_steps, outcome FROM attempts WHERE job_id = ANY(:ids)", ids=ids
    )
    assert len(rows) == 18, "one attempt each"
    assert max(row["max_images"] for row in rows) > 1
    assert sum(row["shared_steps"] for row in rows) > 0
    assert sql("SELECT * FROM audit_verify()") == []
    stored = sql("SELECT count(*) AS n FROM artifacts WHERE job_id = ANY(:ids)", ids=ids)
    assert stored == [{"n": 18}]


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
        until(took_what_it_may)
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
        client.create_job(SHAPES[n], tier="quality", seed=n, steps=20 + n, guidance=2.0 + n)
        for n in range(3)
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
    until(
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

    def ask(question: str) -> dict:
        """The answers by process; they are not waited for once all have come."""
        return getattr(celery.control.inspect(timeout=20, limit=len(before)), question)() or {}

    asked = until(lambda: answers if len(answers := ask("ping")) == len(before) else None)

    celery.control.broadcast("shutdown")
    celery.control.broadcast("cancel_consumer", arguments={"queue": queues.WEBHOOKS})

    # They are answered in their order: whoever answers now has had the others before.
    assert until(lambda: ask("ping").keys() == asked.keys())
    assert {name: stack.pid(name) for name in before} == before
    consumed = ask("active_queues")
    assert queues.WEBHOOKS in {queue["name"] for own in consumed.values() for queue in own}


def test_a_killed_worker_loses_no_job_and_doubles_no_image(client, sql, stack):
    jobs = [client.create_job(SHAPES[n % 3], tier="batch", seed=n, steps=40, n=2) for n in range(3)]
    worker = psutil.Process(stack.pid("worker"))
    first = jobs[0]
    until(lambda: ((client.job(first.id).members["progress"] or {}).get("step") or 0) >= 2 * 12)

    worker.kill()

    ended = [finished(client, job) for job in jobs]
    assert {job.state for job in ended} == {"succeeded"}
    assert all(len({image.content_sha256 for image in job.images}) == 2 for job in ended)
    assert max(job.attempt for job in ended) == 2
    lost = sql(
        "SELECT count(*) AS n FROM attempts WHERE outcome = 'lease_lost' AND job_id = ANY(:ids)",
        ids=[uuid.UUID(job.id) for job in jobs],
    )
    assert lost[0]["n"] >= 1
    _, second = attempts_of(sql, first)
    assert second["resumed_steps"] >= 2 * 10, "from the newest snapshot of each image"
    assert second["lost_steps"] <= 2 * 10, "an interval of each image"
    assert sql("SELECT * FROM audit_verify()") == []
    command = ["--data-dir", str(stack.data_dir), "trace", "--json", first.id]
    spans = json.loads(CliRunner().invoke(darkroom, command).stdout)["spans"]
    tries = [span for span in spans if span["name"].startswith("attempt")]
    assert [span["outcome"] for span in tries] == ["lease_lost", "rendered"]
    assert tries[1]["resumed_steps"] == second["resumed_steps"]


def test_flushed_redises_lose_no_job(client, sql, stack):
    jobs = client.create_jobs(
        [{"prompt": SHAPES[n % 3], "tier": "batch", "seed": n, "steps": 10} for n in range(20)]
    )
    ids = [uuid.UUID(job.job_id) for job in jobs]

    for url in ("BROKER_URL", "HANDOFF_URL"):
        redis.Redis.from_url(stack.env[url]).flushall()

    def have_ended() -> bool:
        """Tell whether all have; those that wait to be stored have waited for long enough."""
        sql(
            "UPDATE jobs SET store_by = clock_timestamp()"
            " WHERE id = ANY(:ids) AND state = 'storing' RETURNING id",
            ids=ids,
        )
        states = sql("SELECT DISTINCT state FROM jobs WHERE id = ANY(:ids)", ids=ids)
        return {row["state"] for row in states} <= set(FINAL_STATES)

    until(have_ended, within_s=120, what="their ends")
    assert {client.job(str(job_id)).state for job_id in ids} == {"succeeded"}


@pytest.mark.parametrize("url", ["BROKER_URL", "HANDOFF_URL"])
def test_a_failover_ends_no_process_and_no_job(client, stack, url):
    before, server = (
        {status.name: status.pid for status in stack.status()},
        redis.Redis.from_url(stack.env[url]),
    )

    server.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        jobs = [client.create_job(SHAPES[n % 3], tier="fast", seed=n) for n in range(4)]
        time.sleep(1.5)  # as long as the servers need to agree on a new primary
    finally:
        server.execute_command("REPLICAOF", "NO", "ONE")

    assert {finished(client, job).state for job in jobs} == {"succeeded"}
    assert {status.name: status.pid for status in stack.status()} == before


@dataclass(frozen=True)
class Outage:
    """What became of jobs that were accepted while a part of the stack was away."""

    waiting: list[uuid.UUID]  # for their pictures
    waiting_meanwhile: list[dict]  # their states and attempts
    rendered: list[Job]  # of each tenant and tier
    vanished: list[Job]  # rendered as well, and their pixels were lost


@pytest.fixture(scope="module", params=["results", "s3"])
def outage(request, client, second_tenant, sql, stack) -> Outage:
    part = request.param
    file = client.upload(png(a_picture(128, 128)))
    fields = {"tier": "quality", "steps": 4, "init_image": file.id}
    ways = [
        (tenant, tier)
        for tenant in (client, second_tenant.client)
        for tier in ("fast", "quality", "batch")
    ]
    vanished: list[Job] = []
    stack.stop(part)
    try:
        waiting = client.create_jobs(
            [{"prompt": SHAPES[n % 3], "seed": n, **fields} for n in range(40)]
        )
        waiting_ids = [uuid.UUID(submission.job_id) for submission in waiting]
        rendered = [tenant.create_job(SHAPES[0], tier=tier, steps=4) for tenant, tier in ways]
        if part == "results":  # where nobody has read the pixels
            vanished.append(client.create_job(SHAPES[1], tier="fast", seed=6))
        ids = [uuid.UUID(job.id) for job in rendered + vanished]
        states = "SELECT DISTINCT state FROM jobs WHERE id = ANY(:ids)"
        until(lambda: sql(states, ids=ids) == [{"state": "storing"}], what="their rendering")
        meanwhile = sql(
            "SELECT DISTINCT state, attempt FROM jobs WHERE id = ANY(:ids)", ids=waiting_ids
        )
        with redis.Redis.from_url(stack.env["HANDOFF_URL"]) as handoff:
            for job in vanished:
                assert handoff.delete(*handoff.keys(f"handoff:{job.id}:*"))
    finally:
        stack.start(part)
    return Outage(
        waiting=waiting_ids,
        waiting_meanwhile=meanwhile,
        rendered=[finished(tenant, job) for (tenant, _), job in zip(ways, rendered, strict=True)],
        vanished=[finished(client, job) for job in vanished],
    )


def test_jobs_that_wait_for_their_pictures_are_in_nobody_s_way(outage, client, sql):
    assert outage.waiting_meanwhile == [{"state": "queued", "attempt": 0}], "others were rendered"
    assert {client.wait(str(job_id)).state for job_id in outage.waiting} == {"succeeded"}
    rows = sql(
        "SELECT count(*) AS attempts FROM attempts WHERE job_id = ANY(:ids)", ids=outage.waiting
    )
    assert rows == [{"attempts": 40}], "each got its lease once, when its picture was there"


def test_rendered_jobs_wait_for_a_part_that_is_away_and_are_stored_once(outage, sql):
    assert {(job.state, job.attempt) for job in outage.rendered} == {("succeeded", 1)}
    stored = sql(
        "SELECT job_id FROM artifacts WHERE job_id = ANY(:ids)",
        ids=[uuid.UUID(job.id) for job in outage.rendered],
    )
    assert {str(row["job_id"]) for row in stored} == {job.id for job in outage.rendered}
    assert len(stored) == len(outage.rendered)


@pytest.mark.parametrize("outage", ["results"], indirect=True)
def test_a_vanished_hand_off_is_rendered_again_without_counting_as_a_try(outage, sql):
    [job] = outage.vanished

    assert (job.state, job.attempt) == ("succeeded", 2)
    assert sql("SELECT counted_attempts FROM jobs WHERE id = :id", id=job.id) == [
        {"counted_attempts": 0}
    ]


@contextmanager
def no_heartbeat(stack) -> Iterator[None]:
    """Keep workers from renewing leases: their rows are locked, and a heartbeat waits for them."""
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)
    with engine.begin() as connection:
        connection.execute(text("SELECT FROM workers FOR UPDATE"))
        yield
    engine.dispose()


def test_a_running_job_stops_when_it_is_canceled(client, sql, stack):
    job = client.create_job(SHAPES[0], tier="batch", seed=1, steps=60, n=8)
    until(lambda: ((client.job(job.id).members["progress"] or {}).get("step") or 0) > 0)

    with no_heartbeat(stack):  # which would tell the worker, too
        canceled = client.cancel(job.id)
        # Dropped, and its waste is on record. By itself it would be 7 s from now at the earliest.
        until(lambda: attempts_of(sql, job)[0]["device_seconds"] > 0, within_s=6)

    assert canceled.state == "canceled"
    attempt = attempts_of(sql, job)[0]
    assert (attempt["outcome"], attempt["waste_class"]) == ("canceled", "canceled")
    [done] = sql("SELECT sum(steps_done) AS steps FROM images WHERE job_id = :id", id=job.id)
    assert done["steps"] < 60 * 8, "it was stopped, and did not come to its end meanwhile"
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
    until(lambda: broker.waiting("local.fast") == 0 and broker.waiting("results.fast") == 0)
    finished(client, client.create_job(SHAPES[1], tier="fast", seed=4))  # taken after those

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
