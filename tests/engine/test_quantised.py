"""Checkpoints whose linear layers are held in 8 bits: near the exact ones, and as reproducible."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from diffusers import EulerDiscreteScheduler
from engine_builders import ALWAYS, NATIVE_FAMILIES, a_spec, reproducible
from tiny_checkpoints import save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import a_pipeline_request, a_pipeline_spec, save_tiny_pipeline
from torch import nn

from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import UnsupportedRequest
from engine.events import Stepped
from engine.headers import memory_bytes, read_header
from engine.inspection import inspect
from engine.loading import load_checkpoint
from engine.quantisation import (
    QUANTISATIONS,
    QuantisedLinear,
    check_float8,
    check_quantisation,
    quantised,
)
from engine.request import AdapterUse

CPU = Device("cpu", num_threads=1)
NOISE, FLOW = ("euler",), ("flow_euler",)
SIZES = {"sizes": ((64, 64),)}
# Versions that are tried: every family in int8, two of them in float8.
TRIED = [*((family, "int8") for family in NATIVE_FAMILIES), ("sd", "float8"), ("flux", "float8")]
# Part of the way to the image of another seed. Random weights, as here, drift far.
MOST_DRIFT = {"int8": 0.5, "float8": 0.7}


@pytest.fixture(scope="module")
def specs(checkpoint, tmp_path_factory):
    """A checkpoint of every family, with an adapter over its denoiser."""
    folder = tmp_path_factory.mktemp("quantised")
    sdxl = save_tiny_sdxl(folder / "sdxl", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    bare = {
        "sd": a_spec(checkpoint, family="sd", samplers=NOISE, **SIZES),
        "sdxl": a_spec(sdxl, family="sdxl", samplers=NOISE, **SIZES),
        "sd3": a_spec(save_tiny_sd3(folder / "sd3"), family="sd3", samplers=FLOW, **SIZES),
        "flux": a_spec(save_tiny_flux(folder / "flux"), family="flux", samplers=FLOW, **SIZES),
    }
    found = {}
    for family, spec in bare.items():
        networks = load_checkpoint(spec, CPU).family.networks()
        denoiser = "unet" if "unet" in networks else "transformer"
        only = lora_tensors(
            networks[denoiser],
            prefix=denoiser,
            seed=1,
            only=lambda layer: "attn" in layer and "to_" in layer,
        )
        changes = {"adapters": (a_file(folder / f"{family}.safetensors", only),)}
        for how in [None, *(how for name, how in TRIED if name == family)]:
            name = f"{family}-{how}"
            shape = {"name": name, "family": family, "samplers": spec.samplers, **SIZES, **changes}
            found[name] = a_spec(spec.path, quantize=how, **shape)
    return found


@pytest.fixture(scope="module")
def engine(specs):
    config = EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=8)
    with Engine(config, list(specs.values())) as engine:
        yield engine


def asked(family, how, id="image", **changes):
    sampler = (FLOW if family in ("sd3", "flux") else NOISE)[0]
    return reproducible(
        id,
        **{"checkpoint": f"{family}-{how}", "sampler": sampler, "num_steps": 4, "bucket_rows": 4}
        | changes,
    )


def distance(one, other) -> float:
    """The mean difference of two pictures' pixels, of 255."""
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize(("family", "how"), TRIED)
def test_quantised_version_makes_nearly_the_image_of_the_exact_one(engine, family, how):
    exact = engine.submit(asked(family, None, seed=7)).result(60).pixels
    other = engine.submit(asked(family, None, seed=8)).result(60).pixels
    small = engine.submit(asked(family, how, seed=7)).result(60).pixels

    assert 0 < distance(exact, small) < MOST_DRIFT[how] * distance(exact, other)


def test_trained_model_drifts_little_when_it_is_quantised():
    checkpoint = Path(__file__).parents[2] / "pocket" / "checkpoint"
    sizes = {"sizes": ((128, 128),)}
    names = [None, *QUANTISATIONS]
    specs = [a_spec(checkpoint, name=str(how), quantize=how, **sizes) for how in names]
    asked = {"num_steps": 8, "width_px": 128, "height_px": 128, "guidance": 1.0, "sampler": "ddim"}

    with Engine(EngineConfig(), specs) as engine:
        exact, int8, float8 = (
            engine.submit(reproducible(str(how), checkpoint=str(how), **asked)).result(60).pixels
            for how in names
        )

    assert 0 < distance(exact, int8) < 0.5
    assert 0 < distance(exact, float8) < 0.5


