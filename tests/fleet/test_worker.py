"""The launcher: one process per visible GPU, each pinned to its own, started again when it crashes, ended with the launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleet import worker
from settings import REPO

CHILD = "import json, os, sys, time; print(json.dumps({k: os.environ.get(k) for k in ('CUDA_VISIBLE_DEVICES', 'WORKER_NAME', 'DEVICE')})"
CHILD += ", flush=True); time.sleep(60)"


@pytest.mark.parametrize(("given", "gpus"), [("0,2", ["0", "2"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("", []), ("-1", [])])
def test_the_visible_gpus_are_those_that_cuda_was_told_of(given, gpus):
    assert worker.visible_gpus(given) == gpus


@pytest.fixture
def launcher(tmp_path):
    """The launcher with two GPUs and a child that only tells what it was given."""
    with launched(tmp_path, CHILD) as process:
        yield process, tmp_path / "log"


@contextlib.contextmanager
def launched(tmp_path, child):
    program = f"import sys; from fleet import worker; worker.SERVE = [sys.executable, '-c', {child!r}]; worker.main()"
    needed = {"DATABASE_URL": "postgresql://x", "BROKER_URL": "redis://x/0", "HANDOFF_URL": "redis://x/1"}
    environment = os.environ | needed | {"CUDA_VISIBLE_DEVICES": "0,1", "WORKER_NAME": "gpu@here"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, env=environment, stdout=log, stderr=log)
    yield process
    process.kill()
    process.wait()


def told(log: Path, count: int) -> list[dict]:
    deadline = time.monotonic() + 30
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        if len(lines) >= count:
            return lines
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_each_gpu_gets_a_process_that_sees_it_alone(launcher):
    _, log = launcher

    lines = told(log, 2)

    assert sorted((line["CUDA_VISIBLE_DEVICES"], line["WORKER_NAME"], line["DEVICE"]) for line in lines) == [
        ("0", "gpu0@here", "cuda:0"),
        ("1", "gpu1@here", "cuda:0"),
    ]


def test_a_crashed_worker_is_started_again_and_a_stop_ends_all(launcher):
    process, log = launcher
    told(log, 2)

    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    assert len(told(log, 3)) == 3

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def test_a_launcher_says_by_its_exit_status_that_a_worker_ended_in_an_error(tmp_path):
    fails = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(70)); print('{}', flush=True); time.sleep(60)"
    with launched(tmp_path, fails) as process:
        told(tmp_path / "log", 2)

        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=10) == 1


def test_a_killed_launcher_takes_its_workers_along(launcher):
    process, log = launcher
    told(log, 2)
    children = children_of(process.pid)

    process.kill()
    process.wait()

    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text() for child in children):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
