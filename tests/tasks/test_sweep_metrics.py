"""What a sweep counts, reason by reason, and how the queues look to Prometheus afterwards."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import null, text
from sqlalchemy.orm import Session

import tasks.sweep
from dispatch.release import Release
from edges.handoff import Handoff
from edges.inputs import Inputs
from edges.snapshots import Snapshots
from models import files, jobs, leases, webhooks, workers
from models.database import transaction
from models.tables import IdempotencyKey, Job, WebhookDelivery
from models.webhooks import KEPT_FOR_S
from policy.current import CurrentFleet
from policy.webhooks import GIVE_UP_AFTER_S
from tasks.sweep import Sweeper
from tests.builders import (
    a_closed_port,
    a_fleet,
    a_job,
    a_lease,
    a_succeeded_job,
    a_tenant,
    hand_off,
    some_pixels,
)
from tests.metrics import gauges, increases
from tests.models.conftest import Database, a_database
from tests.models.test_pruning import age


@pytest.fixture
def own_database(stack) -> Iterator[Database]:
    """One in which nothing is but what the test makes."""
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def own_sweeper(sweeper, own_database, settings_here) -> Sweeper:
    """A sweeper of that database, its queues and its hand-off empty."""
    for url in (settings_here.broker_url, settings_here.handoff_url):
        with redis.Redis.from_url(url) as client:
            assert urlsplit(url).path == "/8"
            client.flushdb()
    fleet = a_fleet({"tiers.batch.retention_days": 30})
    release = Release(own_database.app, sweeper.broker, fleet, worker_silence_s=15)
    return replace(sweeper, database=own_database.app, release=release, current=CurrentFleet(fleet))


def move(session: Session, job: Job, **columns) -> None:
    """Give the job's row instants so many seconds from now."""
    now = "clock_timestamp()"
    told = [f"{name} = {now} + make_interval(secs => {s})" for name, s in columns.items()]
    session.execute(text(f"UPDATE jobs SET {', '.join(told)} WHERE id = :id"), {"id": job.id})


def fall_through(session: Session, url: str) -> None:
    """Leave one of everything that a sweep is there for, as crashes and silence do."""
    tenant = a_tenant(session)
    a_job(session, tenant=tenant)  # nobody let it out
    a_lease(session, tenant=tenant, ttl_s=-1)  # its worker fell silent
    a_job(session, tenant=tenant, start_within_s=-1)
    overrun = a_job(session, tenant=tenant, run_within_s=60)
    leases.give_back(session, a_lease(session, overrun), reason="drain")
    move(session, overrun, run_by=-1)
    for is_there in (True, False):  # pixels that nobody stored, and pixels that are gone
        lease = a_lease(session, tenant=tenant)
        hand_off(session, lease, store_within_s=-1)
        if is_there:
            Handoff(url, ttl_s=60).put(lease.job_id, 0, lease.attempt, some_pixels())
    unheard = a_job(session, tenant=tenant, pool="big", model="large")
    move(session, unheard, announced_at=-10)  # the broker lost its message
    wait_for_pictures(session, tenant)
    deliveries_of_long_ago(session, tenant)
    yesterday = session.scalar(text("SELECT clock_timestamp() - interval '25 hours'"))
    own = {"tenant_id": tenant.id, "key": "k", "request_sha256": ""}
    session.add(IdempotencyKey(**own, created_at=yesterday))
    Handoff(url, ttl_s=60).put(uuid.uuid4(), 0, 1, some_pixels())  # of nobody's job, these three
    Snapshots(url, ttl_s=60).put(uuid.uuid4(), 0, 1, 1, b"latents")
    Inputs(url, ttl_s=60).bring(uuid.uuid4(), {"init_image": some_pixels()})


def wait_for_pictures(session: Session, tenant) -> None:
    digest = "ab" * 32
    shape = {"mode": "RGB", "size_bytes": 9, "width_px": 8, "height_px": 8}
    own = {"tenant_id": tenant.id, "object_key": f"t/{digest}", "content_sha256": digest}
    file = files.keep(session, **own, **shape, actor="tests")
    place = {"pool": "big", "model": "large", "tier": "batch"}
    job = a_job(session, tenant=tenant, **place, init_file_id=file.id, strength=0.5)
    move(session, job, inputs_asked_at=-10)


def deliveries_of_long_ago(session: Session, tenant) -> None:
    """One that waits for an endpoint that was disabled, one that was heard a month ago."""
    shape = {"url": "https://example.com/", "events": [], "description": "", "secret": "whsec_AA"}
    endpoint = webhooks.create(session, tenant_id=tenant.id, **shape, actor="tests")
    webhooks.change(session, endpoint, enabled=False, actor="tests")
    now = session.scalar(text("SELECT clock_timestamp()"))
    given_up = now - timedelta(seconds=GIVE_UP_AFTER_S + 60)
    heard = now - timedelta(seconds=KEPT_FOR_S + 60)
    own = {"endpoint_id": endpoint.id, "tenant_id": tenant.id, "event": "job.failed"}
    session.add(WebhookDelivery(**own, created_at=given_up, due_at=given_up))
    ended = {"state": "delivered", "due_at": null(), "ended_at": heard}
    session.add(WebhookDelivery(**own, created_at=heard, **ended))
    session.add(WebhookDelivery(**own, created_at=now, due_at=now))  # waits on


