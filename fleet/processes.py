"""List the processes of the one-machine stack, and the variables that each of them is handed.

A process gets the variables that its class in `settings.py` names, and no others: no GPU worker
sees an S3 key, no results worker the pepper of the API keys. Tuning variables of that class
(LOG_LEVEL, SWEEP_EVERY_S …) are taken over from the caller.
"""

import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from pydantic_settings import BaseSettings

from fleet.addresses import as_handed_to
from fleet.supervision import Program
from policy.fleet import Fleet
from policy.workers import CLASS_MARK, worker_name
from settings import (
    EX_CONFIG,
    REPO,
    FlowerSettings,
    GatewayProcessSettings,
    Settings,
    SettingsInvalid,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    read,
)

_KINDS: dict[str, type[BaseSettings]] = {
    "gateway": GatewayProcessSettings,
    "worker": WorkerSettings,
    "flower": FlowerSettings,
    "results": StoreSettings,
    "webhooks": WebhookSettings,
    "sweeper": Settings,
}
_DEFAULTS = {"TORCH_THREADS": "1", "DEVICE": "auto"}
METRICS_STRIDE = 10
FLEET_DIGEST = "FLEET_DIGEST"  # of fleet.toml as it was when the process was started
# Priorities: those that take in work stop first, so that the others can still finish it.
_TAKES_IN_WORK = 90
_FINISHES_IT = 50


def programs(env: Mapping[str, str], fleet: Fleet, *, workers: Mapping[str, int]) -> list[Program]:
    """List what runs on top of the services.

    env: the stack's own variables, which win over the caller's.  workers: how many each pool or
    capacity class gets.
    """
    gunicorn = ["gunicorn", "-c", "deploy/gunicorn.conf.py", "app.wsgi:application"]
    handed = {name: as_handed_to(name, env) for name in _KINDS}
    handed["flower"]["FLOWER_BIND"] = env["FLOWER_URL"].removeprefix("http://")
    own = {name: _only(handed[name], kind) for name, kind in _KINDS.items()}
    # All others follow the fleet's revisions; an edited file makes this one another program.
    own["flower"] |= {name: env[name] for name in (FLEET_DIGEST,) if name in env}
    started = [
        _program("gateway", gunicorn, _TAKES_IN_WORK, 40, own["gateway"]),
        *_workers(handed["worker"], fleet, workers),
        _program("flower", ["tasks.serve", "flower"], _TAKES_IN_WORK, 10, own["flower"]),
        _program("results", ["tasks.serve", "results"], _FINISHES_IT, 30, own["results"]),
        _program("webhooks", ["tasks.serve", "webhooks"], _FINISHES_IT, 20, own["webhooks"]),
        _program("sweeper", ["tasks.serve", "maintenance"], _FINISHES_IT, 20, own["sweeper"]),
    ]
    return [
        _with_a_metrics_port_of_its_own(program, place) for place, program in enumerate(started)
    ]


def _workers(env: Mapping[str, str], fleet: Fleet, workers: Mapping[str, int]) -> Iterator[Program]:
    for name, (group, number) in worker_processes(fleet, workers).items():
        yield _worker(name, _worker_environment(env, group, number))


def worker_processes(fleet: Fleet, workers: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Name the workers' processes, each with its pool or capacity class and its number there.

    workers: how many there are, by pool or capacity class (policy.workers.class_key).
    """
    return {
        f"worker-{number}" if list(fleet.pools) == [group] else f"worker-{group}-{number}": (
            group,
            number,
        )
        for group, count in workers.items()
        for number in range(1, count + 1)
    }


def _with_a_metrics_port_of_its_own(program: Program, place: int) -> Program:
    """Give the process its own METRICS_PORT: METRICS_STRIDE further on for each place in the list.

    The gateway comes first and keeps the port; the GPUs of a worker use the ports between.
    """
    port = int(program.environment.get("METRICS_PORT") or 0)
    if not port or not place:
        return program
    own_port = str(port + place * METRICS_STRIDE)
    return replace(program, environment={**program.environment, "METRICS_PORT": own_port})


def _program(
    name: str,
    module: list[str],
    priority: int,
    stop_wait_s: int,
    environment: Mapping[str, str],
    *,
    final_statuses: Sequence[int] = (),
) -> Program:
    return Program(
        name=name,
        command=[sys.executable, "-m", *module],
        directory=REPO,
        environment={**environment, "PYTHONUNBUFFERED": "1"},
        priority=priority,
        stop_wait_s=stop_wait_s,
        final_statuses=final_statuses,
    )


def _worker(name: str, environment: Mapping[str, str]) -> Program:
    """Make a worker's program: it gets its notice time after SIGTERM, and some for snapshots."""
    stop_wait_s = 45
    with suppress(SettingsInvalid):  # then it will not start, and says why
        notice_s = read(WorkerSettings, environment).shutdown_notice_s
        stop_wait_s = max(45, math.ceil(notice_s) + 25)
    return _program(
        name,
        ["fleet.worker"],
        _TAKES_IN_WORK,
        stop_wait_s,
        environment,
        # It would load for a while only to fail again; `up` starts it, once that is mended.
        final_statuses=(EX_CONFIG,),
    )


def problems(programs: Sequence[Program]) -> list[str]:
    """List what is wrong with the programs' settings; a problem of several is listed once."""
    found: dict[str, None] = {}
    for program in programs:
        try:
            read(_KINDS[program.name.partition("-")[0]], program.environment)
        except SettingsInvalid as error:
            found |= dict.fromkeys(error.problems)
    return list(found)


def _worker_environment(env: Mapping[str, str], group: str, number: int) -> dict[str, str]:
    pool, _, capacity_class = group.partition(CLASS_MARK)
    own = {
        "WORKER_POOL": pool,
        "WORKER_CLASS": capacity_class,
        "WORKER_NAME": name_of_worker(group, number),
    }
    return _only({**env, **own}, WorkerSettings)


def name_of_worker(group: str, number: int) -> str:
    """Return what the stack's worker of that number calls itself.

    group: its pool or capacity class.  With several GPUs each worker puts its device into
    the name.
    """
    return worker_name(group, str(number), socket.gethostname())


def pools_served(fleet: Fleet, env: Mapping[str, str]) -> tuple[str, ...]:
    """List the pools that the stack starts workers for: WORKER_POOL, or all of the file.

    env: the stack's own variables; the caller's win.
    """
    only = os.environ.get("WORKER_POOL") or env.get("WORKER_POOL")
    return (only,) if only else tuple(fleet.pools)


def _only(env: Mapping[str, str], *settings: type[BaseSettings]) -> dict[str, str]:
    """Return the variables that `settings` have fields for.

    From `env`; what is not there may come from the caller's environment.
    """
    names = {field.upper() for kind in settings for field in kind.model_fields}
    offered = {**_DEFAULTS, **os.environ, **env}
    return {name: offered[name] for name in sorted(names) if name in offered}
