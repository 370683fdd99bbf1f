"""A worker in the test's own process: real engine, real Postgres, real Redis, so that a test can reach into the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from urllib.parse import urlsplit

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine as Database

from edges.broker import Broker
from edges.handoff import Handoff
from edges.inputs import Inputs
from edges.notices import FakeNotices
from edges.progress import ENDINGS, Listener, News, ProgressWriter
from edges.release import Release
from edges.snapshots import Snapshots
from engine.engine import Engine
from models.database import transaction
from models.tables import Job
from policy.fleet import Fleet
from settings import REPO, WorkerSettings
from tasks.checkpoints import Checkpoints
from tasks.engines import checkpoint_specs, engine_config
from tasks.health import Health
from tasks.inputs import PictureDesk
from tasks.keeper import LeaseKeeper, WorkerIdentity
from tasks.previews import Previews
from tasks.render import Renderer
from tasks.verdicts import Verdicts
from tests.builders import a_fleet, a_job, settings_for
from tests.models.conftest import a_database

CORNER = 8  # of Redis's sixteen numbered databases: nobody else looks there


@dataclass(frozen=True)
class WorkerHere:
    """The parts of a worker, and what its tests ask of it."""

    renderer: Renderer
    keeper: LeaseKeeper
    engine: Engine
    database: Database
    settings: WorkerSettings
    snapshots: Snapshots
    notices: FakeNotices  # that its health gave

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


def metric(name: str, **labels: str) -> float:
    """Read a metric of this process as a scraper does; 0 for a series that is not there."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def ended_jobs(settings_here) -> Iterator[list]:
    """Ids of the jobs that waiting clients and webhooks were told of, as they come."""
    heard = []
    listener = Listener(settings_here.handoff_url, ENDINGS, heard.append)
    yield heard
    listener.close()


@pytest.fixture(scope="session")
def fleet_here() -> Fleet:
    return a_fleet({"tiers.quality.checkpoint_every_steps": 2})


@pytest.fixture(scope="session")
def settings_here(stack) -> WorkerSettings:
    urls = {name: urlsplit(stack.env[name.upper()])._replace(path=f"/{CORNER}").geturl() for name in ("broker_url", "handoff_url")}
    return settings_for(WorkerSettings, stack.env, device="cpu", **urls)


@pytest.fixture(scope="session")
def engine_here(fleet_here, settings_here) -> Iterator[Engine]:
    pool = fleet_here.pools["local"]
    with Engine(engine_config(settings_here, fleet_here, pool), checkpoint_specs(fleet_here, pool.models, REPO)) as engine:
        yield engine


@pytest.fixture(scope="session")
def database_here(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database.app


@pytest.fixture
def here(fleet_here, settings_here, engine_here, database_here) -> Iterator[WorkerHere]:
    with a_worker(fleet_here, settings_here, engine_here, database_here) as worker:
        yield worker


@contextmanager
def a_worker(
    fleet: Fleet, settings: WorkerSettings, engine: Engine, database: Database, *, name: str = "cpu0@here"
) -> Iterator[WorkerHere]:
    """Everything `tasks.serve` puts together for the role `render`, but Celery."""
    identity = WorkerIdentity(name=name, pool="local", device="cpu", slots=16, facts={})
    keeper = LeaseKeeper(database, identity, ttl_s=6, renew_s=1, stop_s=5)
    keeper.start(max_attempts=settings.max_attempts)
    progress, news = ProgressWriter(settings.handoff_url), News(settings.handoff_url)
    snapshots = Snapshots(settings.handoff_url, ttl_s=60)
    checkpoints = Checkpoints(engine, snapshots, news, fill=lambda: 0.0)
    notices = FakeNotices()
    health = Health(engine, stuck_after_s=300, leave=lambda notice: notices.announce(notice.within_s, notice.detail))
    broker = Broker(settings, fleet)
    renderer = Renderer(
        settings=settings,
        fleet=fleet,
        keeper=keeper,
        checkpoints=checkpoints,
        desk=PictureDesk(inputs=Inputs(settings.handoff_url, ttl_s=60)),
        health=health,
        verdicts=Verdicts(database=database, news=news, health=health, max_attempts=settings.max_attempts),
        database=database,
        broker=broker,
        release=Release(database, broker, fleet, worker_silence_s=15),
        handoff=Handoff(settings.handoff_url, ttl_s=60),
        progress=progress,
        previews=Previews(progress),
        news=news,
    )
    try:
        yield WorkerHere(renderer, keeper, engine, database, settings, snapshots, notices)
    finally:
        health.close()
        keeper.close()
        checkpoints.close()
        progress.close()
