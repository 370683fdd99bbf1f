"""A worker whose device does not hold all models of its pool: it loads what jobs ask for."""

import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from threading import Thread

import pytest
from sqlalchemy import text

from engine import loading
from engine.engine import Engine
from models import leases, workers
from models.database import transaction
from policy.fleet import Fleet, parse_fleet
from policy.residency import GB, LEFT_TO_HOLDERS
from settings import WorkerSettings
from tasks.engines import sizes_of
from tasks.revisions import DescribedEngine, described_engine
from tests.builders import until
from tests.fleet.tiny_fleet import fleet_of, tiny_weights
from tests.tasks.conftest import Brake, WorkerHere, a_worker, end_left_jobs, metric

MODELS = ("sd", "sd3", "flux-dev")
SAMPLERS = {"sd": "euler", "sd3": "flow_euler", "flux-dev": "flow_euler"}
QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 4}
EVICTIONS = ("darkroom_model_load_seconds_count", "unload")


def a_fleet_of_three(**keys) -> Fleet:
    """Without adapters: their slots are memory that no file tells of."""
    fleet = parse_fleet(fleet_of(tiny_weights(), MODELS, **keys))
    bare = {name: model.model_copy(update={"adapters": {}}) for name, model in fleet.models.items()}
    return fleet.model_copy(update={"models": bare})


def described(fleet: Fleet, settings: WorkerSettings) -> DescribedEngine:
    found = described_engine(settings, fleet)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def two_fit(settings_here) -> Fleet:
    """Any two of the three models fit into the budget, their buffers too, and all three do not."""
    specs = described(a_fleet_of_three(), settings_here).specs
    sizes = sorted(sizes_of(specs.values()).values())
    budget_gb = (sum(sizes[1:]) + sizes[0] / 2) / GB
    return a_fleet_of_three(residency="lru", device_memory_gb=budget_gb, swap_after_s=0.2)


@pytest.fixture(scope="module")
def engine_for_two(two_fit, settings_here) -> Iterator[Engine]:
    own = described(two_fit, settings_here)
    with Engine(own.config, own.first_loaded()) as engine:
        yield engine


@pytest.fixture
def worker(two_fit, settings_here, engine_for_two) -> Iterator[WorkerHere]:
    with a_worker(two_fit, settings_here, engine_for_two, name="cpu6@here") as worker:
        yield worker
        end_left_jobs(worker.database)


@pytest.fixture
def brake(worker, monkeypatch) -> Iterator[Brake]:
    brake, predict = Brake(), worker.engine._runner.predict

    def predict_in_turn(batch):
        brake.pass_by()
        return predict(batch)

    monkeypatch.setattr(worker.engine._runner, "predict", predict_in_turn)
    yield brake
    brake.release()


def accepted(worker, model, **params):
    plain = {"width_px": 64, "height_px": 64, "sampler": SAMPLERS[model], "guidance": 2.0}
    return worker.accept(model=model, **QUALITY | plain | params)


def pixels_of(worker, jobs) -> list[str]:
    """The digests of what the jobs have handed on."""
    found = [worker.renderer.handoff.get(job.id, 0, 1) for job in jobs]
    return [one.sha256 for one in found]


def rendered(worker, jobs) -> None:
    threads = [worker.render(job) for job in jobs]
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()


def under_way(worker, brake) -> list[Thread]:
    """A job of each model that is loaded, in the engine, whose device makes no forward now."""
    brake.stop_after(0)
    loaded = [name.partition("@")[0] for name in worker.parts.residency.loaded]
    threads = [worker.render(accepted(worker, model, num_steps=20)) for model in loaded]

    def num_images() -> int:
        stats = worker.engine.stats()
        return stats["inflight"] + stats["waiting"]

    until(lambda: num_images() == len(loaded), what="their images")
    return threads


def missing(worker) -> str:
    [name] = worker.parts.residency.serves - set(worker.parts.residency.loaded)
    return name.partition("@")[0]


