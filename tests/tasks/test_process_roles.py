"""How the processes are put together: what `build` connects, and how a role begins and ends."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import text

import tasks.preemption
import tasks.roles.maintenance
import tasks.roles.webhooks
import tasks.serve
from edges.notices import FakeNotices, NoticeSourceUnavailable
from edges.progress import JobSignals
from fleet.consumer import TakenTask
from models import jobs, webhooks
from models.database import transaction
from models.tables import IdempotencyKey, Job, Worker
from policy import gates, queues
from policy.current import CurrentFleet
from policy.webhooks import EVENTS
from settings import REPO, Settings, WebhookSettings
from tasks.deliver import WebhookSender
from tasks.engines import engine_config
from tasks.preemption import wait_while_a_notice_stands
from tasks.roles import render
from tests.builders import a_closed_port, a_fleet, a_job, a_tenant, settings_for, until


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


def test_worker_signs_off_before_it_waits_for_its_device(
    settings_here,
    fleet_here,
    engine_here,
    database_here,
    monkeypatch,
):
    name = "cpu5@here"
    settings = settings_here.model_copy(update={"worker_name": name})
    parts = render.build(settings, fleet_here, engine=engine_here, when_empty=lambda: None)
    is_waiting, goes_on = threading.Event(), threading.Event()
    seen = []

    def is_known() -> bool:
        with transaction(database_here) as session:
            return session.get(Worker, name) is not None

    def consume(*arguments, **options) -> int:
        with transaction(database_here) as session:
            job = a_job(session)
        parts.renderer.render_job(job_id=str(job.id))
        with transaction(database_here) as session:
            seen.append((is_known(), session.get(Job, job.id).state))
        return 0

    def hang(within_s: float) -> None:  # instead of the engine's stop
        is_waiting.set()
        goes_on.wait(120)

    monkeypatch.setattr(render, "consume", consume)
    monkeypatch.setattr(engine_here, "stop", hang)
    worker = threading.Thread(target=render._take_jobs, args=(parts, []))
    worker.start()
    try:
        assert is_waiting.wait(60)
        assert seen == [(True, "storing")], "it was there, and rendered"
        assert not is_known()
    finally:
        goes_on.set()
        worker.join(timeout=60)
        parts.renderer.database.dispose()


@pytest.mark.parametrize("stands_at", [0, 1])
def test_worker_does_not_begin_while_any_of_its_sources_has_a_notice(monkeypatch, stands_at):
    sources = [FakeNotices("first"), FakeNotices("second")]
    sources[stands_at].announce(60)
    slept = []
    monkeypatch.setattr(tasks.preemption.time, "sleep", slept.append)

    wait_while_a_notice_stands(sources)

    assert len(slept) == 1, "each announcement is heard at one look"


def test_worker_begins_though_one_of_its_sources_does_not_answer():
    class Silent(FakeNotices):
        def poll(self):
            raise NoticeSourceUnavailable("no answer")

    wait_while_a_notice_stands([Silent(), FakeNotices()])


def test_engine_gives_every_tier_the_share_of_the_device_that_it_has_of_the_slots(settings_here):
    changes = {
        "tiers.batch.guaranteed_share": 0.0,
        "pools.local.slots": 12,
        "pools.local.max_batch_rows": 10,
    }
    fleet = a_fleet(changes)

    config = engine_config(settings_here, fleet, fleet.pools["local"])

    assert config.rank_shares == {0: 0.25, 1: 0.15}, "none of its own for a tier without one"
    assert (config.max_inflight, config.max_batch_rows) == (12, 10)
    assert config.num_threads == settings_here.torch_threads


@pytest.mark.parametrize("status", [0, 70])
def test_process_of_a_role_ends_with_its_role_s_status(settings_here, monkeypatch, status):
    told = {name: str(value) for name, value in urls_of(settings_here).items()}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tasks.serve", "maintenance"])
    monkeypatch.setattr(tasks.roles.maintenance, "serve", lambda settings, fleet: status)
    levels: list[str] = []  # the logs of this process stay as they are
    monkeypatch.setattr(tasks.serve.telemetry, "configure_logs", levels.append)

    with pytest.raises(SystemExit) as ended:
        tasks.serve.main()

    assert ended.value.code == status
    assert levels == ["INFO"]


def urls_of(settings) -> dict[str, str]:
    names = ("database_url", "broker_url", "handoff_url")
    return {name.upper(): str(getattr(settings, name)) for name in names}


@pytest.mark.parametrize(("is_fit", "status"), [(True, 0), (False, 70)])
def test_worker_that_gave_up_ends_because_of_an_error_though_celery_ended_well(
    settings_here,
    fleet_here,
    engine_here,
    monkeypatch,
    is_fit,
    status,
):
    settings = settings_here.model_copy(update={"worker_name": "cpu4@here"})
    parts = render.build(settings, fleet_here, engine=engine_here, when_empty=lambda: None)

    def consume(*arguments, **options) -> int:
        if not is_fit:
            parts.renderer.health.give_up("a test wants it")
        return 0

    monkeypatch.setattr(render, "consume", consume)
    monkeypatch.setattr(engine_here, "stop", lambda within_s: None)  # other tests go on with it

    assert render._take_jobs(parts, []) == status

    parts.renderer.database.dispose()


def test_courier_hands_out_what_is_to_be_told_as_soon_as_it_hears_that_a_job_ended(
    stack,
    urls_here,
    fleet_here,
    database_here,
    monkeypatch,
):
    handed_out = []
    monkeypatch.setattr(WebhookSender, "hand_out", lambda sender, found: handed_out.extend(found))
    settings = settings_for(WebhookSettings, stack.env, **urls_here)
    with transaction(database_here) as session:
        tenant = a_tenant(session)
        shape = {"url": "https://example.com/", "description": "", "secret": "whsec_AA"}
        webhooks.create(session, tenant_id=tenant.id, events=EVENTS, **shape, actor="tests")
        job = a_job(session, tenant=tenant)
        jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
        query = text("SELECT id FROM webhook_deliveries WHERE job_id = :id")
        [delivery_id] = session.scalars(query, {"id": job.id})

    def consume(*arguments, **options) -> int:
        signals = JobSignals(settings.handoff_url)
        until(
            lambda: signals.publish_ending(job.id) or handed_out, what="the sender's hearing of it"
        )
        return 0

    monkeypatch.setattr(tasks.roles.webhooks, "consume", consume)

    assert tasks.roles.webhooks.serve(settings, CurrentFleet(fleet_here)) == 0
    assert set(handed_out) == {delivery_id}
