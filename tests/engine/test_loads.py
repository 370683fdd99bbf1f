"""A checkpoint joins a running engine and leaves it again, and no other image notices."""

import shutil
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from diffusers import DDIMScheduler, UNet2DConditionModel
from engine_builders import ALWAYS, a_request, a_spec, reproducible, save_tiny_checkpoint
from tiny_checkpoints import save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import a_pipeline_spec, save_tiny_pipeline

from engine import loading, loads
from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import (
    CheckpointCorrupt,
    EngineStopped,
    LoadFailed,
    LoadProblem,
    UnknownCheckpoint,
)
from engine.events import Stepped
from engine.handle import Handle
from engine.hostcopies import HostCopies
from engine.request import AdapterUse
from engine.sidethread import LoadPace, own_default_dtype
from tests.builders import until

LONG = 900  # steps: an image that is in flight until it is canceled


@pytest.fixture(scope="module")
def engine_for_all(checkpoint):
    with Engine(EngineConfig(growth_ceiling=ALWAYS), [a_spec(checkpoint)]) as engine:
        yield engine


@pytest.fixture
def running(engine_for_all, monkeypatch):
    """An engine that is left without images, and without other checkpoints."""
    monkeypatch.setattr(loads, "TURNS_PER_PIECE", 4)
    yield engine_for_all
    for name in set(engine_for_all.checkpoints) - {"tiny"}:
        engine_for_all.unload(name, at_once=True).result(60)
    engine_for_all._checkpoints.failures = {}


def another_spec(path, **changes):
    return a_spec(path, **{"name": "other"} | changes)


def in_flight(engine, id="long", **changes) -> Handle:
    """An image that has taken its first step and has many before it; each waits a moment."""
    has_begun = threading.Event()

    def on_event(event):
        if isinstance(event, Stepped):
            has_begun.set()
            time.sleep(0.002)

    handle = engine.submit(a_request(id, num_steps=LONG, **changes), on_event)
    assert has_begun.wait(60)
    return handle


def test_load_adds_a_checkpoint_while_images_are_in_flight(running, epsilon_checkpoint):
    long = in_flight(running)

    times = running.load(another_spec(epsilon_checkpoint)).result(120)

    assert not long.done()
    assert times.checkpoint == "other"
    assert min(times.read_s, times.warm_up_s) > 0
    assert running.checkpoints == ("tiny", "other")
    assert running.submit(a_request("b", checkpoint="other")).result(60).pixels.any()
    long.cancel()


def test_load_and_unload_change_no_bit_of_a_running_image(running, epsilon_checkpoint):
    other = another_spec(epsilon_checkpoint, precision="bf16")
    alone = running.submit(reproducible("same", num_steps=50)).result(120)
    futures = []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 1:
            futures.append(running.load(other))

    beside_a_load = running.submit(reproducible("same", num_steps=50), on_event).result(120)
    futures.pop().result(120)
    handle = running.submit(reproducible("same", num_steps=50))
    gone = running.unload("other")
    beside_an_unload = handle.result(120)
    gone.result(60)

    assert np.array_equal(alone.pixels, beside_a_load.pixels)
    assert np.array_equal(alone.pixels, beside_an_unload.pixels)


def test_a_loaded_checkpoint_gives_the_bits_of_one_that_was_there_at_start(
    running, checkpoint, epsilon_checkpoint
):
    spec = another_spec(epsilon_checkpoint)
    with Engine(EngineConfig(), [a_spec(checkpoint), spec]) as at_start:
        expected = at_start.submit(reproducible(checkpoint="other")).result(60)

    running.load(spec).result(120)
    loaded = running.submit(reproducible(checkpoint="other")).result(60)

    assert np.array_equal(loaded.pixels, expected.pixels)
    assert loaded.record.fingerprint == expected.record.fingerprint