def test_worker_begins_with_the_models_that_fit_and_serves_the_others_too(worker):
    query = text("SELECT models, loaded, failed_models FROM workers_now WHERE worker = :name")
    with transaction(worker.database) as session:
        told = session.execute(query, {"name": "cpu6@here"}).one()

    assert set(told.models.split()) == {f"{model}@1" for model in MODELS}
    assert len(told.loaded.split()) == 2
    assert told.failed_models is None


def test_jobs_of_three_models_are_all_rendered_right_where_two_are_loaded(
    worker, settings_here, two_fit
):
    before = metric(EVICTIONS[0], phase=EVICTIONS[1])
    jobs = [accepted(worker, model, seed=seed) for seed in range(4) for model in MODELS]
    own = described(a_fleet_of_three(), settings_here)
    with (
        Engine(own.config, own.first_loaded()) as engine,
        a_worker(a_fleet_of_three(), settings_here, engine, name="cpu5@here") as roomy,
    ):
        same = [accepted(roomy, model, seed=0) for model in MODELS]
        rendered(roomy, same)
        expected = pixels_of(roomy, same)

    rendered(worker, jobs)

    assert Counter(worker.row(job).state for job in jobs) == {"storing": 12}
    assert {(row.attempt, row.counted_attempts) for row in map(worker.row, jobs)} == {(1, 0)}
    assert pixels_of(worker, jobs[:3]) == expected
    assert len(set(expected)) == 3
    assert metric(EVICTIONS[0], phase=EVICTIONS[1]) > before
    assert len(worker.parts.residency.loaded) == 2


def test_a_job_waits_for_its_model_while_others_need_theirs_and_takes_their_place_then(
    worker, brake
):
    # One that is needed gives way once its last job is done, and takes no more until then.
    model = missing(worker)
    running = under_way(worker, brake)
    waiting = accepted(worker, model)
    thread = worker.render(waiting)
    until(lambda: worker.parts.residency._closed, what="one that gives way")
    [closed] = worker.parts.residency._closed
    late = accepted(worker, closed.partition("@")[0])
    late_thread = worker.render(late)
    assert (worker.row(waiting).state, worker.row(waiting).attempt) == ("running", 1)

    brake.release()
    for each in (*running, thread, late_thread):
        each.join(timeout=120)

    assert {worker.row(job).state for job in (waiting, late)} == {"storing"}


def test_a_job_that_waits_for_its_model_is_given_back_by_a_worker_that_leaves(worker, brake):
    running = under_way(worker, brake)
    waiting = accepted(worker, missing(worker))
    thread = worker.render(waiting)
    until(lambda: len(worker.keeper.all_held()) == 3, what="its lease")

    for held in worker.keeper.all_held():
        if held.lease.job_id == waiting.id:
            held.leave("a test wants it")
    thread.join(timeout=60)

    assert not thread.is_alive()
    row = worker.row(waiting)
    assert (row.state, row.attempt, row.counted_attempts) == ("queued", 1, 0)
    brake.release()
    for each in running:
        each.join(timeout=120)


def test_a_model_that_a_revision_drops_while_it_is_loaded_leaves_nothing_behind(
    worker, monkeypatch
):
    residency, name = worker.parts.residency, missing(worker) + "@1"
    loaded = residency.loaded
    specs, begun, goes_on = dict(residency._specs), threading.Event(), threading.Event()
    accelerate = loading.accelerate

    def accelerate_later(*args):
        begun.set()
        goes_on.wait(60)
        accelerate(*args)

    monkeypatch.setattr(loading, "accelerate", accelerate_later)
    with residency.using(name, lambda: None):
        assert begun.wait(60)
        without = {other: spec for other, spec in specs.items() if other != name}
        follows = Thread(target=residency.go_by, args=(without, ()))
        follows.start()
        until(lambda: name not in residency.serves, within_s=60, what="the new revision")
        goes_on.set()
        follows.join(60)
    residency.go_by(specs, loaded)  # what gave way returns

    assert not follows.is_alive()
    assert set(residency.loaded) == set(loaded)
    assert name in residency.serves
    assert name not in worker.engine.checkpoints
    assert name not in residency.weights
    assert name not in worker.keeper.identity.facts["weights"]


