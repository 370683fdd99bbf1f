"""The processes of the house on one machine, and which variables each of them is handed.

A process gets the variables that its class in `settings.py` names, and no others: no GPU worker sees an S3 key, no results worker
the pepper of the API keys. Tuning variables of that class (LOG_LEVEL, SWEEP_EVERY_S …) are taken over from the caller.
"""

import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from pydantic_settings import BaseSettings

from fleet.addresses import as_handed_to
from fleet.supervision import Program
from policy.fleet import Fleet
from settings import (
    REPO,
    CourierSettings,
    FlowerSettings,
    GatewayProcessSettings,
    Settings,
    SettingsInvalid,
    StoreSettings,
    WorkerSettings,
    read,
)

_KINDS: dict[str, type[BaseSettings]] = {
    "gateway": GatewayProcessSettings,
    "worker": WorkerSettings,
    "flower": FlowerSettings,
    "results": StoreSettings,
    "webhooks": CourierSettings,
    "sweeper": Settings,
}
_DEFAULTS = {"TORCH_THREADS": "1", "DEVICE": "auto"}
METRICS_STRIDE = 10
_TAKES_IN_WORK, _FINISHES_IT = (
    90,
    50,
)  # priorities: the former stop first, so that the latter still can


def programs(env: Mapping[str, str], fleet: Fleet, *, num_workers: int) -> list[Program]:
    """What runs on top of the services. env: the stack's own variables, which win over the caller's."""
    gunicorn = ["gunicorn", "-c", "deploy/gunicorn.conf.py", "app.wsgi:application"]
    own = {
        name: as_handed_to(name, env)
        for name in ("gateway", "worker", "flower", "results", "webhooks", "sweeper")
    }
    own["flower"]["FLOWER_BIND"] = env["FLOWER_URL"].removeprefix("http://")
    worker_names = [f"worker-{number}" for number in range(1, num_workers + 1)]
    own_names = (
        worker_names if num_workers > 1 else [""] * num_workers
    )  # "" leaves the naming to the launcher
    started = [
        _program(
            "gateway", gunicorn, _TAKES_IN_WORK, 40, _only(own["gateway"], GatewayProcessSettings)
        ),
        *(
            _worker(name, _worker_environment(own["worker"], fleet, own_name))
            for name, own_name in zip(worker_names, own_names, strict=True)
        ),
        _program(
            "flower",
            ["tasks.serve", "flower"],
            _TAKES_IN_WORK,
            10,
            _only(own["flower"], FlowerSettings),
        ),
        _program(
            "results",
            ["tasks.serve", "results"],
            _FINISHES_IT,
            30,
            _only(own["results"], StoreSettings),
        ),
        _program(
            "webhooks",
            ["tasks.serve", "webhooks"],
            _FINISHES_IT,
            20,
            _only(own["webhooks"], CourierSettings),
        ),
        _program(
            "sweeper",
            ["tasks.serve", "maintenance"],
            _FINISHES_IT,
            20,
            _only(own["sweeper"], Settings),
        ),
    ]
    return [
        _with_a_metrics_port_of_its_own(program, place) for place, program in enumerate(started)
    ]


def _with_a_metrics_port_of_its_own(program: Program, place: int) -> Program:
    """METRICS_PORT is the gateway's; each process behind it has the port METRICS_STRIDE further on, the GPUs of a worker those between."""
    port = int(program.environment.get("METRICS_PORT") or 0)
    if not port or not place:
        return program
    return replace(
        program,
        environment={**program.environment, "METRICS_PORT": str(port + place * METRICS_STRIDE)},
    )


def _program(
    name: str, module: list[str], priority: int, stop_wait_s: int, environment: Mapping[str, str]
) -> Program:
    return Program(
        name=name,
        command=[sys.executable, "-m", *module],
        directory=REPO,
        environment={**environment, "PYTHONUNBUFFERED": "1"},
        priority=priority,
        stop_wait_s=stop_wait_s,
    )


def _worker(name: str, environment: Mapping[str, str]) -> Program:
    """A worker is given the time that it was promised on SIGTERM, and some to put its snapshots away."""
    with suppress(SettingsInvalid):  # then it will not start, and says why
        notice_s = read(WorkerSettings, environment).shutdown_notice_s
        return _program(
            name, ["fleet.worker"], _TAKES_IN_WORK, max(45, math.ceil(notice_s) + 25), environment
        )
    return _program(name, ["fleet.worker"], _TAKES_IN_WORK, 45, environment)


def problems(programs: Sequence[Program]) -> list[str]:
    """What is wrong with the settings that these are handed, once for all whom it concerns."""
    found: dict[str, None] = {}
    for program in programs:
        try:
            read(_KINDS[program.name.partition("-")[0]], program.environment)
        except SettingsInvalid as error:
            found |= dict.fromkeys(error.problems)
    return list(found)


def _worker_environment(env: Mapping[str, str], fleet: Fleet, name: str) -> dict[str, str]:
    own = {
        "WORKER_POOL": worker_pool(fleet),
        "WORKER_NAME": name and f"{name}@{socket.gethostname()}",
    }
    return _only({**env, **own}, WorkerSettings)


def worker_pool(fleet: Fleet) -> str:
    """The pool of the stack's workers: what the caller says, or the first of the file."""
    return os.environ.get("WORKER_POOL") or next(iter(fleet.pools))


def _only(env: Mapping[str, str], *settings: type[BaseSettings]) -> dict[str, str]:
    """The part of `env` that `settings` have fields for; what is not in `env` may come from the caller's environment."""
    names = {field.upper() for kind in settings for field in kind.model_fields}
    offered = {**_DEFAULTS, **os.environ, **env}
    return {name: offered[name] for name in sorted(names) if name in offered}
