"""What is read from a checkpoint folder is what the catalog says, or nothing."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from engine_builders import a_spec

from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.sd import StableDiffusion
from engine.folders import hash_files
from engine.loading import load_checkpoint, tensors_of

CPU = Device("cpu", num_threads=1)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def hashes(folder) -> dict[str, str]:
    return hash_files(folder, StableDiffusion.folders(folder))


def flip_a_bit(file) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_a_corrupt_file_is_refused_by_name(folder):
    listed = hashes(folder)
    flip_a_bit(folder / WEIGHTS)

    with pytest.raises(CheckpointCorrupt, match=WEIGHTS) as refused:
        load_checkpoint(a_spec(folder, sha256=listed), CPU)

    assert refused.value.file == WEIGHTS


def test_an_engine_does_not_start_on_a_corrupt_checkpoint(folder):
    listed = hashes(folder)
    flip_a_bit(folder / WEIGHTS)
    engine = Engine(EngineConfig(), [a_spec(folder, sha256=listed)])

    with pytest.raises(CheckpointCorrupt):
        engine.start()

    engine.stop()
    assert not engine.is_running


def test_a_missing_file_is_refused_by_name(folder):
    listed = hashes(folder)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()

    with pytest.raises(CheckpointCorrupt) as refused:
        load_checkpoint(a_spec(folder, sha256=listed), CPU)

    assert refused.value.file == "tokenizer/tokenizer_config.json"


def test_weights_the_catalog_does_not_list_are_not_read(folder):
    listed = hashes(folder)
    del listed["vae/diffusion_pytorch_model.safetensors"]

    with pytest.raises(CheckpointCorrupt, match="not listed") as refused:
        load_checkpoint(a_spec(folder, sha256=listed), CPU)

    assert refused.value.file == "vae/diffusion_pytorch_model.safetensors"


def test_pickled_weights_are_never_read(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")

    with pytest.raises(CheckpointCorrupt, match="unet"):
        load_checkpoint(a_spec(folder), CPU)


def test_a_lacking_tensor_is_an_error_and_not_a_random_one(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / WEIGHTS)

    with pytest.raises(CheckpointCorrupt, match=r"conv_in\.weight"):
        load_checkpoint(a_spec(folder), CPU)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointCorrupt):
        load_checkpoint(a_spec(tmp_path / "nowhere"), CPU)


@pytest.mark.parametrize("changes", [{"family": "abacus"}, {"precision": "fp4"}])
def test_an_unknown_family_or_precision_is_refused(checkpoint, changes):
    with pytest.raises(UnsupportedRequest) as refused:
        load_checkpoint(a_spec(checkpoint, **changes), CPU)

    assert refused.value.field in changes


def test_the_weights_digest_follows_the_files_and_not_the_folder(folder, checkpoint):
    first = load_checkpoint(a_spec(checkpoint, sha256=hashes(folder)), CPU).weights_digest
    assert load_checkpoint(a_spec(folder), CPU).weights_digest == first

    flip_a_bit(folder / WEIGHTS)

    assert load_checkpoint(a_spec(folder), CPU).weights_digest != first


def test_variants_of_another_precision_are_neither_read_nor_counted(folder):
    before = hashes(folder)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not even weights")

    assert hashes(folder) == before
    load_checkpoint(a_spec(folder, sha256=before), CPU)


def test_a_file_rewritten_in_place_does_not_change_running_weights(folder):
    family = load_checkpoint(a_spec(folder), CPU).family
    before = [parameter.clone() for parameter in family._unet.parameters()]

    file = folder / WEIGHTS
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)

    assert all(
        torch.equal(one, other)
        for one, other in zip(before, family._unet.parameters(), strict=True)
    )


def test_digests_are_the_same_however_many_threads_hash(folder):
    parts = StableDiffusion.folders(folder)

    found = hash_files(folder, parts, threads=4)

    assert found == hashes(folder)
    assert list(found) == list(hashes(folder)), "in the order of the parts"


def test_weights_that_go_straight_to_the_device_are_the_same(folder, monkeypatch):
    through_the_host = load_checkpoint(a_spec(folder), CPU)
    monkeypatch.setattr("engine.families.latent._goes_straight_to", lambda device: True)

    straight = load_checkpoint(a_spec(folder), CPU)

    tensors = zip(tensors_of(straight.family), tensors_of(through_the_host.family), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in tensors)
    assert not any(
        hasattr(module, "_hf_hook")
        for network in straight.family.modules()
        for module in network.modules()
    ), "nothing moves what it is given"


def test_a_load_has_its_turn_when_its_files_are_verified(folder, monkeypatch):
    order = []

    @contextmanager
    def turn():
        order.append("begins")
        yield
        order.append("ends")

    monkeypatch.setattr("engine.loading._verify", lambda *_: order.append("verified"))
    monkeypatch.setattr("engine.loading.give_back_host_memory", lambda: order.append("given back"))
    monkeypatch.setattr("engine.loop.warm_up", lambda *_, **__: iter([None]))

    with Engine(EngineConfig(), [a_spec(folder)], load_turn=turn) as engine:
        engine.load(replace(a_spec(folder), name="second")).result(60)

    assert order == ["verified", "begins", "given back", "ends"] * 2
