"""Start one worker process per visible GPU, each with its own only; a CPU worker if there is none.

`python -m fleet.worker`. The launcher never touches CUDA itself. It passes signals on, restarts a
worker that crashed, and ends when all have ended.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from policy.workers import class_key, device_label, name_on_device, worker_name
from settings import EX_CONFIG, WorkerSettings, load

SERVE = [sys.executable, "-m", "tasks.serve", "render"]
BACK_OFF_S = (1, 2, 5, 10, 30)
HEALTHY_AFTER_S = 120
PR_SET_PDEATHSIG = 1  # prctl(2)


def visible_gpus(cuda_visible_devices: str | None) -> list[str]:
    """List ids for CUDA_VISIBLE_DEVICES: the given ones, or all that nvidia-smi lists."""
    if cuda_visible_devices is not None:
        given = [gpu.strip() for gpu in cuda_visible_devices.split(",")]
        return [gpu for gpu in given if gpu not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


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
    gpus = [] if settings.device == "cpu" else visible_gpus(settings.cuda_visible_devices)
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
    return subprocess.Popen(SERVE, env=os.environ | environment, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """Have the kernel end this child with its launcher (Linux only).

    Otherwise the workers of a killed launcher would share their GPUs with a second set.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