def test_a_sweep_counts_what_it_did_by_its_reason(own_sweeper, own_database, settings_here):
    with transaction(own_database.app) as session:
        fall_through(session, settings_here.handoff_url)
    with transaction(own_database.owner) as session:
        job = a_job(session, tier="batch")
        jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")
        age(session, job)  # longer ago than its tier keeps what it was about

    with increases() as grown:
        own_sweeper.sweep()

    once = dict.fromkeys(
        (
            "hand_off_lost",
            "idempotency_key",
            "inputs_late",
            "lease_expired",
            "message_lost",
            "orphan_inputs",
            "orphan_pixels",
            "orphan_snapshots",
            "retention",
            "run_deadline",
            "start_deadline",
            "store_overdue",
            "webhook_delivery",
            "webhook_given_up",
        ),
        1,
    )
    counts = {**once, "released": 3}  # the one that waits, and those that were put back
    swept = {f'swept{{why="{why}"}}': count for why, count in counts.items()}
    ends = ("expired", "failed")
    ended = {f'jobs_ended{{tier="fast",model="pocket",state="{state}"}}': 1 for state in ends}
    assert grown == swept | ended

    with increases() as again:
        own_sweeper.sweep()
    assert again == {}


def test_a_sweep_shows_the_queues_to_prometheus(own_sweeper, own_database):
    with transaction(own_database.app) as session:
        tenant = a_tenant(session)
        place = {"tenant": tenant, "pool": "big", "model": "large"}
        a_lease(session, **place)
        hand_off(session, a_lease(session, **place, tier="batch"))
        for accepted_at in (-90, 0):  # both are let out
            same = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 4}
            waiting = a_job(session, **place, **same)
            move(session, waiting, accepted_at=accepted_at)
        wait_for_pictures(session, tenant)
        deliveries_of_long_ago(session, tenant)
        for number in range(2):
            beat = {"device": "cpu", "slots": 8, "facts": {}}
            workers.heartbeat(session, name=f"gpu{number}@big", pool="big", **beat)

    own_sweeper.sweep()

    shown = gauges()
    assert {name: value for name, value in shown.items() if value and name in _QUEUES} == {
        _queue("fast", "running"): 1,
        _queue("batch", "storing"): 1,
        _queue("batch", "waiting"): 1,  # for its picture
        _queue("quality", "announced"): 2,
    }
    assert {name for name in shown if name.startswith("queue_jobs")} == _QUEUES
    waits = {name: value for name, value in shown.items() if name.startswith("queue_oldest")}
    assert 90 <= waits.pop('queue_oldest_wait_seconds{pool="big",tier="quality"}') < 200
    other_tiers = {f'queue_oldest_wait_seconds{{pool="big",tier="{t}"}}' for t in ("batch", "fast")}
    assert set(waits) == other_tiers
    told = {
        'live_workers{pool="big"}': 2,
        'live_workers{pool="local"}': 0,
        'jobs_lacking_inputs{pool="big",tier="batch"}': 1,
        "webhooks_pending": 2,
        "audit_months_ahead": 12,
        'away_seconds{part="broker"}': 0,
        'away_seconds{part="database"}': 0,
        'away_seconds{part="handoff"}': 0,
    }
    assert {name: shown[name] for name in told} == told
    assert 0 < shown["handoff_fill_ratio"] < 1


def _queue(tier: str, state: str) -> str:
    return f'queue_jobs{{pool="big",tier="{tier}",state="{state}"}}'


STATES = ("waiting", "announced", "running", "storing")
_QUEUES = {_queue(tier, state) for tier in ("fast", "quality", "batch") for state in STATES}


def test_an_outage_is_told_and_prolongs_deadlines(own_sweeper, own_database, monkeypatch):
    with transaction(own_database.app) as session:
        a_job(session, start_within_s=2)
    nowhere = f"redis://127.0.0.1:{a_closed_port()}/0"
    away = replace(own_sweeper, handoff=Handoff(nowhere, ttl_s=60))
    now = time.monotonic
    monkeypatch.setattr(tasks.sweep.time, "monotonic", lambda: now() + 30)

    with increases() as grown:
        away.sweep()

    assert grown['swept{why="deadline_prolonged"}'] == 1
    assert gauges()['away_seconds{part="handoff"}'] >= 30
    assert gauges()['away_seconds{part="broker"}'] == 0


def test_times_of_jobs_that_succeeded_are_counted_once(own_sweeper, own_database):
    with transaction(own_database.app) as session:
        job = a_succeeded_job(session, eta_raw_s=10.0)
        query = """
            UPDATE jobs SET finished_at = clock_timestamp() - interval '5 s',
                accepted_at = clock_timestamp() - interval '25 s',
                started_at = clock_timestamp() - interval '22 s',
                first_preview_at = clock_timestamp() - interval '21 s', eta_p90_s = 16
            WHERE id = :id
        """
        session.execute(text(query), {"id": job.id})

    with increases() as grown:
        own_sweeper.sweep()
        own_sweeper.sweep()

    names = ("job_seconds", "job_wait_seconds", "job_first_preview_seconds", "job_eta_ratio")
    assert {name: count for name, count in grown.items() if name.startswith("job_")} == {
        f'{name}{{tier="fast"}}': 1 for name in names
    }
