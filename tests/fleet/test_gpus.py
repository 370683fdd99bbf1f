"""Which GPUs of a host get a worker, and when a host with GPUs has none."""

import pytest

from fleet import gpus
from fleet.gpus import NoUsableGpu, gpus_to_use, parse_listed

DIVIDED = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaaaaaa-0000-4000-8000-000000000000)
  MIG 3g.71gb     Device  0: (UUID: MIG-11111111-0000-4000-8000-000000000000)
  MIG 3g.71gb     Device  1: (UUID: MIG-22222222-0000-4000-8000-000000000000)
GPU 1: NVIDIA H200 (UUID: GPU-bbbbbbbb-0000-4000-8000-000000000000)
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [("0,2", ["0", "2"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("", []), ("-1", [])],
)
def test_visible_gpus_are_those_that_cuda_was_told_of(given, found):
    assert gpus_to_use("auto", given) == (found, [])


def test_a_gpu_that_is_divided_gives_its_instances_and_another_one_itself():
    found, others = parse_listed(DIVIDED)

    assert [uuid[:12] for uuid in found] == ["MIG-11111111", "MIG-22222222", "GPU-bbbbbbbb"]
    assert others == []


def test_the_cpu_is_taken_where_it_is_asked_for_whatever_gpus_there_are(monkeypatch):
    monkeypatch.setattr(gpus, "_listed", lambda: (["GPU-a"], []))

    assert gpus_to_use("cpu", None) == ([], [])
    assert gpus_to_use("cpu", "0") == ([], [])


def test_a_host_without_gpus_has_a_worker_on_the_cpu_unless_a_gpu_is_asked_for(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert gpus_to_use("auto", None, dev=tmp_path) == ([], [])
    with pytest.raises(NoUsableGpu, match="nvidia-smi is not there or lists no GPU"):
        gpus_to_use("cuda", None, dev=tmp_path)
    with pytest.raises(NoUsableGpu, match="CUDA_VISIBLE_DEVICES names no GPU"):
        gpus_to_use("cuda:0", "", dev=tmp_path)


def test_a_host_with_device_files_and_no_nvidia_smi_is_no_host_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidiactl").touch()
    assert gpus_to_use("auto", None, dev=tmp_path) == ([], [])
    (tmp_path / "nvidia0").touch()

    with pytest.raises(NoUsableGpu, match="set DEVICE=cpu"):
        gpus_to_use("auto", None, dev=tmp_path)


@pytest.mark.parametrize(("device", "found"), [("cuda", ["3", "5"]), ("cuda:1", ["5"])])
def test_device_numbers_one_of_the_visible_gpus(device, found):
    assert gpus_to_use(device, "3,5") == (found, [])


def test_a_number_beyond_the_visible_gpus_is_refused():
    with pytest.raises(NoUsableGpu, match="DEVICE is cuda:2, and 2 GPUs are visible"):
        gpus_to_use("cuda:2", "3,5")


def test_nvidia_smi_that_hangs_is_told(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(gpus, "NVIDIA_SMI_WITHIN_S", 0.2)

    with pytest.raises(NoUsableGpu, match=r"did not answer within 0\.2 s"):
        gpus_to_use("auto", None)
