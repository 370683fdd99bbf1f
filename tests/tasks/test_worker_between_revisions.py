"""A worker whose engine was made by another revision than the one in force: no job ends by that."""

from collections.abc import Iterator

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from models import capabilities, workers
from models.database import transaction
from models.tables import Job
from policy.capabilities import source_of
from policy.current import CurrentFleet
from policy.workers import WorkerState
from tests.abilities import PLAIN
from tests.builders import GONE, a_fleet
from tests.tasks.conftest import WorkerHere, a_worker, end_left_jobs

WIDE_PX = 192
WIDER = {
    "models.pocket.sizes": ["128x128", "128x192", f"{WIDE_PX}x128"],
    "models.pocket.tiers.quality.bucket_rows": {"128x128": 8, "128x192": 4, f"{WIDE_PX}x128": 4},
}
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


def rendered(worker: WorkerHere, job: Job) -> None:
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
    large = {"model": "large", "width_px": 1024, "height_px": 1024, "sampler": "euler"}
    job = behind.accept(tier="fast", pool="local", **large)

    with capture_logs() as logged:
        rendered(behind, job)

    row = behind.row(job)
    events = [line["event"] for line in logged]
    assert "render_refused" not in events
    [handed_over] = [line for line in logged if line["event"] == "render_handed_over"]
    assert handed_over["pool"] == "big"
    assert (row.state, row.failure_code, row.pool) == ("queued", None, "big")
    assert row.counted_attempts == 0


def test_worker_hands_on_a_job_that_only_the_pool_of_its_model_can_make_now(behind, holder):
    moved = {"pools.local.models": ["large"], "pools.big.models": ["pocket"]}
    holder.replace(a_fleet(CHANGES | WIDER | moved), 2)
    job = a_wide_job(behind, revision=1)

    rendered(behind, job)

    row = behind.row(job)
    assert (row.state, row.pool, row.counted_attempts) == ("queued", "big", 0)


def test_worker_fails_a_job_whose_model_no_pool_has(behind, holder):
    holder.replace(a_fleet(CHANGES | {"models.large": GONE, "pools.big": GONE}), 2)
    job = behind.accept(tier="fast", pool="local", model="large", model_version="1")

    with capture_logs() as logged:
        rendered(behind, job)

    assert behind.row(job).failure_code == "model_gone"
    assert [line["code"] for line in logged if line["event"] == "render_refused"] == ["model_gone"]


@pytest.fixture
def own_pace(monkeypatch) -> None:
    monkeypatch.setattr("tasks.lacking.FIRST_PAUSE_S", 0.0)


def a_wide_job(worker: WorkerHere, *, revision: int) -> Job:
    """Of a size that the engine does not offer, and `WIDER` does."""
    job = worker.accept(tier="fast", width_px=WIDE_PX)
    with transaction(worker.database) as session:
        session.get_one(Job, job.id).fleet_revision = revision
    return job


@pytest.mark.parametrize("known", [1, 2], ids=["has not heard of", "is to be started anew for"])
def test_worker_puts_back_a_job_of_a_size_of_a_revision_that_it(behind, holder, known, own_pace):
    if known == 2:
        holder.replace(a_fleet(CHANGES | WIDER), 2)
    job = a_wide_job(behind, revision=2)

    for _ in range(3):
        rendered(behind, job)

    row = behind.row(job)
    assert (row.state, row.failure_code, row.counted_attempts) == ("queued", None, 0)
    assert row.attempt == 1, "it takes no lease again before it has followed"

    holder.replace(a_fleet(CHANGES | WIDER), 2)
    behind.keeper.revision = 2
    rendered(behind, job)

    assert behind.row(job).failure_code == "unsupported", "the engine did not learn it"


def test_worker_fails_a_job_of_a_size_that_was_taken_out(behind, holder):
    job = a_wide_job(behind, revision=0)

    rendered(behind, job)

    row = behind.row(job)
    assert (row.failure_code, row.counted_attempts) == ("no_longer_offered", 0)
    assert row.failure_detail == f"size {WIDE_PX}x128 of model pocket is no longer offered"


def test_worker_with_a_file_of_its_own_waits_for_no_revision(
    fleet_here, settings_here, engine_here
):
    settings = settings_here.model_copy(update={"follow_revisions": False})
    with a_worker(fleet_here, settings, engine_here, name="cpu7@here") as worker:
        job = a_wide_job(worker, revision=2)
        rendered(worker, job)

        assert worker.row(job).failure_code == "no_longer_offered"


def waits_for(worker: WorkerHere) -> str | None:
    worker.keeper._beat()
    with transaction(worker.database) as session:
        query = text("SELECT waits_for FROM workers_now WHERE worker = :name")
        return session.scalar(query, {"name": worker.keeper.identity.name})


def test_worker_that_has_to_start_anew_tells_for_whom_it_waits(behind, holder):
    other = {"name": "cpu6@here", "pool": "local", "device": "cpu", "slots": 0, "facts": {}}
    with transaction(behind.database) as session:
        workers.heartbeat(session, **other, state=WorkerState.LOADING)
    in_time = {f"tiers.{tier}.run_within_s": 60 for tier in ("fast", "quality", "batch")}
    smaller = a_fleet(CHANGES | in_time | {"pools.local.slots": 8})
    holder.replace(smaller, 2)

    with capture_logs() as logged:
        turns = [behind.parts.revisions.go_by(smaller) for _ in range(3)]

    assert turns == [False] * 3
    [told] = [line for line in logged if line["event"] == "start_anew_waits"]
    assert told["waits_for"] == waits_for(behind) == "cpu6@here (loading)"

    assert behind.parts.revisions.go_by(a_fleet(CHANGES)), "a rollback is no reason to leave"
    assert waits_for(behind) is None
    with transaction(behind.database) as session:
        workers.leave(session, other["name"])


def test_worker_describes_its_models_again_after_each_revision_it_goes_by(behind, fleet_here):
    version = ("pocket", "1")
    with transaction(behind.database) as session:  # by one that had another source
        capabilities.publish(session, {version: PLAIN | {"source": "another"}}, worker="cpu6@here")

    assert behind.parts.revisions.go_by(fleet_here)

    with transaction(behind.database) as session:
        described = capabilities.read_all(session)[version]
    assert described["source"] == source_of(fleet_here.models["pocket"], "1")


def test_worker_takes_nothing_from_the_queue_of_a_tier_that_left_a_moment_ago(behind, holder):
    holder.replace(a_fleet(CHANGES | {"tiers.fast": GONE, "models.large.tiers.fast": GONE}), 2)

    assert behind.parts.may_take("local.fast", []) is False
