"""A worker whose engine was made by another revision than the one in force: no job ends by that."""

from collections.abc import Iterator

import pytest

from policy.current import CurrentFleet
from tests.builders import GONE, a_fleet
from tests.tasks.conftest import WorkerHere, a_worker, end_left_jobs

CHANGES = {"tiers.quality.checkpoint_every_steps": 2}  # as the engine of these tests has it


@pytest.fixture
def holder(fleet_here) -> CurrentFleet:
    return CurrentFleet(fleet_here, 1)


@pytest.fixture
def behind(holder, settings_here, engine_here) -> Iterator[WorkerHere]:
    """A worker that holds the models of the revision before."""
    with a_worker(holder, settings_here, engine_here, name="cpu7@here") as worker:
        end_left_jobs(worker.database)
        yield worker
        end_left_jobs(worker.database)


def rendered(worker: WorkerHere, job) -> None:
    thread = worker.render(job)
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_worker_puts_back_a_job_of_a_version_that_it_will_have_after_its_next_start(behind, holder):
    fleet = a_fleet(CHANGES)
    pocket = fleet.models["pocket"]
    second = pocket.versions[0].model_copy(update={"id": "2"})
    more = pocket.model_copy(update={"versions": (*pocket.versions, second)})
    models = {**fleet.models, "pocket": more}
    holder.replace(fleet.model_copy(update={"models": models}), 2)
    job = behind.accept(tier="fast", model="pocket", model_version="2")

    rendered(behind, job)

    row = behind.row(job)
    assert (row.state, row.failure_code) == ("queued", None)
    assert (row.pool, row.counted_attempts) == ("local", 0)


def test_worker_hands_a_job_to_the_pool_that_has_its_model_now(behind, holder):
    holder.replace(a_fleet(CHANGES), 2)
    job = behind.accept(tier="fast", pool="local", model="large", model_version="1")

    rendered(behind, job)

    row = behind.row(job)
    assert (row.state, row.failure_code, row.pool) == ("queued", None, "big")
    assert row.counted_attempts == 0


def test_worker_fails_a_job_whose_model_no_pool_has(behind, holder):
    holder.replace(a_fleet(CHANGES | {"models.large": GONE, "pools.big": GONE}), 2)
    job = behind.accept(tier="fast", pool="local", model="large", model_version="1")

    rendered(behind, job)

    assert behind.row(job).failure_code == "model_gone"


def test_worker_takes_nothing_from_the_queue_of_a_tier_that_left_a_moment_ago(behind, holder):
    holder.replace(a_fleet(CHANGES | {"tiers.fast": GONE, "models.large.tiers.fast": GONE}), 2)

    assert behind.parts.may_take("local.fast", []) is False
