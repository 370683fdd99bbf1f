"""A worker in the test's own process: real engine, real Postgres, real Redis.

So a test can reach into the device.
"""

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Thread
from urllib.parse import urlsplit

import pytest
import redis
from prometheus_client import REGISTRY
from sqlalchemy import Engine as Database
from sqlalchemy import select, text

from edges.notices import FakeNotices
from edges.progress import ENDINGS, JobSignals, Listener
from edges.snapshots import Snapshots
from engine.engine import Engine
from models import jobs
from models.database import make_engine, transaction
from models.tables import Job
from policy.fleet import Fleet
from policy.states import FINAL_STATES
from settings import REPO, WorkerSettings
from tasks.engines import checkpoint_specs, engine_config
from tasks.keeper import LeaseKeeper
from tasks.render import Renderer
from tasks.roles import maintenance, render
from tasks.roles.render import WorkerParts
from tasks.sweep import Sweeper
from tests.builders import a_fleet, a_job, settings_for, until
from tests.models.conftest import a_database

TEST_REDIS_DB = 8  # of Redis's sixteen numbered databases: nobody else looks there


@dataclass(frozen=True)
class WorkerHere:
    """A worker's parts, and what its tests ask of it."""

    parts: WorkerParts
    notices: FakeNotices  # that its health gave

    @property
    def settings(self) -> WorkerSettings:
        return self.parts.settings

    @property
    def renderer(self) -> Renderer:
        return self.parts.renderer

    @property
    def keeper(self) -> LeaseKeeper:
        return self.parts.keeper

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    @property
    def snapshots(self) -> Snapshots:
        return self.parts.snapshots

    @property
    def database(self) -> Database:
        return self.parts.renderer.database

    def accept(self, **params) -> Job:
        with transaction(self.database) as session:
            return a_job(session, **params)

    def render(self, job: Job) -> Thread:
        """A task thread, as Celery would start it."""
        thread = Thread(target=self.renderer.render_job, kwargs={"job_id": str(job.id)})
        thread.start()
        return thread

    def row(self, job: Job) -> Job:
        with transaction(self.database) as session:
            found = session.get(Job, job.id)
            session.expunge(found)
            return found


class Brake:
    """Stops the device between two forwards: what a test does then comes before the next step,
    however busy the machine is.
    """

    def __init__(self) -> None:
        self._left = math.inf
        self._changed = Condition()

    def stop_after(self, forwards: int) -> None:
        """Let the device make so many forwards from now on, and wait before the next one."""
        with self._changed:
            self._left = forwards

    def release(self) -> None:
        """Let the device go on."""
        with self._changed:
            self._left = math.inf
            self._changed.notify_all()

    def pass_by(self) -> None:
        """Wait, on the device's thread, until there may be another forward."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._left > 0, timeout=120)
            self._left -= 1


def left_at_its_first_checkpoint(here: WorkerHere, brake: Brake, job: Job) -> None:
    """Render the job until a snapshot of it is kept, and have its worker give it up there."""
    brake.stop_after(3)
    thread = here.render(job)
    until(lambda: here.snapshots.of(job.id), within_s=60, what="a checkpoint")
    [held] = here.keeper.all_held()
    held.leave("a test wants it")
    brake.release()
    thread.join(timeout=60)


def metric(name: str, **labels: str) -> float:
    """Read a metric of this process as a scraper does; 0 for a series that is not there."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def endings(settings_here) -> Iterator[list]:
    """Ids of all jobs whose end was published, as they come."""
    heard = []
    listener = Listener(settings_here.handoff_url, ENDINGS, heard.append)
    signals, nobody = JobSignals(settings_here.handoff_url), uuid.uuid4()
    until(lambda: signals.publish_ending(nobody) or heard, within_s=60, what="its subscription")
    yield heard
    listener.close()


@pytest.fixture
def ended_jobs(settings_here, endings) -> list:
    """Ids of the jobs that waiting clients and webhooks are told of from now on, as they come."""
    last = uuid.uuid4()
    JobSignals(settings_here.handoff_url).publish_ending(last)
    until(lambda: last in endings, within_s=60, what="all that was published before")
    endings.clear()
    return endings


@pytest.fixture(scope="session")
def sql(stack):
    """Ask the stack's database as its owner: rows as dicts."""
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)

    def ask(query: str, **values):
        with engine.begin() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    yield ask
    engine.dispose()


@pytest.fixture(scope="session")
def fleet_here() -> Fleet:
    return a_fleet({"tiers.quality.checkpoint_every_steps": 2})


@pytest.fixture(scope="session")
def urls_here(stack, database_here) -> dict[str, str]:
    """Where the processes of a house in this process alone would find their services."""
    urls = {"database_url": database_here.url.render_as_string(hide_password=False)}
    for name in ("broker_url", "handoff_url"):
        urls[name] = urlsplit(stack.env[name.upper()])._replace(path=f"/{TEST_REDIS_DB}").geturl()
    return urls


@pytest.fixture(scope="session")
def settings_here(stack, urls_here) -> WorkerSettings:
    # Long enough for a machine that stands still for a while beside other work.
    times = {"lease_ttl_s": 60, "lease_renew_s": 1, "lease_stop_s": 50, "handoff_ttl_s": 60}
    own = {"device": "cpu", "worker_name": "cpu0@here"} | times
    return settings_for(WorkerSettings, stack.env, **own, **urls_here)


@pytest.fixture(scope="session")
def engine_here(fleet_here, settings_here) -> Iterator[Engine]:
    pool = fleet_here.pools["local"]
    specs = checkpoint_specs(fleet_here, pool.models, REPO)
    with Engine(engine_config(settings_here, fleet_here, pool), specs) as engine:
        yield engine


@pytest.fixture(scope="session")
def database_here(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database.app


@pytest.fixture
def here(fleet_here, settings_here, engine_here) -> Iterator[WorkerHere]:
    with a_worker(fleet_here, settings_here, engine_here) as worker:
        yield worker


@pytest.fixture
def brake(here, monkeypatch) -> Iterator[Brake]:
    """Of the device of `here`."""
    brake, predict = Brake(), here.engine._runner.predict

    def predict_in_turn(batch):
        brake.pass_by()
        return predict(batch)

    monkeypatch.setattr(here.engine._runner, "predict", predict_in_turn)
    yield brake
    brake.release()


@pytest.fixture
def handoff_redis(here):
    with redis.Redis.from_url(here.settings.handoff_url) as client:
        yield client
        client.config_set("maxmemory", "1gb")


@pytest.fixture
def sweeper(fleet_here, settings_here) -> Sweeper:
    """One that is asked by nobody but the test."""
    return maintenance.build(settings_here, fleet_here)


def end_left_jobs(database: Database) -> None:
    """Cancel the jobs that other tests have left unfinished: they would take the room."""
    with transaction(database) as session:
        left = session.scalars(select(Job).where(Job.state.not_in(FINAL_STATES))).all()
        for job in left:
            jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")


@contextmanager
def a_worker(
    fleet: Fleet,
    settings: WorkerSettings,
    engine: Engine,
    *,
    name: str = "cpu0@here",
) -> Iterator[WorkerHere]:
    """All of a worker but Celery, at work. It does not leave when its health says so."""
    notices = FakeNotices()
    parts = render.build(
        settings.model_copy(update={"worker_name": name}),
        fleet,
        engine=engine,
        when_empty=lambda: None,
        when_unfit=lambda notice: notices.announce(notice.within_s, notice.detail),
    )
    parts.start()
    try:
        yield WorkerHere(parts, notices)
    finally:
        parts.sign_off()
        parts.put_away()
        parts.renderer.database.dispose()
