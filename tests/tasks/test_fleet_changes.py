"""What becomes of queued jobs when a new revision of the fleet has not what they need."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import redis
from sqlalchemy.exc import OperationalError

from dispatch.release import Release
from edges.broker import Broker, job_of_message
from models import jobs, workers
from models.database import transaction
from models.tables import Job
from policy import queues
from policy.current import CurrentFleet
from policy.failures import FailureCode
from tasks.sweep import Sweeper
from tests.builders import GONE, a_fleet, a_job
from tests.models.conftest import Database, a_database

INK = {"source": "ink.safetensors", "sha256": "0" * 64}
QUICK = {"tiers.quality.determinism": "best_effort"}  # needs no table of rows


@pytest.fixture(scope="module")
def own_database(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def holder() -> CurrentFleet:
    return CurrentFleet(a_fleet(), 1)


@pytest.fixture
def own(sweeper, own_database, settings_here, holder) -> Sweeper:
    """A sweeper of that database, whose fleet the test replaces."""
    release = Release(own_database.app, Broker(settings_here, holder), holder, worker_silence_s=15)
    return replace(sweeper, database=own_database.app, release=release, current=holder)


def a_queued_job(own: Sweeper, **params) -> Job:
    with transaction(own.database) as session:
        job = a_job(session, **params)
        job.fleet_revision = 1
        return job


def now(own: Sweeper, job: Job) -> Job:
    with transaction(own.database) as session:
        return session.get_one(Job, job.id)


def test_a_queued_job_whose_model_is_gone_fails_and_its_tenant_is_told_why(own, holder):
    job = a_queued_job(own, pool="local", model="large")
    other = a_queued_job(own, pool="local", model="pocket")

    holder.replace(a_fleet({"models.large": GONE, "pools.big": GONE}), 2)
    own._fleet_changes()

    failed = now(own, job)
    assert (failed.state, failed.failure_code) == ("failed", "model_gone")
    assert (
        failed.failure_detail == f"model large, version {job.model_version}, is no longer offered"
    )
    assert now(own, other).state == "queued"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"models.pocket.sizes": ["128x128"]}, "size 128x192"),
        ({"models.pocket.samplers": ["ddim"]}, "sampler euler"),
        ({}, "adapter ink"),
    ],
    ids=["size", "sampler", "adapter"],
)
def test_a_queued_job_of_which_a_part_is_gone_fails_and_its_tenant_is_told_which(
    own, holder, changes, what
):
    job = a_queued_job(
        own, height_px=192, sampler="euler", adapters=[{"name": "ink", "strength": 1.0}]
    )
    other = a_queued_job(own)
    tables = {"models.pocket.adapters.ink": INK, "models.pocket.tiers": {}, **QUICK}
    if not changes:
        del tables["models.pocket.adapters.ink"]

    holder.replace(a_fleet(tables | changes), 2)
    own._fleet_changes()

    failed = now(own, job)
    assert (failed.state, failed.failure_code) == ("failed", "no_longer_offered")
    assert failed.failure_detail == f"{what} of model pocket is no longer offered"
    assert now(own, other).state == "queued"


def test_a_queued_job_moves_to_the_pool_that_serves_its_model_now(own, holder):
    job = a_queued_job(own, pool="gone", model="pocket")

    holder.replace(a_fleet({"currency": "EUR"}), 3)
    own._fleet_changes()

    assert (now(own, job).pool, now(own, job).state) == ("local", "queued")


def test_a_change_is_looked_at_when_it_comes_and_once_more_a_little_later(own, holder, monkeypatch):
    monkeypatch.setattr("tasks.sweep.FOLLOWED_AFTER_S", 0.0)
    holder.replace(a_fleet(), 4)
    own._fleet_changes()
    late = a_queued_job(own, pool="local", model="gone")  # by a gateway that was still behind
    own._fleet_changes()
    ignored = a_queued_job(own, pool="local", model="gone")
    own._fleet_changes()

    assert now(own, late).state == "failed"
    assert now(own, ignored).state == "queued", "nobody looks at a backlog for no reason"
    with transaction(own.database) as session:
        jobs.fail_gone(session, ignored.id, code=FailureCode.MODEL_GONE, detail="it is gone")


def test_jobs_of_a_removed_tier_are_released_to_the_queue_of_the_last_one(
    own, holder, settings_here
):
    with transaction(own.database) as session:
        facts = {"name": "cpu0@there", "pool": "local", "device": "cpu", "slots": 16, "facts": {}}
        workers.heartbeat(session, **facts)
    job = a_queued_job(own, pool="local", tier="fast")
    without = {
        "tiers.fast": GONE,
        "models.large.tiers.fast": GONE,
    }

    holder.replace(a_fleet(without), 5)
    own._releases()

    with redis.Redis.from_url(settings_here.broker_url) as client:
        waiting = client.lrange(queues.render_queue("local", holder.fleet.tiers_by_rank[-1]), 0, -1)
    assert job.id in {job_of_message(raw) for raw in waiting}


def test_a_job_that_comes_back_to_a_removed_pool_long_after_the_change_moves_too(
    own, holder, monkeypatch
):
    monkeypatch.setattr("tasks.sweep.FOLLOWED_AFTER_S", 0.0)
    holder.replace(a_fleet(), 6)
    own._fleet_changes()
    own._fleet_changes()
    job = a_queued_job(own, pool="gone", model="pocket")  # by a worker that had to leave

    own._fleet_changes()

    assert now(own, job).pool == "local"


def test_a_look_at_a_change_that_fails_is_made_up_for(own, holder, monkeypatch):
    monkeypatch.setattr("tasks.sweep.FOLLOWED_AFTER_S", 0.0)
    job = a_queued_job(own, pool="local", model="large", model_version="gone")
    holder.replace(a_fleet({"currency": "CHF"}), 7)

    def is_away(session):
        raise OperationalError("SELECT", {}, Exception("the server is away"))

    with monkeypatch.context() as away:
        away.setattr("models.revisions.queued_kinds", is_away)
        for _ in range(2):
            with suppress(OperationalError):
                own._fleet_changes()
    own._fleet_changes()

    assert now(own, job).failure_code == "model_gone"
