"""Run a rendering worker: one process per device, with one pool's models loaded and warm."""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import structlog
from celery.signals import worker_shutting_down
from sqlalchemy import Engine as Database

from dispatch.endings import EndedJobs
from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker, make_celery
from edges.handoff import Gauge
from edges.notices import Notice, NoticeSource, NoticeWatch, SignalNotices, sources_from
from edges.progress import CANCELS, WATCHES, Listener, ProgressWriter
from edges.snapshots import Snapshots
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from fleet.consumer import TakenTask, tier_gate
from models.database import make_engine
from policy import connections, gates, queues, tiers
from policy.fleet import Fleet
from settings import WorkerSettings, refuse
from tasks.checkpoints import Checkpoints
from tasks.engines import checkpoint_specs, engine_config
from tasks.health import EX_SOFTWARE, Health
from tasks.inputs import InputPictures
from tasks.keeper import LeaseKeeper, WorkerIdentity
from tasks.preemption import Preemption, wait_while_a_notice_stands
from tasks.previews import Previews
from tasks.render import Renderer
from tasks.roles.consuming import consume, register
from tasks.verdicts import Verdicts

log = structlog.get_logger(__name__)

SPARE_THREADS = 4  # they drop duplicates at once while every slot is taken


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """Hold the parts of one rendering worker, without Celery; the rest is in its renderer."""

    settings: WorkerSettings
    fleet: Fleet
    engine: Engine
    keeper: LeaseKeeper
    gauge: Gauge
    snapshots: Snapshots
    preemption: Preemption
    renderer: Renderer

    def start(self) -> None:
        """Say that this worker is alive and begin to renew leases; returns once Postgres knows."""
        self.keeper.start(max_attempts=self.settings.max_attempts)

    def may_take(self, queue: str, taken: Sequence[TakenTask]) -> bool:
        """Decide whether the next message is taken from this queue.

        taken: messages whose tasks have not ended; each counts by the images of its job.
        """
        return gates.may_take_from(
            self.fleet,
            queue,
            self.keeper.images_in_hand(images_by_job(self.fleet, taken)),
            self.keeper.identity.slots,
            fill=self.gauge.fill(),
            is_leaving=bool(self.keeper.leaving),
            is_reserved=self.keeper.is_reserved(),
        )

    def sign_off(self) -> None:
        """Stop renewing leases and delete the worker's row.

        From here on nothing that hangs can keep other workers from its jobs.
        """
        self.renderer.health.close()
        self.keeper.close()

    def put_away(self) -> None:
        """Store snapshots and send progress that is left. The caller stops the engine."""
        self.renderer.checkpoints.close()
        self.renderer.progress.close()


def build(
    settings: WorkerSettings,
    fleet: Fleet,
    *,
    engine: Engine,
    when_empty: Callable[[], None],
    when_unfit: Callable[[Notice], None] | None = None,
) -> WorkerParts:
    """Make a rendering worker's parts around an engine that is started; nothing is taken yet.

    when_empty: is called when the worker has to go and holds no job any more.
    when_unfit: is told when its health says that it has to go; None: it leaves.
    """
    database = make_engine(settings.database_url, pool_size=connections.WORKER)
    ended = EndedJobs.connect(settings.handoff_url, ttl_s=settings.handoff_ttl_s)
    keeper = _keeper(settings, fleet, engine, database, ended)
    gauge = Gauge(settings.handoff_url, trusted_for_s=gates.HANDOFF_SILENT_AFTER_S)
    preemption = Preemption(keeper, when_empty=when_empty)
    health = Health(
        engine,
        stuck_after_s=settings.engine_stuck_after_s,
        leave=when_unfit or preemption.begin,
    )
    renderer = _renderer(
        settings,
        fleet,
        database,
        ended,
        keeper=keeper,
        health=health,
        checkpoints=Checkpoints(engine, ended.snapshots, ended.signals, fill=gauge.fill),
        progress=ProgressWriter(settings.handoff_url, fill=gauge.fill),
    )
    return WorkerParts(
        settings=settings,
        fleet=fleet,
        engine=engine,
        keeper=keeper,
        gauge=gauge,
        snapshots=ended.snapshots,
        preemption=preemption,
        renderer=renderer,
    )


def _renderer(
    settings: WorkerSettings,
    fleet: Fleet,
    database: Database,
    ended: EndedJobs,
    *,
    keeper: LeaseKeeper,
    health: Health,
    checkpoints: Checkpoints,
    progress: ProgressWriter,
) -> Renderer:
    broker = Broker(settings, fleet)
    return Renderer(
        settings=settings,
        fleet=fleet,
        keeper=keeper,
        checkpoints=checkpoints,
        inputs=InputPictures(inputs=ended.inputs),
        health=health,
        verdicts=Verdicts(
            database=database,
            ended=ended,
            health=health,
            max_attempts=settings.max_attempts,
        ),
        database=database,
        broker=broker,
        release=Release(database, broker, fleet, worker_silence_s=settings.lease_ttl_s),
        handoff=ended.handoff,
        progress=progress,
        previews=Previews(progress),
        signals=ended.signals,
    )