@pytest.fixture
def holder(worker) -> Iterator[str]:
    """The row of another worker, which has the model loaded that is missing here."""
    name = f"gpu0@{uuid.uuid4().hex[:8]}"
    with transaction(worker.database) as session:
        workers.heartbeat(
            session,
            name=name,
            pool="local",
            device="cuda:0",
            slots=2,
            facts={},
            held=[f"{model}@1" for model in MODELS],
            loaded=[f"{missing(worker)}@1"],
            silent_after_s=600,
        )
    yield name
    with transaction(worker.database) as session:
        workers.leave(session, name)


def test_a_job_is_left_for_a_moment_to_a_free_worker_that_has_its_model_loaded(worker, holder):
    end_left_jobs(worker.database)
    model = missing(worker)
    job = accepted(worker, model)
    worker.renderer.release.release("local", "quality")
    announced_at = [worker.row(job).announced_at]

    for _ in range(LEFT_TO_HOLDERS):
        rendered(worker, [job])
        announced_at.append(worker.row(job).announced_at)
        assert worker.row(job).attempt == 0, "nobody has taken it"
    rendered(worker, [job])

    assert announced_at == sorted(set(announced_at)), "it was announced again each time"
    assert worker.row(job).state == "storing", "bounded: the model was loaded here then"


def test_a_job_is_not_left_to_a_worker_that_has_its_model_loaded_and_no_slot_free(worker, holder):
    taken = accepted(worker, "sd", num_images=2)
    with transaction(worker.database) as session:
        leases.take(session, taken.id, worker=holder, device="cuda:0", ttl_s=600, pool="local")
    job = accepted(worker, missing(worker))

    rendered(worker, [job])

    assert worker.row(job).state == "storing"


def test_a_model_that_cannot_be_loaded_when_asked_for_fails_alone(settings_here):
    fleet = a_fleet_of_three()
    versions = fleet.models["sd"].versions
    broken = versions[0].model_copy(
        update={"id": "broken", "source": "nowhere", "traffic_weight": 0.0}
    )
    sd = fleet.models["sd"].model_copy(update={"versions": (*versions, broken)})
    fleet = fleet.model_copy(update={"models": fleet.models | {"sd": sd}})
    own = described(fleet, settings_here)

    with Engine(own.config, own.first_loaded()) as engine:
        assert "sd@broken" not in engine.checkpoints
        assert engine.failures == ()
        with a_worker(fleet, settings_here, engine, name="cpu4@here") as worker:
            job, other = accepted(worker, "sd", model_version="broken"), accepted(worker, "sd")
            rendered(worker, [job, other])

            row = worker.row(job)
            assert (row.state, row.counted_attempts) == ("queued", 0)
            assert worker.row(other).state == "storing"
            [sentence] = worker.keeper.identity.failed.values()
            assert sentence.startswith("model 'sd', version 'broken' (")
            assert "sd@broken" not in (worker.keeper.identity.held or ())
            end_left_jobs(worker.database)


def test_a_version_of_weight_0_is_loaded_when_a_job_names_it(settings_here):
    fleet = a_fleet_of_three()
    versions = fleet.models["sd"].versions
    spare = versions[0].model_copy(update={"id": "spare", "traffic_weight": 0.0})
    sd = fleet.models["sd"].model_copy(update={"versions": (*versions, spare)})
    fleet = fleet.model_copy(update={"models": {"sd": sd}})
    pool = fleet.pools["local"].model_copy(update={"models": ("sd",)})
    fleet = fleet.model_copy(update={"pools": {"local": pool}})
    own = described(fleet, settings_here)

    with Engine(own.config, own.first_loaded()) as engine:
        assert engine.checkpoints == ("sd@1",)
        with a_worker(fleet, settings_here, engine, name="cpu3@here") as worker:
            job, usual = accepted(worker, "sd", model_version="spare"), accepted(worker, "sd")
            rendered(worker, [job, usual])

            one, other = pixels_of(worker, [job, usual])
            assert engine.checkpoints == ("sd@1", "sd@spare")
            assert one == other, "of the same files"
            with transaction(worker.database) as session:
                query = text("SELECT count(*) FROM capabilities WHERE version = 'spare'")
                assert session.scalar(query) == 1
