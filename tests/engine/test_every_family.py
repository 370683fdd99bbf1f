"""One engine, every family: the same promises for all of them, with everything a request can ask
for at once.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from diffusers import EulerDiscreteScheduler
from engine_builders import ALWAYS, NATIVE_FAMILIES, a_request, a_spec, reproducible
from tiny_checkpoints import a_mask, a_picture, save_repainting, save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import a_pipeline_request, a_pipeline_spec, save_tiny_pipeline

import engine.checkpoints as checkpoints_module
from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import ImageCanceled, UnsupportedRequest
from engine.events import Previewed, Stepped
from engine.families import FAMILIES
from engine.loading import load_checkpoint
from engine.request import AdapterUse, Determinism
from policy.fleet import BLOCK_CACHE_FAMILIES, Family
from policy.params import PARAMS

NOISE, FLOW = ("euler", "dpmpp_2m"), ("flow_euler", "flow_euler_karras")
SAMPLERS_OF = {"sd": NOISE, "sdxl": NOISE, "sd3": FLOW, "flux": FLOW}
SIZES = {"sizes": ((64, 64),)}


@pytest.fixture(scope="module")
def specs(checkpoint, tmp_path_factory, request):
    """A checkpoint of every family, each with an adapter over its denoiser; the transformers with a
    block cache.
    """
    folder = tmp_path_factory.mktemp("families")
    sdxl = save_tiny_sdxl(folder / "sdxl", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    bare = {
        "sd": a_spec(checkpoint, name="sd", samplers=NOISE, **SIZES),
        "sdxl": a_spec(sdxl, name="sdxl", family="sdxl", samplers=NOISE, **SIZES),
        "sd3": a_spec(
            save_tiny_sd3(folder / "sd3"), name="sd3", family="sd3", samplers=FLOW, **SIZES
        ),
        "flux": a_spec(
            save_tiny_flux(folder / "flux"), name="flux", family="flux", samplers=FLOW, **SIZES
        ),
    }
    full = {}
    for name, spec in bare.items():
        networks = load_checkpoint(spec, Device("cpu", num_threads=1)).family.networks()
        denoiser = "unet" if "unet" in networks else "transformer"
        only = lora_tensors(
            networks[denoiser],
            prefix=denoiser,
            seed=1,
            only=lambda layer: "attn" in layer and "to_" in layer,
        )
        changes = {"adapters": (a_file(folder / f"{name}.safetensors", only),)}
        full[name] = a_spec(
            spec.path,
            **{"name": name, "family": spec.family, "samplers": spec.samplers, **SIZES, **changes},
        )
        if denoiser == "transformer":
            full[name] = a_spec(
                spec.path,
                **{
                    "name": name,
                    "family": spec.family,
                    "samplers": spec.samplers,
                    **SIZES,
                    **changes,
                    "block_cache_threshold": 0.9,
                },
            )
    return full


@pytest.fixture(scope="module")
def engine(specs):
    config = EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=8, previews_per_s=1e6)
    with Engine(config, list(specs.values())) as engine:
        yield engine


def asked(family, id="image", **changes):
    sampler = SAMPLERS_OF[family][0]
    return reproducible(
        id, **{"checkpoint": family, "sampler": sampler, "num_steps": 4, "bucket_rows": 4} | changes
    )


def test_the_engine_has_the_families_that_the_catalogue_may_name(specs):
    assert set(FAMILIES) == set(get_args(Family))
    assert set(specs) == set(NATIVE_FAMILIES)
    cached = {name for name, spec in specs.items() if spec.block_cache_threshold}
    assert cached == set(BLOCK_CACHE_FAMILIES)


WAYS = {
    "text": {},
    "adapted": {"adapters": "its own"},
    "from a picture": {"init_image": a_picture(seed=3), "strength": 0.75},
    "repainted": {"init_image": a_picture(seed=3), "mask": a_mask(), "strength": 1.0},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_an_image_is_the_same_alone_in_company_and_after_a_move(engine, family, way):
    changes = dict(WAYS[way])
    if "adapters" in changes:
        changes["adapters"] = (AdapterUse(family, 0.8),)
    request = asked(family, **changes)
    alone = engine.submit(request).result(60)
    neighbours, blobs = [], []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 1:
            neighbours.append(
                engine.submit(asked(family, "neighbour", seed=99, num_steps=2, guidance=1.0))
            )
            blobs.append(engine.snapshot(request.id))

    accompanied = engine.submit(request, on_event).result(60)
    neighbours[0].result(60)
    moved = engine.restore(blobs[0].result(60)).result(60)

    assert accompanied.record.shared_forwards > 0
    assert np.array_equal(accompanied.pixels, alone.pixels)
    assert np.array_equal(moved.pixels, alone.pixels)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_an_adapter_changes_the_image_and_is_named_in_its_fingerprint(engine, family):
    plain = engine.submit(asked(family, "plain")).result(60)
    adapted = engine.submit(asked(family, "adapted", adapters=(AdapterUse(family),))).result(60)

    [facts] = adapted.record.fingerprint_facts["adapters"]
    assert not np.array_equal(plain.pixels, adapted.pixels)
    assert (facts["name"], facts["strength"]) == (family, 1.0)
    assert plain.record.fingerprint != adapted.record.fingerprint


def test_an_adapter_over_the_text_encoder_is_worn_by_its_own_image_alone(checkpoint, tmp_path):
    bare = a_spec(checkpoint, samplers=NOISE, **SIZES)
    encoder = load_checkpoint(bare, Device("cpu", num_threads=1)).family.networks()["text_encoder"]
    tensors = lora_tensors(encoder, prefix="text_encoder", seed=1)
    adapter = a_file(tmp_path / "words.safetensors", tensors)
    with Engine(EngineConfig(max_batch_rows=4), [replace(bare, adapters=(adapter,))]) as engine:
        asked_of = {"sampler": "euler", "bucket_rows": 4}
        images = [
            engine.submit(reproducible(f"image {n}", adapters=uses, **asked_of)).result(60)
            for n, uses in enumerate([(), (AdapterUse("words"),), (AdapterUse("words", 0.5),), ()])
        ]

    plain, adapted, half, plain_again = [image.pixels for image in images]
    assert np.array_equal(plain, plain_again)
    assert not np.array_equal(plain, adapted)
    assert not np.array_equal(half, adapted)
    assert not np.array_equal(half, plain)


def test_fingerprints_of_any_strength_are_told_apart_and_few_remembered(engine, monkeypatch):
    checkpoints = engine._checkpoints
    monkeypatch.setattr(checkpoints_module, "MAX_FINGERPRINTS", 8)
    requests = [asked("sd", adapters=(AdapterUse("sd", n / 100),)) for n in range(20)]
    images = [checkpoints.admit(request) for request in requests]

    prints = [checkpoints.fingerprint_of(image).sha256 for image in images]

    assert len(set(prints)) == 20
    assert len(checkpoints._fingerprints) <= 8
    assert [checkpoints.fingerprint_of(image).sha256 for image in images] == prints


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_every_family_has_previews(engine, family):
    events = []

    def on_event(event):
        events.append(event)
        engine.watch("image", True)

    engine.submit(asked(family), on_event).result(60)

    assert sum(isinstance(event, Previewed) for event in events) >= 3


@pytest.mark.parametrize("family", BLOCK_CACHE_FAMILIES)
def test_best_effort_images_may_skip_blocks_beside_strangers_with_adapters(engine, family):
    sampler = {"checkpoint": family, "sampler": FLOW[0], "num_steps": 8}
    before = engine.stats()["block_cache_rows_skipped"]
    strangers = []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 2:
            strangers.append(
                engine.submit(
                    a_request("stranger", **sampler, adapters=(AdapterUse(family),), seed=5)
                )
            )

    image = engine.submit(a_request("image", **sampler), on_event).result(60)
    strangers[0].result(60)

    assert engine.stats()["block_cache_rows_skipped"] > before
    assert image.record.shared_forwards > 0
    assert image.record.fingerprint_facts["block_cache"]["threshold"] == 0.9


@pytest.mark.parametrize("end", ["canceled", "finished"])
def test_an_image_that_has_ended_leaves_nothing_in_the_block_cache(engine, end):
    cache, remembered = engine._checkpoints["flux"].block_cache, []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 4:
            remembered.append(cache.rows_remembered)
            if end == "canceled":
                engine.cancel("image")

    request = a_request("image", checkpoint="flux", sampler=FLOW[0], num_steps=8)
    handle = engine.submit(request, on_event)
    try:
        handle.result(60)
    except ImageCanceled:
        assert end == "canceled"

    assert remembered[0] > 0
    assert (cache.rows_remembered, cache.size_bytes) == (0, 0)


def test_a_reproducible_image_never_skips_a_block(engine):
    before = engine.stats()["block_cache_rows_skipped"]

    image = engine.submit(asked("flux", num_steps=8)).result(60)

    assert engine.stats()["block_cache_rows_skipped"] == before
    assert image.record.fingerprint_facts["block_cache"] is None


def test_a_reproducible_image_is_the_same_beside_one_that_may_skip_blocks(engine):
    """It is the shorter one: it chooses the forward, and the other may come along."""
    image = asked("flux", num_steps=12, guidance=1.0)
    alone = engine.submit(image).result(60)
    beside = []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 1:
            changes = {"checkpoint": "flux", "sampler": FLOW[0], "num_steps": 40, "guidance": 1.0}
            beside.append(engine.submit(a_request("beside", **changes)))

    accompanied = engine.submit(image, on_event).result(60)

    assert beside[0].result(60).record.shared_forwards > 0
    assert np.array_equal(accompanied.pixels, alone.pixels)


def test_a_checkpoint_that_only_repaints_starts_and_serves(checkpoint, tmp_path):
    spec = a_spec(save_repainting(tmp_path / "nine", checkpoint), samplers=NOISE, **SIZES)
    with Engine(EngineConfig(max_batch_rows=4), [spec]) as engine:
        repainted = a_request("a", sampler="euler", init_image=a_picture(), mask=a_mask())

        assert engine.submit(repainted).result(60).pixels.shape == (64, 64, 3)
        with pytest.raises(UnsupportedRequest) as refused:
            engine.submit(a_request("b", sampler="euler"))
    assert refused.value.field == "mask"


def test_a_fill_checkpoint_starts_and_serves(tmp_path):
    spec = a_spec(
        save_tiny_flux(tmp_path / "fill", context_channels=4 + 64),
        family="flux",
        samplers=FLOW,
        **SIZES,
    )
    with Engine(EngineConfig(max_batch_rows=4), [spec]) as engine:
        filled = a_request("a", sampler="flow_euler", init_image=a_picture(), mask=a_mask())

        assert torch.from_numpy(engine.submit(filled).result(60).pixels).float().std() > 0


PIPELINES = ("sd-controlnet", "pixart-sigma", "z-image", "sd-img2img")


@pytest.mark.parametrize("name", PIPELINES)
def test_images_of_any_pipeline_share_forwards_and_move_in_the_engine(name, tmp_path):
    spec = a_pipeline_spec(name, save_tiny_pipeline(name, tmp_path / name))
    asked = {"determinism": Determinism.REPRODUCIBLE, "bucket_rows": 4, "num_steps": 4}
    with Engine(EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=4), [spec]) as engine:
        alone = engine.submit(a_pipeline_request(name, "image", **asked)).result(60)
        neighbours, blobs = [], []

        def on_event(event):
            if isinstance(event, Stepped) and event.step == 1:
                neighbours.append(
                    engine.submit(a_pipeline_request(name, "neighbour", **asked | {"seed": 99}))
                )
                blobs.append(engine.snapshot("image"))

        accompanied = engine.submit(a_pipeline_request(name, "image", **asked), on_event).result(60)
        neighbours[0].result(60)
        moved = engine.restore(blobs[0].result(60)).result(60)

    assert accompanied.record.shared_forwards > 0
    assert np.array_equal(accompanied.pixels, alone.pixels)
    assert np.array_equal(moved.pixels, alone.pixels)


def test_a_plain_pipeline_takes_turns_with_others_and_is_canceled_between_steps(tmp_path):
    path = save_tiny_pipeline("sd", tmp_path / "plain")
    spec = replace(a_pipeline_spec("sd", path), family="plain")
    with Engine(EngineConfig(max_batch_rows=4), [spec]) as engine:
        order = []

        def on_event(event):
            if isinstance(event, Stepped):
                order.append(event.request_id)
            if isinstance(event, Stepped) and event.request_id == "long" and event.step == 2:
                engine.cancel("long")

        long = engine.submit(a_pipeline_request("sd", "long", num_steps=8, rank=1), on_event)
        short = engine.submit(a_pipeline_request("sd", "short", num_steps=3), on_event)

        assert short.result(60).record.forwards == order.count("short") > 0
        with pytest.raises(ImageCanceled):
            long.result(60)
    assert order.count("long") == 2


def test_a_plain_pipeline_takes_no_adapters(tmp_path):
    path = save_tiny_pipeline("sd", tmp_path / "plain")
    spec = a_pipeline_spec(
        "sd", path, family="plain", adapters=(a_file(tmp_path / "adapter.safetensors", {}),)
    )

    with pytest.raises(UnsupportedRequest) as refused:
        Engine(EngineConfig(), [spec]).start()
    assert refused.value.field == "adapters"


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_a_family_takes_clip_skip_if_the_gateway_lets_it_through(engine, family):
    [param] = [param for param in PARAMS if param.name == "clip_skip"]
    request = asked(family, clip_skip=1)

    if family in param.pass_through.families:
        assert engine.submit(request).result(60).record.num_steps == 4
    else:
        with pytest.raises(UnsupportedRequest, match="clip_skip"):
            engine.submit(request)