def _keeper(
    settings: WorkerSettings,
    fleet: Fleet,
    engine: Engine,
    database: Database,
    ended: EndedJobs,
) -> LeaseKeeper:
    identity = WorkerIdentity(
        name=worker_name(settings),
        pool=settings.worker_pool,
        device=engine.config.device,
        slots=fleet.pools[settings.worker_pool].slots,
        facts={"load_s": round(engine.load_s, 3)},
    )
    return LeaseKeeper(
        database,
        identity,
        ended=ended,
        beats=make_engine(settings.database_url, pool_size=connections.WORKER_BEATS),
        ttl_s=settings.lease_ttl_s,
        renew_s=settings.lease_renew_s,
        stop_s=settings.lease_stop_s,
    )


def worker_name(settings: WorkerSettings) -> str:
    """Name the worker as the launcher does, or after its machine."""
    return settings.worker_name or f"cpu0@{socket.gethostname()}"


def images_by_job(
    fleet: Fleet,
    taken: Sequence[TakenTask],
) -> dict[uuid.UUID, tuple[str, int]]:
    """Tell tier and images of each job whose message this worker has.

    A message that does not say how many counts as the largest job of its tier. One that is none of
    ours counts nothing: its task ends at once.
    """
    by_job = {}
    for task in taken:
        tier, _ = queues.tier_of(task.queue)
        told = task.headers.get(queues.NUM_IMAGES)
        images = told if isinstance(told, int) and told > 0 else fleet.tiers[tier].max_images
        with suppress(KeyError, ValueError):
            by_job[uuid.UUID(str(task.kwargs["job_id"]))] = tier, images
    return by_job


def serve(settings: WorkerSettings, fleet: Fleet) -> NoReturn:
    """Load and warm the pool's models, then take jobs until the worker has to go."""
    # Before the first computation: or last bits may depend on where a matrix lies in memory.
    os.environ["MKL_CBWR"] = "AUTO,STRICT"
    # Until Celery's own handler is there; loading takes a while.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sources = _notice_sources(settings)
    wait_while_a_notice_stands(sources)
    engine = _start_engine(settings, fleet)
    parts = build(settings, fleet, engine=engine, when_empty=_end_process)
    status = _take_jobs(parts, sources)
    # Taking down an interpreter that has loaded torch and diffusers takes seconds that a notice
    # may not have; all is put away.
    logging.shutdown()
    os._exit(status)


def _take_jobs(parts: WorkerParts, sources: Sequence[NoticeSource]) -> int:
    """Render what comes until the worker has to go, and put everything away; the exit status."""
    settings = parts.settings
    fleet = parts.fleet
    pool = parts.settings.worker_pool
    names = queues.render_queues(fleet, pool)
    celery = make_celery(settings, fleet)
    register(celery, queues.RENDER_JOB, parts.renderer.render_job)
    celery.steps["consumer"].add(tier_gate(names, parts.may_take))
    shutdown = SignalNotices(settings.shutdown_notice_s)
    worker_shutting_down.connect(lambda **_: shutdown.notify(), weak=False)
    watch = NoticeWatch([*sources, shutdown], parts.preemption.begin)
    listeners = [
        Listener(settings.handoff_url, CANCELS, parts.keeper.drop),
        Listener(settings.handoff_url, WATCHES, parts.renderer.previews.show),
    ]
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    telemetry.watch_engine(parts.engine.stats)
    threads = tiers.most_jobs(fleet, fleet.pools[pool].slots) + SPARE_THREADS
    name = parts.keeper.identity.name
    status = 0
    try:
        parts.start()
        _log_ready(parts)
        status = consume(celery, names, name=name, threads=threads)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        watch.close()
        for listener in listeners:
            listener.close()
        parts.sign_off()
        parts.engine.stop()
        parts.put_away()
    # One that gave up was told to end, but by itself.
    return EX_SOFTWARE if parts.renderer.health.gave_up else status


def _log_ready(parts: WorkerParts) -> None:
    log.info("database_connections", at_most=connections.at_most("worker"))
    log.info(
        "worker_ready",
        worker=parts.keeper.identity.name,
        device=parts.engine.config.device,
        load_s=round(parts.engine.load_s, 2),
    )


def _start_engine(settings: WorkerSettings, fleet: Fleet) -> Engine:
    """Start the engine with every version of every model of the pool, loaded and warm."""
    pool = fleet.pools[settings.worker_pool]
    specs = checkpoint_specs(fleet, pool.models, settings.checkpoint_root)
    engine = Engine(engine_config(settings, fleet, pool), specs)
    try:
        engine.start()
    except (CheckpointCorrupt, UnsupportedRequest) as problem:
        name = settings.worker_pool
        refuse([f"fleet.toml: a model of pool {name!r} cannot be loaded: {problem}"])
    return engine


def _notice_sources(settings: WorkerSettings) -> list[NoticeSource]:
    name = worker_name(settings)
    try:
        return sources_from(settings.preemption_notices.replace("{worker}", name))
    except ValueError as error:
        refuse([f"settings: PREEMPTION_NOTICES: {error}"])


def _end_process() -> None:
    """Begin a warm shutdown of Celery."""
    os.kill(os.getpid(), signal.SIGTERM)