@pytest.mark.parametrize(("family", "how"), TRIED)
def test_quantised_image_is_the_same_alone_in_company_and_after_a_move(engine, family, how):
    request = asked(family, how, adapters=(AdapterUse(family, 0.8),))
    alone = engine.submit(request).result(60)
    neighbours, blobs = [], []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 1:
            other = asked(family, how, "neighbour", seed=99, num_steps=2, guidance=1.0)
            neighbours.append(engine.submit(other))
            blobs.append(engine.snapshot(request.id))

    accompanied = engine.submit(request, on_event).result(60)
    neighbours[0].result(60)
    moved = engine.restore(blobs[0].result(60)).result(60)

    assert accompanied.record.shared_forwards > 0
    assert np.array_equal(accompanied.pixels, alone.pixels)
    assert np.array_equal(moved.pixels, alone.pixels)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_adapter_changes_the_image_of_a_quantised_version(engine, family):
    plain = engine.submit(asked(family, "int8")).result(60)
    adapted = engine.submit(asked(family, "int8", adapters=(AdapterUse(family),))).result(60)

    assert not np.array_equal(plain.pixels, adapted.pixels)


def test_how_weights_are_quantised_is_in_the_fingerprint_and_in_the_digest_of_a_replay(engine):
    told = [engine.fingerprint(f"sd-{how}") for how in (None, *QUANTISATIONS)]

    assert [each.facts.get("quantize") for each in told] == [None, *QUANTISATIONS]
    assert len({each.sha256 for each in told}) == 3
    assert len({each.facts["weights"] for each in told}) == 3


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_memory_of_a_quantised_version_is_what_its_files_let_expect(specs, family):
    loaded = load_checkpoint(specs[f"{family}-int8"], CPU)
    exact = load_checkpoint(specs[f"{family}-None"], CPU)
    path = Path(loaded.spec.path)
    found = inspect(path)
    slots_bytes = loaded.adapters.size_bytes

    expected = sum(
        memory_bytes(part.name, read_header(file).tensors, value_bytes=4, how="int8")
        for part in found.parts
        for file in (path / part.name).glob("*.safetensors")
    )

    held = loaded.weights_bytes - slots_bytes
    # Buffers that are in no file: positions, a few numbers of a VAE.
    assert held == pytest.approx(expected, rel=0.02)
    assert found.weights_bytes("fp32", is_quantised=True) == pytest.approx(held, rel=0.1)
    assert held < 0.8 * (exact.weights_bytes - exact.adapters.size_bytes)


def test_weights_that_are_freed_leave_no_memory(specs):
    loaded = load_checkpoint(specs["sd-int8"], CPU)

    loaded.free()

    assert loaded.weights_bytes == 0


def test_layers_that_decode_pixels_and_look_words_up_stay_exact(specs):
    family = load_checkpoint(specs["sd-int8"], CPU).family
    kinds = {
        name: {type(layer) for layer in network.modules() if isinstance(layer, nn.Linear)}
        for name, network in family.networks().items()
    }

    assert kinds == {"unet": {QuantisedLinear}, "text_encoder": {QuantisedLinear}}
    others = [each for each in family.modules() if each not in family.networks().values()]
    assert not any(isinstance(layer, QuantisedLinear) for one in others for layer in one.modules())


def test_pipeline_of_any_class_is_quantised_too(tmp_path):
    folder = save_tiny_pipeline("pixart-sigma", tmp_path / "any")
    exact = a_pipeline_spec("pixart-sigma", folder)
    small = replace(exact, name="small", quantize="int8")

    with Engine(EngineConfig(), [exact, small]) as engine:
        made, made_small = (
            engine.submit(a_pipeline_request("pixart-sigma", checkpoint=name)).result(60).pixels
            for name in ("tiny", "small")
        )

    assert 0 < distance(made, made_small) < 20


@pytest.mark.parametrize("how", QUANTISATIONS)
def test_each_row_of_weights_keeps_its_largest_number_and_is_close_elsewhere(how):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1e-6, 1e-3, 1.0, 30.0, 0.1, 0.0, 2.0, 1e4])[:, None]

    numbers, scales = quantised(weight, QUANTISATIONS[how])

    made = numbers.float() * scales
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert (numbers.element_size(), scales.shape) == (1, (8, 1))
    assert torch.allclose(made.abs().amax(dim=1, keepdim=True), largest, rtol=1e-5)
    part = {"int8": 0.5 / 127 * 1.01, "float8": 1 / 16}[how]
    assert ((made - weight).abs() <= part * largest).all()


def test_gpu_without_8_bit_floating_point_is_refused_with_what_works_on_it():
    with pytest.raises(UnsupportedRequest, match=r"compute capability 8\.9, and A100 has 8\.0"):
        check_float8("A100", (8, 0))

    check_float8("H100", (9, 0))


def test_unknown_quantisation_is_refused():
    with pytest.raises(UnsupportedRequest, match="'int3' is none of int8, float8"):
        check_quantisation("int3", torch.device("cpu"))
