"""Start one role of the house: `python -m tasks.serve render | results | maintenance | webhooks | flower`.

Each role includes only its own tasks, reads only its own settings, and no role but `render` loads torch.
"""

import logging
import os
import signal
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, cast

import structlog
from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down

from edges import telemetry
from edges.broker import Broker, make_celery
from edges.handoff import Gauge, Handoff
from edges.inputs import Inputs
from edges.notices import NoticeSource, NoticeWatch, SignalNotices, sources_from
from edges.objectstore import ObjectStore
from edges.outbound import Outbound
from edges.progress import CANCELS, ENDINGS, WATCHES, Listener, News, ProgressWriter
from edges.release import Release
from edges.snapshots import Snapshots
from fleet.consumer import TakenTask, on_turn, run_worker, tier_gate
from models.database import make_engine
from policy import connections, gates, queues, tiers
from policy.fleet import Fleet
from settings import CourierSettings, FlowerSettings, Settings, StoreSettings, WorkerSettings, load, load_fleet_or_exit, refuse

log = structlog.get_logger(__name__)

SPARE_THREADS = 4  # they drop duplicates at once while every slot is taken
STORE_THREADS = 4
DELIVER_THREADS = 16  # most wait for a receiver, with no connection to the database
# What a worker does for whoever has the broker's password: it tells of itself. Celery would also stop, or take other queues.
INSPECTIONS = {"ping", "active", "reserved", "scheduled", "registered", "stats", "active_queues", "conf", "query_task", "revoked", "clock"}
INSPECTIONS |= {"report", "enable_events"}  # the last is what Flower says all the time; events are on as it is


