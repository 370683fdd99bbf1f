"""A GPU's memory is divided by all that takes it: weights, rows, recordings, workspaces, a margin.

The meters of a GPU are stand-ins; who reads them is not.
"""

import logging

import pytest
import torch
from engine_builders import a_request, a_spec, reproducible

from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import OutOfDeviceMemory, UnsupportedRequest

GIB = 1 << 30
MIB = 1 << 20


def a_segment(pool: tuple[int, int], total: int, allocated: int, device: int = 0) -> dict:
    return {
        "device": device,
        "segment_pool_id": pool,
        "total_size": total,
        "allocated_size": allocated,
    }


@pytest.fixture
def gpu(monkeypatch):
    """Give a function that sets a GPU's meters and returns the device."""

    def with_meters(*, free=0, reserved=0, allocated=0, segments=(), capability=(9, 0)) -> Device:
        meters = {
            "mem_get_info": (free, 80 * GIB),
            "memory_reserved": reserved,
            "memory_allocated": allocated,
            "memory_snapshot": list(segments),
            "get_device_capability": capability,
        }
        for name, value in meters.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        return Device("cuda:0", num_threads=1)

    return with_meters


def test_a_margin_of_a_share_and_of_a_gibibyte_at_least_stays_free(gpu):
    assert gpu(free=60 * GIB, reserved=20 * GIB).memory_budget_bytes() == int(80 * GIB * 0.92)
    assert gpu(free=6 * GIB, reserved=2 * GIB).memory_budget_bytes() == 7 * GIB


def test_memory_of_recorded_forwards_is_free_for_nobody_else(gpu):
    segments = [
        a_segment((0, 0), 900, 100),
        a_segment((0, 7), 500, 50),
        a_segment((0, 8), 300, 300),
        a_segment((0, 7), 4000, 0, device=1),
    ]

    device = gpu(free=60 * GIB, reserved=20 * GIB, allocated=GIB, segments=segments)

    assert device.recorded_bytes() == 450
    assert device.free_bytes() == int(80 * GIB * 0.92) - GIB - 450


@pytest.mark.parametrize(
    ("told", "capability", "size_bytes"),
    [
        ("", (9, 0), 32 * MIB),
        ("", (8, 6), 8 * MIB + 128 * 1024),
        (":4096:2:16:8", (9, 0), 8 * MIB + 128 * 1024),
    ],
)
def test_a_thread_that_computes_keeps_a_workspace(gpu, told, capability, size_bytes):
    device = gpu(capability=capability)
    device.blas_workspaces = (told, "")

    assert device.thread_bytes() == size_bytes


def test_a_cpu_keeps_nothing_for_recordings_and_threads():
    device = Device("cpu", num_threads=1)

    assert (device.recorded_bytes(), device.thread_bytes()) == (0, 0)


def test_sums_in_half_precision_are_refused_by_name_on_a_cpu():
    with pytest.raises(UnsupportedRequest, match="is for GPUs, and the device is 'cpu'") as refused:
        Device("cpu", num_threads=1, fp16_accumulation=True)
    assert refused.value.field == "fp16_accumulation"


# --- in an engine ---


@pytest.fixture
def engine(checkpoint):
    with Engine(EngineConfig(max_batch_rows=8), [a_spec(checkpoint)]) as engine:
        yield engine


def test_rows_leave_the_memory_that_a_recording_in_service_keeps(engine, monkeypatch):
    loop = engine._loop
    loop._memory_bytes = 100 * GIB
    monkeypatch.setattr(loop._device, "recorded_bytes", lambda: 3 * GIB)
    weights_bytes = engine.weights_bytes("tiny")

    loop._device.recordings += 1
    engine.submit(a_request("a", num_steps=2)).result(60)

    assert engine._scheduler.memory_budget_bytes == 97 * GIB - weights_bytes


def test_images_whose_pipelines_are_called_leave_a_workspace_for_each_thread(engine, monkeypatch):
    loop = engine._loop
    loop._memory_bytes = 100 * GIB
    monkeypatch.setattr(loop._device, "thread_bytes", lambda: 32 * MIB)
    monkeypatch.setattr(engine._checkpoints["tiny"].family, "follows_stream", False)
    threads = engine.config.max_inflight

    loop._device.recordings += 1
    engine.submit(a_request("a", num_steps=2)).result(60)

    left = 100 * GIB - threads * 32 * MIB - engine.weights_bytes("tiny")
    assert engine._scheduler.memory_budget_bytes == left


def test_a_reproducible_image_runs_only_once_cached_memory_was_given_back(engine, monkeypatch):
    family = engine._checkpoints["tiny"].family
    denoise, done = family.denoise, []

    def short_of_memory(rows):
        done.append(len(rows["latents"]))
        if done.count(2) < 3 and len(rows["latents"]) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return denoise(rows)

    monkeypatch.setattr(family, "denoise", short_of_memory)
    monkeypatch.setattr(engine._loop._device, "free_cached_memory", lambda: done.append("freed"))

    with pytest.raises(OutOfDeviceMemory):
        engine.submit(a_request("too large")).result(60)
    engine.submit(reproducible("pinned", num_steps=2)).result(60)

    first = done.index(8)
    assert done[: first - 1].count(2) == 2
    assert done[first - 1] == "freed"


def test_memory_that_was_refused_without_an_error_is_told_once(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine._loop._device, "refusals", lambda: 2)

    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            engine.submit(a_request(name, num_steps=2)).result(60)
        engine.submit(a_request("c", num_steps=2)).result(60)

    told = [one.times for one in caplog.records if one.message == "device_memory_refused"]
    assert told == [2]


def test_an_unloaded_checkpoint_lets_go_of_its_recordings(checkpoint):
    with Engine(EngineConfig(max_batch_rows=2), [a_spec(checkpoint)]) as engine:
        family = engine._checkpoints["tiny"].family
        family.graphs = family.denoise

        engine.unload("tiny").result(60)

    assert family.graphs is None
