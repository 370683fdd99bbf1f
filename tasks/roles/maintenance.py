"""Run the sweeper at intervals; several processes may.

It takes no tasks from the broker, so it also works while the broker is away.
"""

import signal
import threading
from collections.abc import Callable

import structlog

from dispatch.endings import EndedJobs
from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker
from edges.handoff import Gauge
from models.database import make_engine
from policy import connections
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from settings import Settings
from tasks.roles.following import following
from tasks.sweep import Sweeper, SweepLoop

log = structlog.get_logger(__name__)


def _nothing() -> None:
    """Do nothing."""


def build(
    settings: Settings, fleet: Fleet | CurrentFleet, *, on_turn: Callable[[], None] = _nothing
) -> Sweeper:
    """Make the sweeper. on_turn: called at every step of a pass."""
    database = make_engine(settings.database_url, pool_size=connections.SWEEPER)
    followed = current(fleet)
    broker = Broker(settings, followed)
    ended = EndedJobs.connect(settings.handoff_url, ttl_s=settings.handoff_ttl_s)
    return Sweeper(
        settings=settings,
        current=followed,
        database=database,
        broker=broker,
        release=Release(database, broker, followed, worker_silence_s=settings.lease_ttl_s),
        handoff=ended.handoff,
        snapshots=ended.snapshots,
        inputs=ended.inputs,
        ended=ended,
        fill=Gauge(settings.handoff_url).fill,
        on_turn=on_turn,
    )


def serve(settings: Settings, fleet: CurrentFleet) -> int:
    """Sweep until told to end; the pass under way may end first."""
    ends = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ends.set())
    on_turn = telemetry.loop("sweep")
    sweeper = build(settings, fleet, on_turn=on_turn)
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    log.info("database_connections", at_most=connections.at_most("sweeper"))
    loop = SweepLoop(sweeper.sweep, every_s=settings.sweep_every_s, on_turn=on_turn)
    with following(settings, fleet, sweeper.database):
        loop.start()
        ends.wait()
        loop.stop()
    return 0
