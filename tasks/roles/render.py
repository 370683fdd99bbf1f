"""Run a rendering worker: one process per device, with one pool's models loaded and warm."""

import gc
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
from edges.notices import (
    FileNotices,
    Notice,
    NoticeSource,
    NoticeWatch,
    SignalNotices,
    sources_from,
)
from edges.progress import CANCELS, WATCHES, Listener, ProgressWriter
from edges.snapshots import Snapshots
from engine.engine import Engine
from engine.errors import DeviceLost, EngineStopped, LoadFailure, NothingLoaded
from fleet.consumer import TakenTask, tier_gate
from models import workers
from models.database import make_engine
from policy import connections, gates, queues, tiers
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from policy.workers import class_key, device_label, is_of_gpu_class, terms_of, worker_name
from settings import EX_CONFIG, EX_DEVICE_LOST, WorkerSettings, refuse
from tasks import capabilities
from tasks.checkpoints import Checkpoints
from tasks.devicetime import DeviceMeter
from tasks.engines import (
    chosen_device,
    device_misfits,
    device_name,
    failure_sentence,
    pool_of,
)
from tasks.health import Health
from tasks.inputs import InputPictures
from tasks.keeper import LeaseKeeper
from tasks.lacking import LackingModels
from tasks.loadturns import LoadTurns, default_file
from tasks.preemption import Preemption, wait_while_a_notice_stands
from tasks.previews import Previews
from tasks.registration import Loading, NameTaken, WorkerIdentity
from tasks.render import Renderer
from tasks.residency import Residency
from tasks.revisions import EngineRevisions, described_engine
from tasks.roles.consuming import consume, register
from tasks.roles.following import following
from tasks.verdicts import Verdicts
from tasks.watchdog import EX_SOFTWARE, Watchdog
from tasks.weights import Weights, wanted_of

log = structlog.get_logger(__name__)

