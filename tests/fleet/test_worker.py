"""The launcher: one process per visible GPU, each pinned to its own, started again when it crashes,
ended with the launcher.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleet import worker
from settings import EX_CONFIG, REPO

TOLD = (
    "CUDA_VISIBLE_DEVICES",
    "WORKER_NAME",
    "DEVICE",
    "METRICS_PORT",
    "PYTORCH_ALLOC_CONF",
)
# One write a line: two children share the log, and an unbuffered print writes line and end apart.
CHILD = (
    "import json, os, sys, time; "
    f"line = json.dumps({{k: os.environ.get(k) for k in {TOLD}}}) + chr(10); "
    "os.write(1, line.encode()); time.sleep(60)"
)


DRIVER_DOWN = """
echo "Failed to initialize NVML: Driver/library version mismatch"
exit 18
"""
ONE_LOST = """
echo "GPU 0: NVIDIA H200 (UUID: GPU-aaaaaaaa)"
echo "Unable to determine the device handle for gpu 0000:3B:00.0: Unknown Error"
echo "GPU 2: NVIDIA H200 (UUID: GPU-cccccccc)"
exit 15
"""
ALL = {"CUDA_VISIBLE_DEVICES": None}


def nvidia_smi(folder: Path, program: str) -> str:
    """Write a program of that name; return a PATH on which it comes first."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "nvidia-smi").write_text(f"#!/bin/sh\n{program}")
    (bin_folder / "nvidia-smi").chmod(0o755)
    return f"{bin_folder}:{os.environ['PATH']}"


@pytest.fixture
def launcher(tmp_path):
    """The launcher with two GPUs and a child that only tells what it was given."""
    with launched(tmp_path, CHILD) as process:
        yield process, tmp_path / "log"


@contextlib.contextmanager
def launched(tmp_path, child, *, first="", **variables):
    """A launcher of workers that are this child. first: a program's text that comes before."""
    program = (
        f"{first}import sys; from fleet import worker; "
        f"worker.SERVE = [sys.executable, '-c', {child!r}]; worker.main()"
    )
    needed = {
        "DATABASE_URL": "postgresql://x",
        "BROKER_URL": "redis://x/0",
        "HANDOFF_URL": "redis://x/1",
    }
    given = {"CUDA_VISIBLE_DEVICES": "0,1", "WORKER_NAME": "gpu@here"} | variables
    environment = os.environ | needed | given
    environment = {name: value for name, value in environment.items() if value is not None}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=REPO, env=environment, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def told(log: Path, count: int) -> list[dict]:
    deadline = time.monotonic() + 60
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

    assert sorted(
        (line["CUDA_VISIBLE_DEVICES"], line["WORKER_NAME"], line["DEVICE"]) for line in lines
    ) == [
        ("0", "gpu-gpu0@here", "cuda:0"),
        ("1", "gpu-gpu1@here", "cuda:0"),
    ]


def test_each_gpu_has_a_port_for_metrics_of_its_own(tmp_path):
    with launched(tmp_path, CHILD, METRICS_PORT="9400"):
        lines = told(tmp_path / "log", 2)

    assert sorted((line["WORKER_NAME"], line["METRICS_PORT"]) for line in lines) == [
        ("gpu-gpu0@here", "9400"),
        ("gpu-gpu1@here", "9401"),
    ]


@pytest.mark.parametrize(
    ("settings", "gpus", "names"),
    [
        ({}, ["2", "3"], ["edit-gpu2@HOST", "edit-gpu3@HOST"]),
        ({}, ["GPU-8F6E2A1C-0000-4000-8000-0123456789AB"], ["edit-gpu-8f6e2a1c@HOST"]),
        ({}, ["MIG-GPU-8f6e2a1c/1/0"], ["edit-mig-gpu-8f6e2a1c-1-0@HOST"]),
        ({"worker_class": "spot"}, ["2"], ["edit.spot-gpu2@HOST"]),
        ({"worker_name": "mine@here"}, ["2"], ["mine@here"]),
        ({"worker_name": "mine@here"}, ["0", "2"], ["mine-gpu0@here", "mine-gpu2@here"]),
    ],
)
def test_launcher_names_workers_by_pool_device_and_host_unless_it_is_told_a_name(
    settings, gpus, names
):
    unset = {"worker_name": "", "worker_pool": "edit", "worker_class": "", "metrics_port": 0}
    given = SimpleNamespace(**unset | settings)

    found = [each["WORKER_NAME"] for each in worker.environments(given, gpus)]

    assert found == [name.replace("HOST", socket.gethostname()) for name in names]


def test_launchers_that_divide_the_gpus_of_a_host_share_no_name_and_no_port():
    given = SimpleNamespace(worker_name="", worker_pool="local", worker_class="", metrics_port=9400)

    first = worker.environments(given, ["0", "1"])
    second = worker.environments(given, ["2", "3"])

    for variable in ("WORKER_NAME", "METRICS_PORT"):
        assert len({each[variable] for each in [*first, *second]}) == 4


