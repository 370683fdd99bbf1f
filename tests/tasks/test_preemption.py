"""Workers that have to go: with a notice, and without one.

On the suite's stack, beside whose worker these tests start one that goes.
"""

import base64
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from fleet import processes
from policy.fleet import parse_fleet
from settings import REPO
from tests.builders import until
from tests.pictures import a_picture, png

SHUTDOWN_NOTICE_S = 60
OWN = {  # a machine that has other things to do takes no lease away
    "LEASE_TTL_S": "60",
    "LEASE_RENEW_S": "0.5",
    "LEASE_STOP_S": "50",
    "SHUTDOWN_NOTICE_S": str(SHUTDOWN_NOTICE_S),
}
# Nobody has to wait until it does so by itself.
RUNS_OUT = """
UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 second'
WHERE id = :id AND worker = :worker RETURNING id
"""
JOB_BODY = {
    "prompt": "a large red circle on a blue background",
    "tier": "quality",
    "steps": 60,
    "n": 4,
    "seed": 31,
}


class Goer:
    """The worker that goes: one process after another, under one name."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.name = environment["WORKER_NAME"]
        self.notice = folder / f"notice-{self.name}"
        self._log = folder / "log"
        self._environment = os.environ | environment | OWN
        self._environment["PREEMPTION_NOTICES"] = f"file:{folder}/notice-{{worker}}"
        self.process: subprocess.Popen[bytes] | None = None

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fleet.worker"],
                cwd=REPO,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def has_said(self, *words: str) -> bool:
        """Tell whether one line of the newest process's log has all these words."""
        lines = self._log.read_text().splitlines()
        return any(all(word in line for word in words) for line in lines)


@pytest.fixture(scope="module")
def goers(stack, sql) -> Iterator[Goer]:
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    _, second, *_ = (
        program
        for program in processes.programs(stack.process_env(), fleet, workers={"local": 2})
        if program.name.startswith("worker-")
    )
    goer = Goer(folder, dict(second.environment))
    yield goer
    if goer.is_running():
        goer.process.kill()
        goer.process.wait()
    sql("DELETE FROM workers WHERE name = :name RETURNING name", name=goer.name)
    shutil.rmtree(folder)


@pytest.fixture
def goer(goers, sql) -> Goer:
    """The worker that goes, ready for a job."""
    if not goers.is_running():
        sql("DELETE FROM workers WHERE name = :name RETURNING name", name=goers.name)
        goers.start()
    ready = "SELECT FROM workers WHERE name = :name AND slots > 0"
    until(lambda: sql(ready, name=goers.name), within_s=120, what="the worker")
    return goers


@contextmanager
def takes_no_message(stack) -> Iterator[None]:
    """Have the stack's worker stand still, so that another one gets what comes now."""
    worker = psutil.Process(stack.pid("worker"))
    with redis.Redis.from_url(stack.env["BROKER_URL"]) as broker:

        def asks_for_one() -> bool:
            ports = {str(connection.laddr.port) for connection in worker.net_connections("tcp")}
            waiting = [client for client in broker.client_list() if "b" in client["flags"]]
            return any(client["addr"].rpartition(":")[2] in ports for client in waiting)

        worker.suspend()
        try:
            until(lambda: not asks_for_one(), what="the end of its last question")
            yield
        finally:
            worker.resume()


@pytest.fixture
def given(stack, client, sql, goer) -> Callable[..., str]:
    """Create a job that the worker that goes gets; return when it has come to a step."""

    def given(create: Callable[[], str], *, steps: int) -> str:
        taken = "SELECT FROM jobs WHERE id = :id AND worker = :worker"
        with takes_no_message(stack):
            job_id = create()
            until(lambda: sql(taken, id=job_id, worker=goer.name), what="its lease")
        until(
            lambda: ((client.job(job_id).members["progress"] or {}).get("step") or 0) >= steps,
            what=f"{steps} steps",
        )
        return job_id

    return given


@pytest.fixture
def create(client) -> Callable[[], str]:
    return lambda: client.create_job(**JOB_BODY).id


@pytest.fixture(scope="module")
def undisturbed(client) -> list[str]:
    """The pixels of that job on a worker that stays."""
    return pixels_of(client.wait(client.create_job(**JOB_BODY).id))


def pixels_of(job) -> list[str]:
    assert job.state == "succeeded"
    return [image.pixels_sha256 for image in job.images]


def attempts_of(sql, job_id: str):
    return sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job_id)


def ended_after_a_notice(goer, client, job_id: str):
    """Tell the worker that its machine goes now; the job at its end, and that of the process."""
    goer.notice.write_text("0.1")
    try:
        return client.wait(job_id), goer.process.wait(timeout=60)
    finally:
        goer.notice.unlink()