def serve_render() -> NoReturn:
    """Load and warm the pool's models, then take jobs."""
    settings = load(WorkerSettings)
    telemetry.configure_logs(settings.log_level)
    fleet = load_fleet_or_exit(settings)
    from tasks.checkpoints import Checkpoints
    from tasks.health import EX_SOFTWARE, Health
    from tasks.inputs import PictureDesk
    from tasks.keeper import LeaseKeeper, WorkerIdentity
    from tasks.preemption import Preemption, wait_while_a_notice_stands
    from tasks.previews import Previews
    from tasks.render import Renderer
    from tasks.verdicts import Verdicts

    os.environ["MKL_CBWR"] = "AUTO,STRICT"  # before torch: or last bits may depend on where a matrix lies in memory
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Celery's own handler is there; loading takes a while
    name = settings.worker_name or f"cpu0@{socket.gethostname()}"
    sources = _notice_sources(settings, name)
    wait_while_a_notice_stands(sources)
    pool = fleet.pools[settings.worker_pool]
    engine = _start_engine(settings, fleet)
    threads = tiers.most_jobs(fleet, pool.slots) + SPARE_THREADS
    database = make_engine(settings.database_url, pool_size=connections.WORKER)
    beats = make_engine(settings.database_url, pool_size=connections.WORKER_BEATS)
    identity = WorkerIdentity(
        name=name, pool=settings.worker_pool, device=engine.config.device, slots=pool.slots, facts={"load_s": round(engine.load_s, 3)}
    )
    celery = make_celery(settings, fleet)
    broker = Broker(settings, fleet)
    keeper = LeaseKeeper(
        database, identity, beats=beats, ttl_s=settings.lease_ttl_s, renew_s=settings.lease_renew_s, stop_s=settings.lease_stop_s
    )
    gauge = Gauge(settings.handoff_url, trusted_for_s=gates.HANDOFF_SILENT_AFTER_S)
    progress, news = ProgressWriter(settings.handoff_url, fill=gauge.fill), News(settings.handoff_url)
    previews = Previews(progress)
    checkpoints = Checkpoints(engine, Snapshots(settings.handoff_url, ttl_s=settings.handoff_ttl_s), news, fill=gauge.fill)
    preemption = Preemption(keeper, when_empty=lambda: os.kill(os.getpid(), signal.SIGTERM))
    health = Health(engine, stuck_after_s=settings.engine_stuck_after_s, leave=preemption.begin)
    renderer = Renderer(
        settings=settings,
        fleet=fleet,
        keeper=keeper,
        checkpoints=checkpoints,
        desk=PictureDesk(inputs=Inputs(settings.handoff_url, ttl_s=settings.handoff_ttl_s)),
        health=health,
        verdicts=Verdicts(database=database, news=news, health=health, max_attempts=settings.max_attempts),
        database=database,
        broker=broker,
        release=Release(database, broker, fleet, worker_silence_s=settings.lease_ttl_s),
        handoff=Handoff(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        progress=progress,
        previews=previews,
        news=news,
    )
    register(celery, queues.RENDER_JOB, renderer.render_job)
    shutdown = SignalNotices(settings.shutdown_notice_s)
    worker_shutting_down.connect(lambda **_: shutdown.notify(), weak=False)
    watch = NoticeWatch([*sources, shutdown], preemption.begin)
    listeners = [Listener(settings.handoff_url, CANCELS, keeper.drop), Listener(settings.handoff_url, WATCHES, previews.show)]
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    telemetry.watch_engine(engine.stats)
    names = queues.render_queues(fleet, settings.worker_pool)

    def may_take(queue: str, taken: Sequence[TakenTask]) -> bool:
        """Counts images; a task that has not got its lease yet, by what its message says."""
        return gates.may_take_from(
            fleet,
            queue,
            keeper.images_in_hand(_images_by_job(fleet, taken)),
            pool.slots,
            fill=gauge.fill(),
            is_leaving=bool(keeper.leaving),
            is_reserved=keeper.is_reserved(),
        )

    celery.steps["consumer"].add(tier_gate(names, may_take))
    status = 0
    try:
        keeper.start(max_attempts=settings.max_attempts)
        log.info("database_connections", at_most=connections.at_most("worker"))
        log.info("worker_ready", worker=name, device=engine.config.device, load_s=round(engine.load_s, 2))
        status = _work(celery, names, name=name, threads=threads)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        for part in (watch, health, keeper, *listeners):
            part.close()
        engine.stop()
        checkpoints.close()
        progress.close()
    if health.gave_up:
        status = EX_SOFTWARE  # it was told to end, but by itself
    # Taking down an interpreter that has loaded torch and diffusers takes seconds that a notice may not have; all is put away.
    logging.shutdown()
    os._exit(status)


def serve_results() -> int:
    """Store what was rendered."""
    settings = load(StoreSettings)
    telemetry.configure_logs(settings.log_level)
    fleet = load_fleet_or_exit(settings)
    from tasks.bring import Bringer
    from tasks.store import Storekeeper

    name = _role_name("results")
    database = make_engine(settings.database_url, pool_size=connections.RESULTS)
    celery = make_celery(settings, fleet)
    broker = Broker(settings, fleet)
    store = ObjectStore(settings)
    bringer = Bringer(
        database=database,
        inputs=Inputs(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        store=store,
        release=Release(database, broker, fleet, worker_silence_s=settings.lease_ttl_s),
        fill=Gauge(settings.handoff_url).fill,
    )
    storekeeper = Storekeeper(
        settings=settings,
        fleet=fleet,
        database=database,
        handoff=Handoff(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        snapshots=Snapshots(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        store=store,
        news=News(settings.handoff_url),
        release=Release(database, broker, fleet, worker_silence_s=settings.lease_ttl_s),
        name=name,
    )
    register(celery, queues.STORE_IMAGES, storekeeper.store_images)
    register(celery, queues.BRING_INPUTS, bringer.bring_inputs)
    register(celery, queues.TIDY_STORE, storekeeper.tidy_store)
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    names = queues.results_queues(fleet)
    celery.steps["consumer"].add(tier_gate(names, lambda queue, taken: True))
    log.info("database_connections", at_most=connections.at_most("results"))
    return _work(celery, names, name=name, threads=STORE_THREADS)


def serve_maintenance() -> int:
    """Sweep, every so often and when asked to; several may run."""
    settings = load(Settings)
    telemetry.configure_logs(settings.log_level)
    fleet = load_fleet_or_exit(settings)
    from tasks.sweep import Sweeper, SweepLoop

    database = make_engine(settings.database_url, pool_size=connections.SWEEPER)
    celery = make_celery(settings, fleet)
    note_turn = telemetry.loop("sweep")
    broker = Broker(settings, fleet)
    sweeper = Sweeper(
        settings=settings,
        fleet=fleet,
        database=database,
        broker=broker,
        release=Release(database, broker, fleet, worker_silence_s=settings.lease_ttl_s),
        handoff=Handoff(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        snapshots=Snapshots(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        inputs=Inputs(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        news=News(settings.handoff_url),
        fill=Gauge(settings.handoff_url).fill,
        on_turn=note_turn,
    )
    register(celery, queues.SWEEP, sweeper.sweep)
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    log.info("database_connections", at_most=connections.at_most("sweeper"))
    loop = SweepLoop(sweeper.sweep, every_s=settings.sweep_every_s, on_turn=note_turn)
    loop.start()
    try:
        return _work(celery, [queues.MAINTENANCE], name=_role_name("maintenance"), threads=2)
    finally:
        loop.stop()


def serve_webhooks() -> int:
    """Deliver webhooks."""
    settings = load(CourierSettings)
    telemetry.configure_logs(settings.log_level)
    fleet = load_fleet_or_exit(settings)
    from tasks.deliver import Courier

    name = _role_name("webhooks")
    database = make_engine(settings.database_url, pool_size=connections.WEBHOOKS)
    outbound = Outbound(settings.outbound_allowed_networks)
    broker = Broker(settings, fleet)
    courier = Courier(database=database, broker=broker, outbound=outbound, name=name, public_url=settings.public_url)
    celery = make_celery(settings, fleet)
    register(celery, queues.DELIVER_WEBHOOK, courier.deliver_webhook)
    listener = Listener(settings.handoff_url, ENDINGS, courier.hear)
    log.info("database_connections", at_most=connections.at_most("webhooks"))
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    try:
        return _work(celery, [queues.WEBHOOKS], name=name, threads=DELIVER_THREADS)
    finally:
        listener.close()


def serve_flower() -> int | None:
    """Flower, which asks for a user and a password."""
    settings = load(FlowerSettings)
    telemetry.configure_logs("WARNING")
    host, _, port = settings.flower_bind.rpartition(":")
    # By the environment and not by an argument: arguments are for everybody to see.
    os.environ["FLOWER_BASIC_AUTH"] = f"{settings.flower_user}:{settings.flower_password.get_secret_value()}"
    celery = make_celery(settings, load_fleet_or_exit(settings))
    _keep_flower_from_acting()
    return cast("int | None", celery.start(["flower", f"--address={host}", f"--port={port}"]))


def register(celery: Celery, name: str, promise: Callable[..., None]) -> None:
    """Make `promise` the task called `name`."""

    @celery.task(name=name)
    def task(**arguments: Any) -> None:
        promise(**arguments)


def _start_engine(settings: WorkerSettings, fleet: Fleet) -> Any:
    """The engine with every version of every model of the pool, loaded and warm."""
    from engine.engine import Engine
    from engine.errors import CheckpointCorrupt, UnsupportedRequest
    from tasks.engines import checkpoint_specs, engine_config

    pool = fleet.pools[settings.worker_pool]
    engine = Engine(engine_config(settings, fleet, pool), checkpoint_specs(fleet, pool.models, settings.checkpoint_root))
    try:
        engine.start()
    except (CheckpointCorrupt, UnsupportedRequest) as problem:
        refuse([f"fleet.toml: a model of pool {settings.worker_pool!r} cannot be loaded: {problem}"])
    return engine


def _notice_sources(settings: WorkerSettings, name: str) -> list[NoticeSource]:
    try:
        return sources_from(settings.preemption_notices.replace("{worker}", name))
    except ValueError as error:
        refuse([f"settings: PREEMPTION_NOTICES: {error}"])


def _images_by_job(fleet: Fleet, taken: Sequence[TakenTask]) -> dict[uuid.UUID, tuple[str, int]]:
    """Tier and images of each job whose message this worker has. One that does not say counts as the largest of its tier."""
    by_job = {}
    for task in taken:
        tier, images = queues.tier_of(task.queue)[0], task.headers.get(queues.NUM_IMAGES)
        with suppress(KeyError, ValueError):  # a message that is none of ours: its task ends at once
            job_id = uuid.UUID(str(task.kwargs["job_id"]))
            by_job[job_id] = tier, images if isinstance(images, int) and images > 0 else fleet.tiers[tier].max_images
    return by_job


def _keep_flower_from_acting() -> None:
    """Take Flower's routes away that start, stop or change something: it is there to look. Leans on names of Flower 2.2."""
    from flower import urls
    from flower.api import control, tasks

    acting = {tasks.TaskApply, tasks.TaskAsyncApply, tasks.TaskSend, tasks.TaskAbort}

    def acts(route: Any) -> bool:
        handler = getattr(route, "handler_class", None) or route[1]
        return handler in acting or handler.__module__ == control.__name__

    urls.handlers[:] = [route for route in urls.handlers if not acts(route)]


def _answer_inspections_only() -> None:
    """Forget every remote-control command but INSPECTIONS. Leans on a private name of Celery 5.7."""
    from celery.worker.control import Panel

    for name in Panel.data.keys() - INSPECTIONS:
        del Panel.data[name]


def _work(celery: Celery, names: list[str], *, name: str, threads: int) -> int:
    """Consume `names` until SIGTERM, which lets running tasks end. The exit status: 0 only if it was told to end."""
    _answer_inspections_only()
    celery.steps["consumer"].add(on_turn(telemetry.loop("consumer")))
    warnings.filterwarnings("ignore", category=SecurityWarning)  # Celery warns of root because of pickle; we accept JSON alone
    setup_logging.connect(lambda **_: None, weak=False)  # or Celery sets the root logger's level: LOG_LEVEL is what counts
    arguments = ["--quiet", "worker", "--pool=threads", f"--concurrency={threads}", f"--queues={','.join(names)}", f"--hostname={name}"]
    return run_worker(celery, [*arguments, "--without-mingle", "--without-gossip", "--loglevel=WARNING"])


def _role_name(role: str) -> str:
    return f"{role}-{os.getpid()}@{socket.gethostname()}"


ROLES: dict[str, Callable[[], int | None]] = {
    "render": serve_render,
    "results": serve_results,
    "maintenance": serve_maintenance,
    "webhooks": serve_webhooks,
    "flower": serve_flower,
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: python -m tasks.serve {'|'.join(ROLES)}")
    sys.exit(ROLES[sys.argv[1]]())


if __name__ == "__main__":
    main()