@pytest.mark.parametrize(
    ("given", "told_to_workers"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
    ],
)
def test_workers_on_gpus_have_an_allocator_whose_segments_grow_unless_told_otherwise(
    tmp_path, given, told_to_workers
):
    with launched(tmp_path, CHILD, **given):
        lines = told(tmp_path / "log", 2)

    assert {line["PYTORCH_ALLOC_CONF"] for line in lines} == {told_to_workers}


def test_a_launcher_on_a_host_whose_gpus_are_all_lost_ends_and_says_what_nvidia_smi_says(tmp_path):
    with launched(tmp_path, CHILD, PATH=nvidia_smi(tmp_path, DRIVER_DOWN), **ALL) as process:
        assert process.wait(timeout=60) == EX_CONFIG

    said = (tmp_path / "log").read_text()
    assert said == (
        "settings: DEVICE: no GPU can be used: nvidia-smi says: Failed to initialize NVML: "
        "Driver/library version mismatch. Repair the driver, or set DEVICE=cpu to have a worker on "
        "the CPU\n"
    )


def test_a_lost_gpu_costs_its_own_worker_alone_and_is_told(tmp_path):
    with launched(tmp_path, CHILD, PATH=nvidia_smi(tmp_path, ONE_LOST), **ALL):
        lines = told(tmp_path / "log", 2)

    assert {line["CUDA_VISIBLE_DEVICES"] for line in lines} == {"GPU-aaaaaaaa", "GPU-cccccccc"}
    said = (tmp_path / "log").read_text()
    assert "warning: nvidia-smi says: Unable to determine the device handle for gpu 0000:3B" in said


def test_a_machine_without_gpus_gets_one_worker_on_the_cpu_in_the_launcher_s_place(tmp_path):
    with launched(tmp_path, CHILD, CUDA_VISIBLE_DEVICES="", WORKER_NAME="") as process:
        [line] = told(tmp_path / "log", 1)

        assert (line["DEVICE"], line["WORKER_NAME"]) == ("cpu", f"local-cpu@{socket.gethostname()}")
        assert children_of(process.pid) == []


def test_launcher_ends_with_the_status_of_its_workers_when_all_refuse_to_start(tmp_path):
    refuses = f"import sys; sys.exit({EX_CONFIG})"

    with launched(tmp_path, refuses) as process:
        assert process.wait(timeout=60) == EX_CONFIG

    assert "again in" not in (tmp_path / "log").read_text()


def test_launcher_goes_on_with_the_other_workers_when_one_refuses_to_start(tmp_path):
    refuses = f"os.environ['CUDA_VISIBLE_DEVICES'] != '0' or sys.exit({EX_CONFIG})"
    first_refuses = f"import os, sys; {refuses}; {CHILD}"

    with launched(tmp_path, first_refuses) as process:
        [line] = told(tmp_path / "log", 1)
        time.sleep(1)

        assert (line["CUDA_VISIBLE_DEVICES"], process.poll()) == ("1", None)
        assert len(children_of(process.pid)) == 1, "it is not started again"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0


def test_crashes_in_a_row_are_answered_with_longer_waits_until_a_worker_was_healthy(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_spawn", lambda *_: SimpleNamespace(poll=lambda: 1, returncode=1))
    environment = {"WORKER_NAME": "gpu-gpu0@here", "CUDA_VISIBLE_DEVICES": "0"}
    anything = SimpleNamespace(may_start=lambda device: True)
    launcher = worker.Launcher([environment], SimpleNamespace(), anything)
    [child] = launcher._children
    launcher._look_after(child)
    waits = []

    for lived_s in [5, 5, 5, 5, 5, 5, worker.HEALTHY_AFTER_S + 1, 5]:
        now += lived_s
        launcher._look_after(child)
        waits.append(child.again_at - now)
        now = child.again_at
        launcher._look_after(child)

    assert waits == [1, 2, 5, 10, 30, 30, 1, 1]


def test_a_crashed_worker_is_started_again_and_a_stop_ends_all(launcher):
    process, log = launcher
    told(log, 2)

    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    assert len(told(log, 3)) == 3

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_launcher_says_by_its_exit_status_that_a_worker_ended_in_an_error(tmp_path):
    fails = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(70)); "
        "print('{}', flush=True); time.sleep(60)"
    )
    with launched(tmp_path, fails) as process:
        told(tmp_path / "log", 2)

        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=60) == 1


def test_a_killed_launcher_takes_its_workers_along(launcher):
    process, log = launcher
    told(log, 2)
    children = children_of(process.pid)

    process.kill()
    process.wait()

    deadline = time.monotonic() + 60
    while any(
        Path(f"/proc/{child}").exists()
        and "State:\tZ" not in Path(f"/proc/{child}/status").read_text()
        for child in children
    ):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