SAVED = {
    "sd": lambda folder: save_tiny_checkpoint(folder, DDIMScheduler()),
    "sdxl": lambda folder: save_tiny_sdxl(folder, DDIMScheduler()),
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", [*SAVED, "pipeline"])
def test_load_leaves_other_threads_their_default_dtype_and_reads_the_same_weights(
    tmp_path, monkeypatch, family, precision
):
    if family == "pipeline":
        folder = save_tiny_pipeline("chroma", tmp_path / "folder")
        spec = a_pipeline_spec("chroma", folder, precision=precision)
    else:
        spec = a_spec(SAVED[family](tmp_path / "folder"), family=family, precision=precision)
    device = Device("cpu", num_threads=1)
    seen = set()
    set_default_dtype = torch.set_default_dtype
    with monkeypatch.context() as patched:
        patched.setattr(torch, "set_default_dtype", seen.add)
        ours = loading.load_checkpoint(spec, device)
    assert not seen
    monkeypatch.setattr(loading, "own_default_dtype", nullcontext)

    theirs = loading.load_checkpoint(spec, device)

    assert torch.set_default_dtype is set_default_dtype
    one, other = (loading.tensors_of(each.family) for each in (ours, theirs))
    assert [tensor.dtype for tensor in one] == [tensor.dtype for tensor in other]
    assert all(map(torch.equal, one, other))


def test_a_changed_default_dtype_holds_for_its_thread_alone():
    elsewhere = []

    with own_default_dtype():
        torch.set_default_dtype(torch.bfloat16)
        here = [torch.get_default_dtype(), torch.ones(1).dtype, torch.tensor([0.5]).dtype]
        integers = torch.arange(3).dtype
        thread = threading.Thread(
            target=lambda: elsewhere.extend([torch.get_default_dtype(), torch.ones(1).dtype])
        )
        thread.start()
        thread.join(60)

    assert here == [torch.bfloat16] * 3
    assert integers is torch.int64
    assert elsewhere == [torch.float32] * 2
    assert torch.ones(1).dtype is torch.float32


def test_a_checkpoint_that_cannot_be_loaded_is_told_by_name_folder_and_file(
    running, checkpoint, tmp_path
):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()

    with pytest.raises(LoadFailed, match=rf"'other' \({folder}\): unet: .*") as raised:
        running.load(another_spec(folder)).result(60)

    assert raised.value.failure.kind is LoadProblem.FILES
    assert isinstance(raised.value.__cause__, CheckpointCorrupt)
    assert [each.checkpoint for each in running.failures] == ["other"]
    assert running.submit(a_request()).result(60).pixels.any()

    running.load(another_spec(checkpoint)).result(120)
    assert not running.failures


def test_a_checkpoint_whose_warm_up_fails_is_not_served(running, checkpoint):
    nobody_s = another_spec(checkpoint, samplers=("pndm",))

    with pytest.raises(LoadFailed, match="sampler: 'pndm' is none of") as raised:
        running.load(nobody_s).result(60)

    assert raised.value.failure.kind is LoadProblem.SETTINGS
    assert running.checkpoints == ("tiny",)
    assert running.stats()["loads"] == 1


def test_a_checkpoint_is_refused_before_it_is_read_if_the_device_has_no_room(
    running, epsilon_checkpoint, monkeypatch
):
    monkeypatch.setattr(Device, "free_bytes", lambda self: 100_000)

    with pytest.raises(
        LoadFailed, match=r"it needs 0\.00 GB of the device's memory, and 0\.00"
    ) as no:
        running.load(another_spec(epsilon_checkpoint)).result(60)

    assert no.value.failure.kind is LoadProblem.MEMORY


def test_a_name_that_is_loaded_already_is_refused(running, checkpoint):
    with pytest.raises(LoadFailed, match="unload that first"):
        running.load(a_spec(checkpoint)).result(60)

    assert not running.failures
    assert running.submit(a_request()).result(60).pixels.any()


def test_unload_lets_images_in_flight_finish_and_takes_no_more(running, epsilon_checkpoint):
    running.load(another_spec(epsilon_checkpoint)).result(120)
    last = in_flight(running, "last", checkpoint="other")

    gone = running.unload("other")

    with pytest.raises(UnknownCheckpoint):
        running.submit(a_request("late", checkpoint="other"))
    assert not gone.done()
    last.cancel()
    gone.result(60)
    assert running.checkpoints == ("tiny",)
    with pytest.raises(UnknownCheckpoint):
        running.unload("other")


def test_unload_at_once_ends_the_images_as_of_an_unknown_checkpoint(running, epsilon_checkpoint):
    running.load(another_spec(epsilon_checkpoint)).result(120)
    theirs = in_flight(running, "theirs", checkpoint="other")
    ours = in_flight(running, "ours")

    running.unload("other", at_once=True).result(60)

    with pytest.raises(UnknownCheckpoint):
        theirs.result(60)
    assert not ours.done()
    ours.cancel()


def test_unload_forgets_weights_encodings_kept_latents_and_costs(running, epsilon_checkpoint):
    before = running.stats()
    running.load(another_spec(epsilon_checkpoint)).result(120)
    weights = running._checkpoints["other"].family._unet.conv_in.weight
    running.submit(a_request("a", checkpoint="other", keep_steps=(1,))).result(60)

    running.unload("other").result(60)

    after = running.stats()
    same = ("cache_bytes", "latent_cache_bytes", "loads")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert weights.numel() == 0
    assert {key.checkpoint for key in running.costs.measured_keys()} == {"tiny"}


def test_a_checkpoint_that_may_return_does_so_without_a_warm_up_and_with_the_same_bits(
    running, epsilon_checkpoint, monkeypatch
):
    spec = another_spec(epsilon_checkpoint)
    running.load(spec).result(120)
    before = running.submit(reproducible(checkpoint="other")).result(60)
    running.unload("other", may_return=True).result(60)
    with pytest.raises(UnknownCheckpoint):
        running.submit(a_request(checkpoint="other"))

    monkeypatch.setattr(running._loop.loads, "_warm_up", None)  # is not asked for
    times = running.load(spec, is_awaited=True).result(60)
    after = running.submit(reproducible(checkpoint="other")).result(60)

    assert not times.is_copied
    assert np.array_equal(before.pixels, after.pixels)
    assert before.record.fingerprint == after.record.fingerprint


def test_a_checkpoint_that_will_not_return_is_forgotten_where_it_is_told(
    running, epsilon_checkpoint
):
    def known() -> bool:
        return any(key.checkpoint == "other" for key in running.costs.measured_keys())

    running.load(another_spec(epsilon_checkpoint)).result(120)
    running.unload("other", may_return=True).result(60)
    assert known()

    running.forget("other")

    until(lambda: not known(), what="the device thread")


def test_a_checkpoint_that_returns_with_other_files_is_warmed_up_again(
    running, epsilon_checkpoint, tmp_path
):
    folder = tmp_path / "changes"
    shutil.copytree(epsilon_checkpoint, folder)
    running.load(another_spec(folder)).result(120)
    running.unload("other", may_return=True).result(60)
    other = save_tiny_checkpoint(tmp_path / "v2", DDIMScheduler(), seed=9)
    shutil.copytree(other, folder, dirs_exist_ok=True)
    asked = []
    warm_up = running._loop.loads._warm_up
    running._loop.loads._warm_up = lambda spec: (asked.append(spec.name), warm_up(spec))[1]

    running.load(another_spec(folder)).result(120)

    running._loop.loads._warm_up = warm_up
    assert asked == ["other"]


def test_weights_return_from_the_host_s_memory_with_adapters_and_the_same_bits(
    checkpoint, epsilon_checkpoint, tmp_path
):
    folder = tmp_path / "other"
    shutil.copytree(epsilon_checkpoint, folder)
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    style = lora_tensors(network, prefix="unet", seed=1)
    spec = another_spec(folder, adapters=(a_file(tmp_path / "style.safetensors", style),))
    request = reproducible(checkpoint="other", adapters=(AdapterUse("style", 1.0),))
    with Engine(EngineConfig(host_copy_bytes=10**9), [a_spec(checkpoint)]) as engine:
        engine.load(spec).result(120)
        before = engine.submit(request).result(60)
        engine.unload("other", may_return=True).result(60)
        shutil.rmtree(folder)

        times = engine.load(spec).result(60)
        after = engine.submit(request).result(60)

    assert times.is_copied
    assert np.array_equal(before.pixels, after.pixels)


def test_images_leave_memory_to_weights_that_are_not_loaded_yet(
    checkpoint, epsilon_checkpoint, monkeypatch
):
    monkeypatch.setattr(Device, "memory_budget_bytes", lambda self: 10**9)
    config = EngineConfig(weights_room_bytes=6 * 10**8)

    with Engine(config, [a_spec(checkpoint)]) as engine:
        before = engine._scheduler.memory_budget_bytes
        engine.load(another_spec(epsilon_checkpoint)).result(120)

        assert before == engine._scheduler.memory_budget_bytes == 4 * 10**8


def test_host_copies_are_the_newest_that_fit(checkpoint):
    device = Device("cpu", num_threads=1)
    a, b, c = (
        loading.load_checkpoint(another_spec(checkpoint, name=name), device) for name in "abc"
    )
    copies = HostCopies(2 * a.weights_bytes)

    for loaded in (a, b, c):
        copies.put(loaded)

    assert copies.take(a.spec, device) is None
    assert copies.take(b.spec, device).weights_bytes == copies.take(c.spec, device).weights_bytes
    assert not a.weights_bytes, "freed"


def test_an_image_that_arrives_after_its_checkpoint_has_gone_fails_alone(
    running, epsilon_checkpoint
):
    running.load(another_spec(epsilon_checkpoint)).result(120)
    image = running._checkpoints.admit(a_request("late", checkpoint="other"))
    running.unload("other").result(60)

    late = running._take_in(image, None)

    with pytest.raises(UnknownCheckpoint):
        late.result(60)
    assert running.submit(a_request()).result(60).pixels.any()


def test_stop_leaves_nobody_waiting_for_a_load_or_an_unload(checkpoint, epsilon_checkpoint):
    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        image = in_flight(engine)
        loads = [engine.load(another_spec(epsilon_checkpoint, name=name)) for name in "ab"]
        gone = engine.unload("tiny")

    for future in (*loads, gone):
        with pytest.raises(EngineStopped):
            future.result(60)
    with pytest.raises(EngineStopped):
        image.result(60)
    with pytest.raises(EngineStopped):
        engine.load(another_spec(epsilon_checkpoint))


def test_pace_stops_a_loading_thread_at_its_next_call_during_a_turn():
    pace = LoadPace()
    calls = []
    is_over = threading.Event()

    def load():
        with pace.kept():
            while not is_over.is_set():
                calls.append(None)

    pace.begin_turn()
    thread = threading.Thread(target=load)
    thread.start()
    while not pace._is_waiting:
        time.sleep(0.001)
    stopped_at = len(calls)
    time.sleep(0.05)

    assert len(calls) == stopped_at
    pace.end_turn()
    while len(calls) == stopped_at:
        time.sleep(0.001)
    is_over.set()
    thread.join(60)
