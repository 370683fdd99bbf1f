"""How the processes are put together: what `build` connects, and how a role begins and ends."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from fleet.consumer import TakenTask
from models.database import transaction
from models.tables import IdempotencyKey, Job, Worker
from policy import gates, queues
from settings import REPO, Settings
from tasks.roles import render
from tests.builders import a_closed_port, a_job, a_tenant, settings_for, until


@contextmanager
def parts_of(settings, fleet, engine):
    """A worker's parts as its process has them; `ended` says that it would end now."""
    ended = []
    settings = settings.model_copy(update={"worker_name": "cpu3@here"})
    parts = render.build(settings, fleet, engine=engine, when_empty=lambda: ended.append(1))
    parts.start()
    try:
        yield parts, ended
    finally:
        parts.sign_off()
        parts.put_away()
        parts.renderer.database.dispose()


@pytest.mark.parametrize(("fill", "is_open"), [(0.7, True), (0.9, False)])
def test_worker_takes_from_its_own_queues_by_the_fill_of_the_hand_off(
    here,
    handoff_redis,
    fill,
    is_open,
):
    handoff_redis.config_set("maxmemory", int(handoff_redis.info("memory")["used_memory"] / fill))

    assert here.parts.may_take("local.batch", []) is is_open
    assert here.parts.may_take("local.batch.front", [])


def test_worker_takes_nothing_new_while_the_hand_off_is_silent(
    settings_here,
    fleet_here,
    engine_here,
    monkeypatch,
):
    monkeypatch.setattr(gates, "HANDOFF_SILENT_AFTER_S", 0.2)
    nowhere = {"handoff_url": f"redis://127.0.0.1:{a_closed_port()}/0"}

    with parts_of(settings_here.model_copy(update=nowhere), fleet_here, engine_here) as (parts, _):
        until(lambda: not parts.may_take("local.fast", []), what="a closed gate")


def test_worker_counts_the_messages_that_it_has_taken_against_its_slots(here):
    def taken(images: int) -> TakenTask:
        job_id = str(here.accept(tier="batch").id)
        return TakenTask("local.batch", {"job_id": job_id}, {queues.NUM_IMAGES: images})

    ten, nine = [taken(8), taken(2)], [taken(8), taken(1)]

    assert here.parts.may_take("local.batch", nine)
    assert not here.parts.may_take("local.batch", ten), "six of sixteen are kept for better tiers"


def test_worker_that_has_to_go_or_is_reserved_takes_nothing(here):
    job = here.accept()
    with here.keeper.leased(job.id) as held, here.keeper.exclusive(held):
        assert not here.parts.may_take("local.fast", [])
    assert here.parts.may_take("local.fast", [])

    here.keeper.take_no_more("a test wants it")

    assert not here.parts.may_take("local.fast.front", [])


def test_worker_that_is_unfit_leaves_and_ends_when_it_is_empty(
    settings_here,
    fleet_here,
    engine_here,
):
    with parts_of(settings_here, fleet_here, engine_here) as (parts, ended):
        parts.renderer.health.give_up("a test wants it")

        assert parts.keeper.leaving == "health: a test wants it"
        until(lambda: ended, what="the end of the process")


def test_sweeper_process_sweeps_and_ends_when_it_is_told_to(stack, urls_here, database_here):
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        old = IdempotencyKey(tenant_id=tenant.id, key="of last year", request_sha256="")
        old.created_at = tenant.created_at.replace(year=2020)
        session.add(old)
    settings = settings_for(Settings, stack.env, **urls_here)
    told = {name.upper(): value for name, value in urls_here.items()}
    told |= {"SWEEP_EVERY_S": "0.2", "LOG_LEVEL": settings.log_level}
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.serve", "maintenance"],
        cwd=REPO,
        env=os.environ | told,
    )

    def has_swept() -> bool:
        with transaction(database_here) as session:
            return session.get(IdempotencyKey, (tenant.id, "of last year")) is None

    try:
        until(has_swept, within_s=60, what="a sweep")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_serve_says_which_roles_there_are():
    command = [sys.executable, "-m", "tasks.serve", "nobody"]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    roles = "render|results|maintenance|webhooks|flower"
    assert ended.stderr.strip() == f"usage: python -m tasks.serve {roles}"


_ITS_DEVICE_HANGS = """
import time
from engine.engine import Engine
from settings import WorkerSettings, load, load_fleet_or_exit
from tasks.roles import render

Engine.stop = lambda engine: time.sleep(3600)
settings = load(WorkerSettings)
render.serve(settings, load_fleet_or_exit(settings))
"""


def test_worker_signs_off_before_it_waits_for_its_device(urls_here, database_here, sweeper):
    name = "cpu5@here"
    told = {key.upper(): value for key, value in urls_here.items()}
    told |= {"WORKER_NAME": name, "DEVICE": "cpu", "SHUTDOWN_NOTICE_S": "1"}
    process = subprocess.Popen([sys.executable, "-c", _ITS_DEVICE_HANGS], cwd=REPO, env=os.environ | told)

    def is_known() -> bool:
        with transaction(database_here) as session:
            return session.get(Worker, name) is not None

    def has_rendered() -> bool:
        with transaction(database_here) as session:
            return session.get(Job, job.id).state == "storing"

    try:
        until(is_known, within_s=150, what="its first heartbeat")
        with transaction(database_here) as session:
            job = a_job(session)
        sweeper.broker.announce(queues.RENDER_JOB, "local.fast", job.id, num_images=1)
        until(has_rendered, within_s=60, what="an image")

        process.send_signal(signal.SIGTERM)
        until(lambda: not is_known(), within_s=30, what="its sign-off")

        assert process.poll() is None, "it waits for its device"
    finally:
        process.kill()
        process.wait()
