"""Run a results worker: it stores rendered images and stages jobs' input pictures."""

from dataclasses import dataclass

import structlog

from dispatch.endings import EndedJobs
from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker, make_celery
from edges.handoff import Gauge
from edges.objectstore import ObjectStore
from fleet.consumer import tier_gate
from models.database import make_engine
from policy import connections, queues
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from settings import StoreSettings
from tasks.roles.consuming import consume, process_name, register
from tasks.roles.following import following
from tasks.staging import InputStager
from tasks.store import Storekeeper

log = structlog.get_logger(__name__)

THREADS = 4


@dataclass(frozen=True, kw_only=True)
class ResultsParts:
    """Hold the parts of one results worker."""

    storekeeper: Storekeeper
    stager: InputStager


def build(settings: StoreSettings, fleet: Fleet | CurrentFleet, *, name: str) -> ResultsParts:
    """Make a results worker's parts. name: who stores, in the audit log."""
    database = make_engine(settings.database_url, pool_size=connections.RESULTS)
    followed = current(fleet)
    broker = Broker(settings, followed)
    release = Release(database, broker, followed, worker_silence_s=settings.lease_ttl_s)
    store = ObjectStore(settings)
    ended = EndedJobs.connect(settings.handoff_url, ttl_s=settings.handoff_ttl_s)
    stager = InputStager(
        database=database,
        inputs=ended.inputs,
        store=store,
        release=release,
        fill=Gauge(settings.handoff_url).fill,
    )
    storekeeper = Storekeeper(
        settings=settings,
        current=followed,
        database=database,
        handoff=ended.handoff,
        store=store,
        signals=ended.signals,
        ended=ended,
        release=release,
        name=name,
    )
    return ResultsParts(storekeeper=storekeeper, stager=stager)


def serve(settings: StoreSettings, fleet: CurrentFleet) -> int:
    """Store images and stage pictures until told to end."""
    name = process_name("results")
    parts = build(settings, fleet, name=name)
    celery = make_celery(settings, fleet.fleet)
    register(celery, queues.STORE_IMAGES, parts.storekeeper.store_images)
    register(celery, queues.TIDY_STORE, parts.storekeeper.tidy_store)
    register(celery, queues.STAGE_INPUTS, parts.stager.stage_inputs)

    def names() -> list[str]:
        return queues.results_queues(fleet.fleet)

    celery.steps["consumer"].add(tier_gate(names, lambda queue, taken: True))
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    log.info("database_connections", at_most=connections.at_most("results"))
    with following(settings, fleet, parts.storekeeper.database):
        return consume(celery, names(), name=name, threads=THREADS)
