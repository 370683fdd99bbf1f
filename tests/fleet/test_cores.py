"""On which cores a GPU's worker runs: those of the GPU's NUMA node, by a sysfs that is made up."""

import os

import pytest

from fleet import cores
from fleet.cores import cores_near, parse_cores
from tests.fleet.test_worker import launched, nvidia_smi, told

FIRST, SECOND = (
    "GPU-aaaaaaaa-0000-4000-8000-000000000000",
    "GPU-bbbbbbbb-0000-4000-8000-000000000000",
)
INSTANCE = "MIG-11111111-0000-4000-8000-000000000000"
SMI = f"""
if [ "$1" = -L ]; then
    echo "GPU 0: NVIDIA H200 (UUID: {FIRST})"
    echo "GPU 1: NVIDIA H200 (UUID: {SECOND})"
    echo "  MIG 3g.71gb     Device  0: (UUID: {INSTANCE})"
else
    echo "0, {FIRST}, 00000000:3B:00.0"
    echo "1, {SECOND}, 00000000:B1:00.0"
fi
"""
MINE = sorted(os.sched_getaffinity(0))


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with two GPUs; a function says what it tells of each, by its place on the bus."""
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, SMI))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(cores, "SYSFS", tmp_path / "sys")

    def says(place, numa_node, local_cpulist):
        folder = tmp_path / "sys/bus/pci/devices" / place
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{numa_node}\n")
        (folder / "local_cpulist").write_text(f"{local_cpulist}\n")

    return says


@pytest.mark.parametrize(
    ("listed", "found"),
    [("0-2,64-65", {0, 1, 2, 64, 65}), ("7", {7}), ("", set())],
)
def test_lists_of_cores_are_read_as_the_kernel_writes_them(listed, found):
    assert parse_cores(listed) == found


def test_a_gpu_and_an_instance_of_one_have_the_cores_of_their_card_s_node(host):
    host("0000:3b:00.0", 0, f"{MINE[0]},100000")
    host("0000:b1:00.0", 1, f"{MINE[-1]}")

    found = cores_near([FIRST, INSTANCE])

    assert found == {FIRST: {MINE[0]}, INSTANCE: {MINE[-1]}}, "and no core that is not ours"


@pytest.mark.parametrize(
    ("numa_node", "listed"), [(-1, f"{MINE[0]}"), (0, "100000"), (0, "nonsense"), ("", "0")]
)
def test_a_gpu_whose_cores_are_not_known_or_not_ours_runs_on_any(host, numa_node, listed):
    host("0000:3b:00.0", numa_node, listed)

    assert cores_near([FIRST, SECOND, "MIG-none"]) == {}


def test_an_index_is_a_gpu_s_only_where_cuda_counts_as_nvidia_smi_does(host):
    host("0000:3b:00.0", 0, f"{MINE[0]}")

    assert cores_near(["0"]) == {}
    assert cores_near(["0"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == {"0": {MINE[0]}}


def test_a_host_without_nvidia_smi_runs_workers_on_any_core(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert cores_near(["0"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == {}


def test_a_worker_runs_on_the_cores_near_its_gpu(host, tmp_path):
    host("0000:3b:00.0", 0, f"{MINE[0]}")
    child = (
        "import json, os, time; "
        "line = json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], sorted(os.sched_getaffinity(0))]);"
        "os.write(1, f'{{\"at\": {line}}}\\n'.encode()); time.sleep(60)"
    )
    sysfs = f"from fleet import cores; cores.SYSFS = cores.Path({str(tmp_path / 'sys')!r}); "

    gpus = {"CUDA_VISIBLE_DEVICES": f"{FIRST},{SECOND}", "PATH": os.environ["PATH"]}
    with launched(tmp_path, child, first=sysfs, **gpus):
        lines = told(tmp_path / "log", 2)

    assert dict(line["at"] for line in lines) == {FIRST: MINE[:1], SECOND: MINE}