PORTS_TRIED = 10  # for metrics, from METRICS_PORT on
SPARE_THREADS = 4  # they drop duplicates at once while every slot is taken
STOPS_WITHIN_S = 5.0  # an engine; a turn that takes longer, or hangs, ends with the process
NO_DEVICE = "No CUDA GPUs are available"  # says torch of a GPU that is off the bus


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """Hold the parts of one rendering worker, without Celery; the rest is in its renderer."""

    settings: WorkerSettings
    current: CurrentFleet
    engine: Engine
    keeper: LeaseKeeper
    gauge: Gauge
    snapshots: Snapshots
    preemption: Preemption
    residency: Residency
    revisions: EngineRevisions
    renderer: Renderer

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that runs now."""
        return self.current.fleet

    def start(self) -> None:
        """Say that this worker is alive and begin to renew leases; returns once Postgres knows.

        Its capabilities are published then, before it takes a job, and from now on models are
        loaded that are asked for.
        """
        self.keeper.start(max_attempts=self.settings.max_attempts)
        name = self.keeper.identity.name
        capabilities.publish(self.renderer.database, self.fleet, self.engine, worker=name)
        self.residency.start()

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
        self.keeper.close()

    def give_back(self, error: EngineStopped) -> None:
        """Give every job back that is held, for the worker is at fault; what it is, `error` says.

        Those that cannot be given back by then are lost when their leases expire.
        """
        for held in self.keeper.all_held():
            self.renderer.verdicts.decide(held, error)

    def put_away(self) -> None:
        """Store snapshots and send progress that is left. The caller stops the engine."""
        self.residency.close()
        self.renderer.checkpoints.close()
        self.renderer.progress.close()


def _never(within_s: float) -> None:
    """End nothing."""


def build(
    settings: WorkerSettings,
    fleet: Fleet | CurrentFleet,
    *,
    engine: Engine,
    when_empty: Callable[[], None],
    when_unfit: Callable[[Notice], None] | None = None,
    instance: uuid.UUID | None = None,
    weights: Weights | None = None,
    end_within: Callable[[float], None] = _never,
    meter: DeviceMeter | None = None,
) -> WorkerParts:
    """Make a rendering worker's parts around an engine that is started; nothing is taken yet.

    when_empty: is called when the worker has to go and holds no job any more.
    when_unfit: is told when its health says that it has to go; None: it leaves.
    instance: of the process that has the worker's name already; None: a new one.
    weights: which hold what the engine reads; None: it reads what lies on this machine.
    end_within: is told of the seconds after which a leaving worker may be ended, whatever hangs.
    meter: of what the worker's time is spent on; None: it does not keep that.
    """
    database = make_engine(settings.database_url, pool_size=connections.WORKER)
    ended = EndedJobs.connect(settings.handoff_url, ttl_s=settings.handoff_ttl_s)
    followed = current(fleet)
    identity = _identity(settings, followed.fleet, engine, instance or uuid.uuid4())
    if meter is not None:
        meter.watch(engine.stats)
    keeper = _keeper(settings, identity, database, ended, meter)
    keeper.revision = followed.number or None
    gauge = Gauge(settings.handoff_url, trusted_for_s=gates.HANDOFF_SILENT_AFTER_S)
    preemption = Preemption(keeper, when_empty=when_empty, end_within=end_within)
    unfit = when_unfit or preemption.begin
    health = Health(leave=unfit)
    weights = weights or Weights(settings)
    residency = _residency(
        settings, followed, engine, keeper, database, weights, give_up=health.give_up
    )
    leave = preemption.begin
    revisions = EngineRevisions(
        settings, followed, engine, residency, keeper, database, weights, leave=leave
    )
    keeper.on_name_lost = lambda: health.give_up("another process has the name of this worker")
    renderer = _renderer(
        settings,
        followed,
        database,
        ended,
        keeper=keeper,
        health=health,
        residency=residency,
        revisions=revisions,
        checkpoints=Checkpoints(engine, ended.snapshots, ended.signals, fill=gauge.fill),
        progress=ProgressWriter(settings.handoff_url, fill=gauge.fill),
    )
    return WorkerParts(
        settings=settings,
        current=followed,
        residency=residency,
        revisions=revisions,
        engine=engine,
        keeper=keeper,
        gauge=gauge,
        snapshots=ended.snapshots,
        preemption=preemption,
        renderer=renderer,
    )


def _renderer(
    settings: WorkerSettings,
    current: CurrentFleet,
    database: Database,
    ended: EndedJobs,
    *,
    keeper: LeaseKeeper,
    health: Health,
    residency: Residency,
    revisions: EngineRevisions,
    checkpoints: Checkpoints,
    progress: ProgressWriter,
) -> Renderer:
    broker = Broker(settings, current)
    release = Release(database, broker, current, worker_silence_s=settings.lease_ttl_s)
    lacking = LackingModels(
        database,
        release,
        residency,
        lacking=revisions.lacking,
        revisions=revisions.numbers,
        worker=keeper.identity.name,
        worker_silence_s=settings.lease_ttl_s,
    )
    return Renderer(
        settings=settings,
        current=current,
        keeper=keeper,
        residency=residency,
        checkpoints=checkpoints,
        inputs=InputPictures(inputs=ended.inputs),
        health=health,
        verdicts=Verdicts(
            database=database,
            ended=ended,
            health=health,
            current=current,
            engine_revisions=revisions,
            lacking=lacking,
            max_attempts=settings.max_attempts,
        ),
        database=database,
        broker=broker,
        release=release,
        lacking=lacking,
        handoff=ended.handoff,
        progress=progress,
        previews=Previews(progress),
        signals=ended.signals,
    )


def _identity(
    settings: WorkerSettings, fleet: Fleet, engine: Engine, instance: uuid.UUID
) -> WorkerIdentity:
    """Describe the worker; `_tell` adds its checkpoints."""
    return WorkerIdentity(
        name=name_of(settings),
        pool=settings.worker_pool,
        device=engine.config.device,
        slots=pool_of(settings, fleet).slots,
        terms=terms_of(fleet.pools[settings.worker_pool], settings.worker_class),
        facts={"load_s": round(engine.load_s, 3), workers.DOING: ""},
        instance=instance,
    )


def _residency(
    settings: WorkerSettings,
    current: CurrentFleet,
    engine: Engine,
    keeper: LeaseKeeper,
    database: Database,
    weights: Weights,
    *,
    give_up: Callable[[str], None],
) -> Residency:
    """Make the residency of a worker that tells in its row what it serves."""

    def explain(failure: LoadFailure) -> str:
        return failure_sentence(current.fleet, failure, settings.checkpoint_root)

    described_once: dict[str, str] = {}  # digests

    def on_change(residency: Residency) -> None:
        _tell(keeper, residency)
        if residency.weights.items() - described_once.items():
            name = keeper.identity.name
            capabilities.publish(database, current.fleet, engine, worker=name)
            described_once.update(residency.weights)

    described = described_engine(settings, current.fleet)
    assert described is not None, "the settings were checked against the fleet"
    residency = Residency(
        engine,
        described.lacking_files_of(weights.absent).specs,
        described.rule,
        explain=explain,
        on_change=on_change,
        give_up=give_up,
    )
    _tell(keeper, residency)
    return residency


def _tell(keeper: LeaseKeeper, residency: Residency) -> None:
    """Have the next heartbeat say what is served and loaded, and why the rest is not."""
    keeper.describe(
        held=tuple(sorted(residency.serves)),
        loaded=residency.loaded,
        failed=dict(residency.failed),
        facts={"weights": dict(residency.weights)},
    )


def _keeper(
    settings: WorkerSettings,
    identity: WorkerIdentity,
    database: Database,
    ended: EndedJobs,
    meter: DeviceMeter | None,
) -> LeaseKeeper:
    return LeaseKeeper(
        database,
        identity,
        ended=ended,
        beats=make_engine(settings.database_url, pool_size=connections.WORKER_BEATS),
        ttl_s=settings.lease_ttl_s,
        renew_s=settings.lease_renew_s,
        stop_s=settings.lease_stop_s,
        meter=meter,
    )


def name_of(settings: WorkerSettings) -> str:
    """Name the worker as the launcher does, or by its pool, its device and its machine."""
    if settings.worker_name:
        return settings.worker_name
    gpu = settings.cuda_visible_devices if settings.device != "cpu" else None
    label = device_label(gpu) if gpu and "," not in gpu else settings.device.replace(":", "")
    pool = class_key(settings.worker_pool, settings.worker_class)
    return worker_name(pool, label, socket.gethostname())


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
        images = (
            told if isinstance(told, int) and told > 0 else fleet.tier_or_retired(tier).max_images
        )
        with suppress(KeyError, ValueError):
            by_job[uuid.UUID(str(task.kwargs["job_id"]))] = tier, images
    return by_job


def serve(settings: WorkerSettings, current: CurrentFleet) -> NoReturn:
    """Load and warm the pool's models, then take jobs until the worker has to go."""
    # Before the first computation: or last bits may depend on where a matrix lies in memory.
    os.environ["MKL_CBWR"] = "AUTO,STRICT"
    # Until Celery's own handler is there; loading takes a while.
    signal.signal(signal.SIGTERM, _raise_end)
    fleet = current.fleet
    watchdog = Watchdog(
        stuck_after_s=settings.engine_stuck_after_s,
        warm_up_stuck_after_s=settings.warm_up_stuck_after_s,
    )
    watchdog.start()
    with watchdog.limited():
        _check_device(settings, fleet)
    sources = _notice_sources(settings, fleet)
    try:
        wait_while_a_notice_stands(sources)
    except _ToldToEnd:
        _end_at_once(0)
    meter = DeviceMeter()
    loading = _loading(settings, fleet, meter)
    try:
        loading.start(on_taken=_refuse_at_once)
        weights = Weights(settings, tell=loading.tell)
        turns = LoadTurns(settings.load_lock_file or default_file(), tell=loading.tell)
        engine = _load_or_end(settings, fleet, loading, weights, watchdog, turns)
        _keep_all_objects()
        loading.end()
        parts = build(
            settings,
            current,
            engine=engine,
            when_empty=_end_process,
            instance=loading.identity.instance,
            weights=weights,
            end_within=watchdog.end_within,
            meter=meter,
        )
        watchdog.give_back = parts.give_back
        status = _take_jobs(parts, sources)
    except _ToldToEnd:
        loading.leave()
        status = 0
    _end_at_once(status)