def test_a_zombie_costs_the_steps_since_its_last_checkpoint_and_writes_nothing_when_it_wakes(
    goer, given, create, undisturbed, client, sql
):
    job_id = given(create, steps=100)

    goer.process.send_signal(signal.SIGSTOP)
    try:
        assert sql(RUNS_OUT, id=job_id, worker=goer.name), "the lease was its own"
        ended = client.wait(job_id)
    finally:
        goer.process.send_signal(signal.SIGCONT)
    until(lambda: goer.has_said("render_dropped", job_id), what="that it is awake")

    assert pixels_of(ended) == undisturbed
    first, second = attempts_of(sql, job_id)
    assert (first["outcome"], second["outcome"]) == ("lease_lost", "rendered")
    assert second["resumed_steps"] >= 4 * 20, "from the newest snapshot of each image"
    assert second["lost_steps"] <= 4 * 10, "an interval of each image"
    finals = (
        "SELECT count(*) AS n FROM audit_events WHERE job_id = :id AND event LIKE 'job:state:%'"
    )
    assert sql(finals, id=job_id) == [{"n": 1}]
    assert sql("SELECT count(*) AS n FROM artifacts WHERE job_id = :id", id=job_id) == [{"n": 4}]


def test_a_worker_with_a_notice_gives_its_jobs_up_and_another_goes_on_at_the_very_step(
    goer, given, create, undisturbed, client, sql
):
    job_id = given(create, steps=40)

    ended, status = ended_after_a_notice(goer, client, job_id)

    assert pixels_of(ended) == undisturbed
    assert status == 0
    first, second = attempts_of(sql, job_id)
    assert (first["outcome"], first["waste_class"]) == ("preempted", None)
    assert first["snapshot_bytes"] > 0
    assert first["snapshot_store"] == "handoff"
    assert second["worker"] != goer.name
    assert second["resumed_steps"] >= 40
    assert second["lost_steps"] == 0
    assert second["resumed_steps"] + second["steps"] == 60 * 4
    assert sql("SELECT counted_attempts FROM jobs WHERE id = :id", id=job_id) == [
        {"counted_attempts": 0}
    ]


@pytest.mark.slow
def test_a_job_that_starts_from_a_picture_goes_on_at_the_very_step_too(
    goer, given, stack, client, sql
):
    picture = base64.b64encode(png(a_picture(128, 128))).decode()
    job_body = JOB_BODY | {"init_image": f"data:image/png;base64,{picture}", "strength": 0.9}
    headers = {"Authorization": f"Bearer {stack.env['DARKROOM_API_KEY']}"}

    def create() -> str:
        """Create the job, which has fields that the client does not know."""
        url = f"{stack.env['DARKROOM_URL']}/v1/jobs"
        return httpx.post(url, json=job_body, headers=headers, trust_env=False).json()["id"]

    undisturbed = client.wait(create())
    job_id = given(create, steps=40)

    ended, _ = ended_after_a_notice(goer, client, job_id)

    first, second = attempts_of(sql, job_id)
    assert (first["outcome"], second["resumed_steps"] >= 40) == ("preempted", True)
    assert second["resumed_steps"] + second["steps"] == 54 * 4
    assert pixels_of(ended) == pixels_of(undisturbed)


def test_sigterm_is_a_notice_and_what_can_be_finished_is(goer, given, client, sql):
    job_id = given(lambda: client.create_job(**JOB_BODY | {"steps": 30}).id, steps=8)

    told_at = time.monotonic()
    goer.process.terminate()
    status = goer.process.wait(timeout=60)
    took_s = time.monotonic() - told_at

    assert status == 0
    assert took_s < SHUTDOWN_NOTICE_S
    assert goer.has_said("worker_leaves", "signal")
    assert client.wait(job_id).state == "succeeded"
    assert [row["lost_steps"] for row in attempts_of(sql, job_id)] in ([0, 0], [0])


def test_time_of_a_worker_that_stopped_is_all_told_and_its_attempts_say_what_it_was_busy_with(
    goers, sql
):
    """After all of the above: its lease was lost, it had notices, it finished what it could."""
    if goers.is_running():
        goers.process.terminate()
        goers.process.wait(timeout=60)
    [told] = sql(
        "SELECT sum(billed_s)::float AS billed_s, sum(turns_s)::float AS turns_s,"
        " sum(billed_s - startup_s - idle_s - turns_s - loads_s)::float AS other_s,"
        " sum(encode_s + denoise_s + decode_s)::float AS busy_s"
        " FROM device_time WHERE worker = :name",
        name=goers.name,
    )
    [of_attempts] = sql(
        "SELECT sum(device_seconds + unfinished_s)::float AS spent_s FROM attempts"
        " WHERE worker = :name AND ended_at IS NOT NULL",
        name=goers.name,
    )
    assert 0 < told["busy_s"] <= told["turns_s"]
    assert abs(told["other_s"]) <= 0.01 * told["billed_s"]
    assert told["busy_s"] == pytest.approx(of_attempts["spent_s"], rel=0.01)
