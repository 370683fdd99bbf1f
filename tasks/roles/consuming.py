"""Register tasks, consume queues and answer inspections, for every role that takes tasks."""

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import setup_logging

from edges import telemetry
from fleet.consumer import on_turn, run_worker

# What a worker does for whoever has the broker's password: it tells of itself. Celery would also
# stop, or take other queues. `enable_events` is what Flower says all the time; they are on anyway.
# It also asks for a `heartbeat`.
INSPECTIONS = {
    "active",
    "active_queues",
    "clock",
    "conf",
    "enable_events",
    "heartbeat",
    "ping",
    "query_task",
    "registered",
    "report",
    "reserved",
    "revoked",
    "scheduled",
    "stats",
}


def register(celery: Celery, name: str, act: Callable[..., None]) -> None:
    """Make `act` the task called `name`."""

    def task(**arguments: Any) -> None:
        act(**arguments)

    celery.task(name=name)(task)


def consume(celery: Celery, queues: Sequence[str], *, name: str, threads: int) -> int:
    """Take tasks of `queues` until SIGTERM, which lets running ones end.

    Returns the exit status: 0 only if it was told to end.
    """
    _answer_inspections_only()
    celery.steps["consumer"].add(on_turn(telemetry.loop("consumer")))
    # Celery warns of root because of pickle; only JSON is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # Or Celery sets the root logger's level: LOG_LEVEL is what counts.
    setup_logging.connect(lambda **_: None, weak=False)
    options = [
        "--pool=threads",
        f"--concurrency={threads}",
        f"--queues={','.join(queues)}",
        f"--hostname={name}",
        "--without-mingle",
        "--without-gossip",
        "--loglevel=WARNING",
    ]
    return run_worker(celery, ["--quiet", "worker", *options])


def process_name(role: str) -> str:
    """Name this process for Flower and the audit log."""
    return f"{role}-{os.getpid()}@{socket.gethostname()}"


def _answer_inspections_only() -> None:
    """Forget all remote-control commands but INSPECTIONS. Leans on a private name of Celery."""
    from celery.worker.control import Panel

    for name in Panel.data.keys() - INSPECTIONS:
        del Panel.data[name]