def _keep_all_objects() -> None:
    """Have the garbage collector look no more at what is there by now.

    It would not find anything, and looks at half a million objects of the libraries for half a
    second, in which no step is made. Weights are freed without it.
    """
    gc.collect()
    gc.freeze()


def _load_or_end(
    settings: WorkerSettings,
    fleet: Fleet,
    loading: Loading,
    weights: Weights,
    watchdog: Watchdog,
    turns: LoadTurns,
) -> Engine:
    """Start the engine; end the process, with the reason in the worker's row, if it cannot."""
    try:
        return _start_engine(settings, fleet, weights, watchdog, turns)
    except NothingLoaded as problem:
        root = settings.checkpoint_root
        sentences = [failure_sentence(fleet, failure, root) for failure in problem.failures]
        loading.fail("; ".join(sentences))
        _refuse_at_once(*sentences)
    except Exception as error:
        log.exception("engine_not_started")
        loading.fail(f"the engine does not start: {type(error).__name__}: {error}"[:500])
        _end_at_once(EX_DEVICE_LOST if isinstance(error, DeviceLost) else EX_SOFTWARE)


class _ToldToEnd(BaseException):
    """SIGTERM came before the worker was ready."""


def _raise_end(*_: object) -> NoReturn:
    raise _ToldToEnd


def _end_at_once(status: int) -> NoReturn:
    """End the process without taking down its interpreter.

    That takes seconds where torch and diffusers are loaded, which a notice may not have, and fails
    while a thread still computes. All is put away.
    """
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def _refuse_at_once(*lines: str) -> NoReturn:
    """End the process because of its configuration, from any thread."""
    for line in lines:
        print(line, file=sys.stderr)
    _end_at_once(EX_CONFIG)


