"""Workers that have to go: with a notice, and without one.

On a stack of its own with two workers, one of which goes.
"""

import base64
import shutil
import signal
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import text

from darkroom_client import Client
from fleet.stack import Stack
from models.database import make_engine
from tests.builders import until
from tests.pictures import a_picture, png

# shorter than an operator's, for the sake of the suite
LEASE = {"LEASE_TTL_S": "6", "LEASE_RENEW_S": "2", "LEASE_STOP_S": "5"}
JOB_BODY = {
    "prompt": "a large red circle on a blue background",
    "tier": "quality",
    "steps": 60,
    "n": 4,
}


@pytest.fixture(scope="module")
def folder():
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pair(folder):
    """A stack with two workers, each of which looks for a notice in a file of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREEMPTION_NOTICES", f"file:{folder}/notice-{{worker}}")
    patch.setenv("SHUTDOWN_NOTICE_S", "4")
    for name, seconds in LEASE.items():
        patch.setenv(name, seconds)
    stack = Stack(folder / "data", workers=2)
    try:
        stack.up(wait_s=280)
        yield stack
    finally:
        stack.down()
        patch.undo()


@pytest.fixture(scope="module")
def tenant(pair):
    with Client(pair.env["DARKROOM_URL"], pair.env["DARKROOM_API_KEY"]) as client:
        yield client


@pytest.fixture(scope="module")
def sql(pair):
    engine = make_engine(pair.env["MIGRATION_DATABASE_URL"], pool_size=1)

    def ask(query: str, **values):
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    yield ask
    engine.dispose()


@pytest.fixture(autouse=True)
def both_are_here(sql):
    until(
        lambda: (
            len(sql("SELECT FROM workers WHERE slots > 0 AND seen_at > now() - interval '8 s'"))
            == 2
        ),
        within_s=60,
        what="two workers",
    )


def progressed(tenant, job, steps: int):
    until(
        lambda: ((tenant.job(job.id).members["progress"] or {}).get("step") or 0) >= steps,
        within_s=30,
        what=f"{steps} steps",
    )


def asked_for(pair, job_body) -> str:
    """The id of a new job with fields that the client does not know."""
    headers = {"Authorization": f"Bearer {pair.env['DARKROOM_API_KEY']}"}
    return httpx.post(
        f"{pair.env['DARKROOM_URL']}/v1/jobs", json=job_body, headers=headers, trust_env=False
    ).json()["id"]


def attempts_of(sql, job):
    return sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job.id)


def name_of(sql, job) -> str:
    return sql("SELECT worker FROM jobs WHERE id = :id", id=job.id)[0]["worker"]


def process_of(worker: str) -> str:
    return worker.partition("@")[0]


def test_a_worker_with_a_notice_gives_its_jobs_up_and_another_goes_on_at_the_very_step(
    pair, tenant, sql, folder
):
    undisturbed = tenant.wait(tenant.create_job(**JOB_BODY, seed=31).id)
    job = tenant.create_job(**JOB_BODY, seed=31)
    progressed(tenant, job, 40)
    worker = name_of(sql, job)

    notice = folder / f"notice-{worker}"
    notice.write_text("4")
    ended = tenant.wait(job.id)
    notice.unlink()

    assert ended.state == "succeeded"
    first, second = attempts_of(sql, job)
    assert (first["outcome"], first["waste_class"]) == ("preempted", None)
    assert first["snapshot_bytes"] > 0
    assert first["snapshot_store"] == "handoff"
    assert second["worker"] != worker
    assert second["resumed_steps"] >= 40
    assert second["lost_steps"] == 0
    assert second["resumed_steps"] + second["steps"] == 60 * 4
    assert (second["started_at"] - first["ended_at"]).total_seconds() < 1
    assert [image.pixels_sha256 for image in ended.images] == [
        image.pixels_sha256 for image in undisturbed.images
    ]
    assert sql("SELECT counted_attempts FROM jobs WHERE id = :id", id=job.id) == [
        {"counted_attempts": 0}
    ]


@pytest.mark.slow
def test_a_job_that_starts_from_a_picture_goes_on_at_the_very_step_too(pair, tenant, sql, folder):
    picture = base64.b64encode(png(a_picture(128, 128))).decode()
    job_body = JOB_BODY | {
        "seed": 35,
        "init_image": f"data:image/png;base64,{picture}",
        "strength": 0.9,
    }
    undisturbed = tenant.wait(asked_for(pair, job_body))
    job = tenant.job(asked_for(pair, job_body))
    progressed(tenant, job, 40)
    worker = name_of(sql, job)

    notice = folder / f"notice-{worker}"
    notice.write_text("4")
    ended = tenant.wait(job.id)
    notice.unlink()

    first, second = attempts_of(sql, job)
    assert (first["outcome"], second["resumed_steps"] >= 40) == ("preempted", True)
    assert second["resumed_steps"] + second["steps"] == 54 * 4
    assert [image.pixels_sha256 for image in ended.images] == [
        image.pixels_sha256 for image in undisturbed.images
    ]


def test_sigterm_is_a_notice_and_what_can_be_finished_is(pair, tenant, sql):
    long = tenant.create_job(**JOB_BODY, seed=32)
    progressed(tenant, long, 8)
    worker = psutil.Process(pair.pid(process_of(name_of(sql, long))))

    worker.terminate()
    worker.wait(timeout=4)
    ended = tenant.wait(long.id)

    assert ended.state == "succeeded"
    assert [row["lost_steps"] for row in attempts_of(sql, long)] in ([0, 0], [0])


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_at_most(pair, tenant, sql):
    undisturbed = tenant.wait(tenant.create_job(**JOB_BODY, seed=33).id)
    job = tenant.create_job(**JOB_BODY, seed=33)
    progressed(tenant, job, 100)
    worker = name_of(sql, job)

    killed_at = sql("SELECT clock_timestamp() AS at")[0]["at"]
    pair.kill(process_of(worker), signal.SIGKILL)
    ended = tenant.wait(job.id)

    assert ended.state == "succeeded"
    first, second = attempts_of(sql, job)
    assert first["outcome"] == "lease_lost"
    assert second["resumed_steps"] >= 4 * 20, "from the newest snapshot of each image"
    assert second["lost_steps"] <= 4 * 10, "an interval of each image"
    assert (second["started_at"] - killed_at).total_seconds() < 6 + 3
    assert [image.pixels_sha256 for image in ended.images] == [
        image.pixels_sha256 for image in undisturbed.images
    ]


def test_a_zombie_that_wakes_up_after_its_lease_writes_nothing(pair, tenant, sql):
    job = tenant.create_job(**JOB_BODY, seed=34)
    progressed(tenant, job, 8)
    worker = process_of(name_of(sql, job))

    pair.kill(worker, signal.SIGSTOP)
    try:
        ended = tenant.wait(job.id)
    finally:
        pair.kill(worker, signal.SIGCONT)
    time.sleep(3)

    assert ended.state == "succeeded"
    assert [row["outcome"] for row in attempts_of(sql, job)] == ["lease_lost", "rendered"]
    finals = (
        "SELECT count(*) AS n FROM audit_events WHERE job_id = :id AND event LIKE 'job:state:%'"
    )
    assert sql(finals, id=job.id) == [{"n": 1}]
    assert sql("SELECT count(*) AS n FROM artifacts WHERE job_id = :id", id=job.id) == [{"n": 4}]
