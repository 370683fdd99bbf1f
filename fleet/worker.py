"""Start one worker process per usable GPU, each with its own only.

`python -m fleet.worker`. A host without GPUs, or DEVICE=cpu, has one worker on the CPU. A host with
GPUs of which none can be used has none: the launcher says why, and ends with EX_CONFIG.

The launcher never touches CUDA itself. It passes signals on, restarts a worker that crashed, and
ends when all have ended.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fleet.gpus import NoUsableGpu, gpus_to_use
from policy.workers import class_key, device_label, name_on_device, worker_name
from settings import EX_CONFIG, WorkerSettings, load, refuse

SERVE = [sys.executable, "-m", "tasks.serve", "render"]
BACK_OFF_S = (1, 2, 5, 10, 30)
HEALTHY_AFTER_S = 120
PR_SET_PDEATHSIG = 1  # prctl(2)
# Torch's own variable, unless the launcher was given another value: many sizes, row counts and two
# streams fragment segments that cannot grow.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def environments(settings: WorkerSettings, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Give the variables of each GPU's process: its own device, a name and a port of its own."""
    host = socket.gethostname()
    pool = class_key(settings.worker_pool, settings.worker_class)
    found = []
    for place, gpu in enumerate(gpus):
        label = device_label(gpu)
        if not settings.worker_name:
            name = worker_name(pool, label, host)
        elif len(gpus) == 1:
            name = settings.worker_name
        else:
            name = name_on_device(settings.worker_name, label)
        environment = {"CUDA_VISIBLE_DEVICES": gpu, "WORKER_NAME": name, "DEVICE": "cuda:0"}
        if settings.metrics_port:
            # By the device's own number where it is known: another launcher has other devices.
            offset = int(gpu) if gpu.isdigit() else place
            environment["METRICS_PORT"] = str(settings.metrics_port + offset)
        found.append(environment)
    return found


def main() -> None:
    settings = load(WorkerSettings)
    try:
        gpus, warnings = gpus_to_use(settings.device, settings.cuda_visible_devices)
    except NoUsableGpu as reason:
        refuse([f"settings: DEVICE: {reason}"])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not gpus:
        pool = class_key(settings.worker_pool, settings.worker_class)
        name = settings.worker_name or worker_name(pool, "cpu", socket.gethostname())
        os.execve(SERVE[0], SERVE, os.environ | {"WORKER_NAME": name, "DEVICE": "cpu"})
    sys.exit(Launcher(environments(settings, gpus)).run())


@dataclass
class _Child:
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    started_at: float
    crashes: int = 0
    again_at: float | None = field(default=None)


class Launcher:
    """Keep one process alive per environment until told to stop."""

    def __init__(self, environments: list[dict[str, str]]) -> None:
        self._stopping = False
        self._children = [_Child(env, _spawn(env), time.monotonic()) for env in environments]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Return when every child has ended for good: 0 if they were told to end and had no error.

        A child that ends with EX_CONFIG is not started again: it can load nothing, or its name is
        taken. The others go on; EX_CONFIG if there is no other.
        """
        children = self._children
        while any(c.process.poll() is None or c.again_at is not None for c in children):
            for child in children:
                self._look_after(child)
            time.sleep(0.2)
        if all(child.process.returncode == EX_CONFIG for child in children):
            return EX_CONFIG
        as_told = (0, -signal.SIGTERM, -signal.SIGINT)
        all_as_told = all(child.process.returncode in as_told for child in children)
        return 0 if self._stopping and all_as_told else 1

    def _look_after(self, child: _Child) -> None:
        now = time.monotonic()
        if child.again_at is not None:
            if self._stopping:
                child.again_at = None
            elif now >= child.again_at:
                child.process = _spawn(child.environment)
                child.started_at = now
                child.again_at = None
        elif child.process.poll() == EX_CONFIG:
            return
        elif child.process.poll() is not None and not self._stopping:
            child.crashes = 0 if now - child.started_at > HEALTHY_AFTER_S else child.crashes + 1
            wait_s = BACK_OFF_S[max(0, min(child.crashes, len(BACK_OFF_S)) - 1)]
            name = child.environment["WORKER_NAME"]
            status = child.process.returncode
            print(f"worker {name} ended ({status}); again in {wait_s} s", file=sys.stderr)
            child.again_at = now + wait_s

    def _pass_on(self, number: int, frame: Any) -> None:
        del frame
        self._stopping = True
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(number)


def _spawn(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = ALLOCATOR | os.environ | environment
    return subprocess.Popen(SERVE, env=environment, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """Have the kernel end this child with its launcher (Linux only).

    Otherwise the workers of a killed launcher would share their GPUs with a second set.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
