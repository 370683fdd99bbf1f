"""Start one worker process per usable GPU, each with its own only.

`python -m fleet.worker`. A host without GPUs, or DEVICE=cpu, has one worker on the CPU. A host with
GPUs of which none can be used has none: the launcher says why, and ends with EX_CONFIG.

The launcher never touches CUDA itself. It passes signals on, restarts a worker that crashed, and
ends when all have ended. A GPU that was lost twice is quarantined: it gets no worker until an
operator releases it (fleet/quarantine.py).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from fleet.cores import cores_near
from fleet.gpus import NoUsableGpu, gpus_to_use
from fleet.quarantine import Quarantine
from models.quarantine import Loss
from policy.workers import class_key, device_key, device_label, name_on_device, worker_name
from settings import EX_CONFIG, EX_DEVICE_LOST, WorkerSettings, load, refuse

SERVE = [sys.executable, "-m", "tasks.serve", "render"]
NO_CORES: Mapping[str, frozenset[int]] = MappingProxyType({})
BACK_OFF_S = (1, 2, 5, 10, 30)
HEALTHY_AFTER_S = 120
PR_SET_PDEATHSIG = 1  # prctl(2)
PRCTL = ctypes.CDLL(None).prctl  # looked up here: a child of a process with threads must not
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
    devices = [device_key(gpu, socket.gethostname()) for gpu in gpus]
    quarantine = Quarantine(settings.database_url, devices)
    quarantine.start()
    cores = cores_near(gpus)
    launcher = Launcher(environments(settings, gpus), settings, quarantine, cores)
    status = launcher.run()
    quarantine.close()
    sys.exit(status)


@dataclass
class _Child:
    environment: dict[str, str]
    device: str  # among those of all hosts
    cores: frozenset[int]  # on which it runs; none: on any
    process: subprocess.Popen[bytes] | None = None  # None: none was started yet
    started_at: float = 0.0
    crashes: int = 0
    again_at: float | None = 0.0  # when one is started; None: it runs, or has just ended
    is_over: bool = False  # it is not started again
    was_told: bool = False  # that the device is quarantined

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def status(self) -> int | None:
        """Return the exit status; None while it runs, and where none was started."""
        return self.process.poll() if self.process is not None else None


class Launcher:
    """Keep one process alive per environment until told to stop."""

    def __init__(
        self,
        environments: list[dict[str, str]],
        settings: WorkerSettings,
        quarantine: Quarantine,
        cores: Mapping[str, frozenset[int]] = NO_CORES,
    ) -> None:
        """cores: on which each GPU's process runs; one that is not there runs on any."""
        self._stopping = False
        self._settings = settings
        self._quarantine = quarantine
        host = socket.gethostname()
        self._children = [
            _Child(
                environment=each,
                device=device_key(each["CUDA_VISIBLE_DEVICES"], host),
                cores=cores.get(each["CUDA_VISIBLE_DEVICES"], frozenset()),
            )
            for each in environments
        ]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Return when every child has ended for good: 0 if they were told to end and had no error.

        A child that ends with EX_CONFIG is not started again: it can load nothing, or its name is
        taken. The others go on; EX_CONFIG if there is no other.
        """
        children = self._children
        while not all(child.is_over for child in children):
            for child in children:
                self._look_after(child)
            time.sleep(0.2)
        if all(child.status == EX_CONFIG for child in children):
            return EX_CONFIG
        as_told = (None, 0, -signal.SIGTERM, -signal.SIGINT)
        all_as_told = all(child.status in as_told for child in children)
        return 0 if self._stopping and all_as_told else 1

    def _look_after(self, child: _Child) -> None:
        if child.is_over or child.is_running:
            return
        now = time.monotonic()
        if child.again_at is None:
            self._note_end(child, now)
        elif self._stopping:
            child.is_over = True
        elif now >= child.again_at and self._quarantine.may_start(child.device):
            child.process = _spawn(child.environment, child.cores)
            child.started_at = now
            child.again_at = None
            child.was_told = False
        elif not child.was_told and self._quarantine.is_quarantined(child.device):
            child.was_told = True
            print(
                f"device {child.device} was lost twice, and no worker is started on it; repair it,"
                f" then: darkroom workers release {child.device}",
                file=sys.stderr,
            )

    def _note_end(self, child: _Child, now: float) -> None:
        """Have a worker that has ended started again, unless that would be in vain."""
        if child.status == EX_DEVICE_LOST:
            self._note_loss(child)
        if child.status == EX_CONFIG or self._stopping:
            child.is_over = True
            return
        child.crashes = 0 if now - child.started_at > HEALTHY_AFTER_S else child.crashes + 1
        wait_s = BACK_OFF_S[max(0, min(child.crashes, len(BACK_OFF_S)) - 1)]
        name = child.environment["WORKER_NAME"]
        print(f"worker {name} ended ({child.status}); again in {wait_s} s", file=sys.stderr)
        child.again_at = now + wait_s

    def _note_loss(self, child: _Child) -> None:
        assert child.process is not None, "it has ended"
        self._quarantine.note_loss(
            Loss(
                device=child.device,
                worker=child.environment["WORKER_NAME"],
                pool=self._settings.worker_pool,
                capacity_class=self._settings.worker_class,
                host=socket.gethostname(),
                pid=child.process.pid,
            )
        )

    def _pass_on(self, number: int, frame: Any) -> None:
        del frame
        self._stopping = True
        for child in self._children:
            if child.process is not None and child.is_running:
                child.process.send_signal(number)


def _spawn(environment: dict[str, str], cores: frozenset[int]) -> subprocess.Popen[bytes]:
    environment = ALLOCATOR | os.environ | environment
    return subprocess.Popen(SERVE, env=environment, preexec_fn=partial(_begin_child, cores))


def _begin_child(cores: frozenset[int]) -> None:
    """Have the kernel run this child on these cores, and end it with its launcher (Linux only).

    Otherwise the workers of a killed launcher would share their GPUs with a second set.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