def _loading(settings: WorkerSettings, fleet: Fleet, meter: DeviceMeter) -> Loading:
    identity = WorkerIdentity(
        name=name_of(settings),
        pool=settings.worker_pool,
        device=chosen_device(settings),
        slots=0,
        terms=terms_of(fleet.pools[settings.worker_pool], settings.worker_class),
        facts={},
    )
    return Loading(
        make_engine(settings.database_url, pool_size=connections.WORKER_BEATS),
        identity,
        ttl_s=settings.lease_ttl_s,
        renew_s=settings.lease_renew_s,
        meter=meter,
    )


def _take_jobs(parts: WorkerParts, sources: Sequence[NoticeSource]) -> int:
    """Render what comes until the worker has to go, and put everything away; the exit status."""
    settings = parts.settings
    fleet = parts.fleet
    pool = parts.settings.worker_pool

    def names() -> list[str]:
        return queues.render_queues(parts.fleet, pool)

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
    # Another worker of this host may have the port already.
    port = telemetry.serve_metrics(settings.metrics_port, settings.metrics_host, tries=PORTS_TRIED)
    parts.keeper.describe(facts={"metrics_port": port})
    telemetry.watch_engine(parts.engine.stats)
    threads = tiers.most_jobs(fleet, pool_of(settings, fleet).slots) + SPARE_THREADS
    name = parts.keeper.identity.name
    status = 0
    try:
        parts.start()
        _log_ready(parts)
        database = parts.renderer.database
        with following(
            settings,
            parts.current,
            database,
            goes_by=parts.revisions.go_by,
            is_due_again=parts.revisions.is_to_fetch_again,
        ):
            status = consume(celery, names(), name=name, threads=threads)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except _ToldToEnd:
        pass
    except NameTaken as taken:
        print(taken, file=sys.stderr)
        status = EX_CONFIG
    finally:
        watch.close()
        for listener in listeners:
            listener.close()
        parts.sign_off()
        parts.engine.stop(within_s=STOPS_WITHIN_S)
        parts.put_away()
    if parts.engine.is_device_lost:
        return EX_DEVICE_LOST
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


def _start_engine(
    settings: WorkerSettings, fleet: Fleet, weights: Weights, watchdog: Watchdog, turns: LoadTurns
) -> Engine:
    """Start the engine with the versions of the pool's models that it begins with, loaded and warm.

    What is kept elsewhere is fetched first, and held while the process lives. Those that cannot be
    loaded are left out. Raises NothingLoaded if that is all of them.
    """
    described = described_engine(settings, fleet)
    assert described is not None, "the settings were checked against the fleet"
    absent = weights.stage(wanted_of(fleet, described.specs))
    specs = described.lacking_files_of(absent).first_loaded()
    engine = Engine(described.config, specs, load_turn=turns.turn)
    watchdog.watch(engine)
    engine.start()
    return engine


def _check_device(settings: WorkerSettings, fleet: Fleet) -> None:
    """End the process if its device is not of its pool's class, or cannot do what that asks."""
    if problems := device_misfits(settings, fleet):
        refuse([f"fleet.toml: {problem}" for problem in problems])
    gpu_class = pool_of(settings, fleet).gpu_class
    try:
        name = device_name(settings)
    except RuntimeError as problem:
        if NO_DEVICE not in str(problem):
            raise
        print(f"{settings.device}: {problem}", file=sys.stderr)
        _end_at_once(EX_DEVICE_LOST)
    if not is_of_gpu_class(gpu_class, name):
        refuse(
            [
                f"fleet.toml: pools.{settings.worker_pool}: gpu_class {gpu_class!r} is not in the"
                f" name of this worker's device, {name!r}: correct it, or say by WORKER_CLASS of"
                " which class the worker is"
            ]
        )


def _notice_sources(settings: WorkerSettings, fleet: Fleet) -> list[NoticeSource]:
    """Make the sources of notices; machines that are not rented on the spot market get none.

    An operator's file is watched on every machine.
    """
    market = pool_of(settings, fleet).market
    try:
        sources = sources_from(settings.preemption_notices.replace("{worker}", name_of(settings)))
    except ValueError as error:
        refuse([f"settings: PREEMPTION_NOTICES: {error}"])
    if market == "spot" and not sources:
        log.warning("spot_worker_without_notices", pool=settings.worker_pool)
    return [
        source for source in sources if market in (None, "spot") or isinstance(source, FileNotices)
    ]


def _end_process() -> None:
    """Begin a warm shutdown of Celery."""
    os.kill(os.getpid(), signal.SIGTERM)
