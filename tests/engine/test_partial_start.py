"""An engine that goes on without the checkpoints that cannot be loaded, and says why they fail."""

import shutil
from dataclasses import replace

import pytest
from engine_builders import SIZE, a_request, a_spec

import engine.checkpoints
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, LoadProblem, NothingLoaded, UnknownCheckpoint

LACKING = EngineConfig(may_lack_checkpoints=True)


def a_broken_spec(path, **changes):
    return a_spec(path, name="broken", **changes)


def without_unet(path, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(path, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_engine_serves_the_others_when_one_checkpoint_cannot_be_loaded(checkpoint, tmp_path):
    broken = a_broken_spec(without_unet(checkpoint, tmp_path))

    with Engine(LACKING, [broken, a_spec(checkpoint)]) as engine:
        image = engine.submit(a_request(num_steps=2)).result(60)
        with pytest.raises(UnknownCheckpoint):
            engine.submit(a_request("other", checkpoint="broken"))

        assert image.pixels.shape == (SIZE, SIZE, 3)
        assert engine.checkpoints == ("tiny",)
        [failure] = engine.failures
        assert (failure.checkpoint, failure.kind) == ("broken", LoadProblem.FILES)
        assert failure.problem.startswith("unet")


def test_engine_drops_a_checkpoint_whose_warm_up_fails(checkpoint):
    nobody_s = a_broken_spec(checkpoint, samplers=("pndm",))

    with Engine(LACKING, [nobody_s, a_spec(checkpoint)]) as engine:
        [failure] = engine.failures

        assert engine.checkpoints == ("tiny",)
        assert failure.kind is LoadProblem.SETTINGS
        assert failure.problem.startswith("sampler: 'pndm' is none of")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RuntimeError("CUDA error: out of memory"), LoadProblem.MEMORY, "does not fit"),
        (KeyError("nobody foresaw this\nat all"), LoadProblem.UNPLANNED, "KeyError: "),
    ],
)
def test_engine_tells_what_kind_of_problem_a_load_met(checkpoint, monkeypatch, error, kind, told):
    load = engine.checkpoints.load_checkpoint

    def fail(spec, device, **how):
        if spec.name == "broken":
            raise error
        return load(spec, device, **how)

    monkeypatch.setattr(engine.checkpoints, "load_checkpoint", fail)
    with Engine(LACKING, [a_spec(checkpoint), a_broken_spec(checkpoint)]) as running:
        [failure] = running.failures

    assert failure.kind is kind
    assert told in failure.problem
    assert "\n" not in failure.problem


def test_engine_that_can_load_nothing_does_not_start_and_says_why_for_each(checkpoint, tmp_path):
    broken = a_broken_spec(without_unet(checkpoint, tmp_path))
    other = replace(broken, name="other", samplers=("pndm",))

    with pytest.raises(NothingLoaded, match=r"broken: unet.*; other: unet") as raised:
        Engine(LACKING, [broken, other]).start()

    assert [each.checkpoint for each in raised.value.failures] == ["broken", "other"]


def test_engine_raises_at_the_first_failure_unless_it_may_lack_some(checkpoint, tmp_path):
    broken = a_broken_spec(without_unet(checkpoint, tmp_path))

    with pytest.raises(CheckpointCorrupt):
        Engine(EngineConfig(), [a_spec(checkpoint), broken]).start()
