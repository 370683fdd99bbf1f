"""A worker that lacks a model: it serves the others, and puts the model's jobs back."""

import tomllib
import uuid

import pytest
from sqlalchemy import text

from engine.engine import Engine
from models import workers
from models.database import transaction
from models.tables import Job
from policy.fleet import Fleet
from settings import REPO
from tasks.engines import checkpoint_specs, engine_config
from tests.builders import a_fleet, fleet_text
from tests.tasks.conftest import a_worker, end_left_jobs, metric

LACKED = "broken@1"


@pytest.fixture(scope="module")
def fleet_lacking() -> Fleet:
    """The pool's second model cannot be loaded."""
    pocket = tomllib.loads(fleet_text())["models"]["pocket"]
    broken = pocket | {"versions": [{"id": "1", "source": "nowhere"}]}
    return a_fleet({"models.broken": broken, "pools.local.models": ["pocket", "broken"]})


@pytest.fixture(scope="module")
def engine_lacking(fleet_lacking, settings_here):
    pool = fleet_lacking.pools["local"]
    specs = checkpoint_specs(fleet_lacking, pool.models, REPO)
    config = engine_config(settings_here, fleet_lacking, pool, may_lack_checkpoints=True)
    with Engine(config, specs) as engine:
        yield engine


@pytest.fixture
def lacking(fleet_lacking, settings_here, engine_lacking):
    with a_worker(fleet_lacking, settings_here, engine_lacking, name="cpu8@here") as worker:
        yield worker


def a_job_of_the_lacked_model(worker, **params) -> Job:
    return worker.accept(tier="fast", model="broken", model_version="1", **params)


def note_announced(worker, job) -> None:
    with transaction(worker.database) as session:
        query = text("UPDATE jobs SET announced_at = clock_timestamp() WHERE id = :id")
        session.execute(query, {"id": job.id})


def test_worker_tells_in_its_row_what_it_serves_and_why_not_more(lacking):
    with transaction(lacking.database) as session:
        query = text("SELECT models, failed_models, problem FROM workers_now WHERE worker = :name")
        told = session.execute(query, {"name": "cpu8@here"}).one()

    assert told.models == "pocket@1"
    assert told.failed_models == LACKED
    sentence = f"model 'broken', version '1' ({REPO}/nowhere) cannot be loaded: "
    assert told.problem.startswith(sentence)


def test_worker_puts_back_a_job_of_a_model_that_it_lacks_and_renders_the_others(lacking):
    job = a_job_of_the_lacked_model(lacking)
    note_announced(lacking, job)
    other = lacking.accept(tier="fast")

    lacking.render(job).join(60)
    lacking.render(other).join(60)

    assert (lacking.row(job).state, lacking.row(job).attempt) == ("queued", 0)
    assert lacking.row(job).announced_at is None, "no live worker serves it"
    assert lacking.row(other).state == "storing"


def test_job_of_a_model_that_nobody_serves_takes_no_room_from_others(lacking):
    end_left_jobs(lacking.database)
    waiting = [a_job_of_the_lacked_model(lacking, num_images=4) for _ in range(12)]
    other = lacking.accept(tier="fast")

    lacking.renderer.release.release("local", "fast")

    assert lacking.row(other).announced_at is not None
    assert not any(lacking.row(job).announced_at for job in waiting)


def test_job_is_announced_again_where_another_worker_serves_its_model(lacking):
    holder = {"name": f"gpu0@{uuid.uuid4().hex[:8]}", "pool": "local", "device": "cuda:0"}
    with transaction(lacking.database) as session:
        workers.heartbeat(session, **holder, slots=16, facts={}, held=["pocket@1", LACKED])
    end_left_jobs(lacking.database)
    job = a_job_of_the_lacked_model(lacking)
    note_announced(lacking, job)
    before = lacking.row(job).announced_at

    lacking.render(job).join(60)

    assert lacking.row(job).announced_at > before
    with transaction(lacking.database) as session:
        workers.leave(session, holder["name"])


def test_sweeper_counts_models_that_live_workers_cannot_load(lacking, sweeper):
    sweeper.sweep()

    assert metric("darkroom_models_not_loaded", pool="local", model=LACKED) == 1
    assert metric("darkroom_failing_workers", pool="local") == 0
