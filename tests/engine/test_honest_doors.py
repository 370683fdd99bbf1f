"""Whatever is accepted by what a checkpoint says of itself, its engine renders.

Every tiny checkpoint is loaded as a worker loads it, and described as a worker publishes it; random
requests are resolved by that, and what is accepted is given to the engine's own check.
"""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import torch
from adapter_builders import a_file, lora_tensors
from diffusers import EulerDiscreteScheduler
from tiny_checkpoints import a_family, save_repainting, save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3
from tiny_pipelines import OTHERS as OTHER_PIPELINES
from tiny_pipelines import PIPELINES, save_tiny_pipeline

from engine.checkpoints import LoadedCheckpoints
from engine.conditioning import ConditioningCache
from engine.device import Device
from engine.folders import sha256_of
from engine.request import ImageRequest, Picture
from engine.runner import Runner
from engine.samplers import FLOW_SAMPLERS, SAMPLERS
from engine.scheduler import Batch
from policy import capabilities
from policy.catalog import resolve
from policy.fleet import checkpoint_name
from policy.params import RequestedAdapter, RequestedParams
from policy.refusals import InvalidParam
from settings import REPO
from tasks.engines import checkpoint_specs
from tasks.render import rendering
from tests.builders import GONE, a_fleet

MAX_BATCH_ROWS = 4
REQUESTS = 10_000
RENDERED = 20  # of the accepted, besides one of each checkpoint
CALLED = (
    *("sd", "sd-img2img", "sd-inpaint", "sd-controlnet", "flux-kontext"),
    *("instruct-pix2pix", "qwen-image", "z-image"),
)


def of_native(family, path, sampler, **more):
    names = SAMPLERS if family in ("sd", "sdxl") else FLOW_SAMPLERS
    return {
        "family": family,
        "samplers": list(names),
        "default_sampler": sampler,
        "sizes": ["64x64", "64x96"],
        "versions": [{"id": "1", "source": str(path)}],
        **more,
    }


def of_pipeline(name, path, family="pipeline"):
    tiny = (PIPELINES | OTHER_PIPELINES)[name]
    return {
        "family": family,
        "samplers": ["default"],
        "default_sampler": "default",
        "sizes": ["32x32"],
        "options": dict(tiny.options),
        "versions": [{"id": "1", "source": str(path)}],
    }


def models_in(folder, checkpoint):
    """A table of fleet.toml for every kind of checkpoint."""
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    dev = save_tiny_flux(folder / "dev")
    schnell = save_tiny_flux(folder / "schnell", guidance_embeds=False)
    fill = save_tiny_flux(folder / "fill", context_channels=4 + 64)
    sdxl = save_tiny_sdxl(folder / "sdxl", scheduler)
    guided = {"options": {"true_cfg_scale": 2.0, "max_sequence_length": 64}}
    models = {
        "sd": of_native("sd", checkpoint, "ddim"),
        "sd-repainting": of_native("sd", save_repainting(folder / "nine", checkpoint), "ddim"),
        "sdxl": of_native("sdxl", sdxl, "euler"),
        "sd3": of_native("sd3", save_tiny_sd3(folder / "sd3"), "flow_euler"),
        "dev": of_native("flux", dev, "flow_euler"),
        "dev-guided": of_native("flux", dev, "flow_euler", **guided),
        "schnell": of_native("flux", schnell, "flow_euler", guidance_distilled=False),
        "fill": of_native("flux", fill, "flow_euler"),
    }
    for name in CALLED:
        path = save_tiny_pipeline(name, folder / f"called-{name}")
        models[f"called-{name}"] = of_pipeline(name, path)
    models["plain-sd"] = of_pipeline("sd", folder / "called-sd", family="plain")
    for name in ("sd", "dev"):
        models[name]["adapters"] = {"ink": an_adapter(models[name], folder / f"{name}.safetensors")}
    return models


def an_adapter(model, file):
    bare = replace(spec_of(model), adapters=())
    networks = a_family(bare).networks()
    denoiser = "unet" if "unet" in networks else "transformer"
    only = {"only": lambda layer: "attn" in layer and "to_q" in layer}
    made = a_file(file, lora_tensors(networks[denoiser], prefix=denoiser, seed=1, **only))
    return {"source": made.path, "sha256": sha256_of(Path(made.path))}


def spec_of(model):
    [spec] = checkpoint_specs(fleet_of({"one": model}), ["one"], REPO)
    return spec


def fleet_of(models):
    common = {
        "title": "tiny",
        "precision": "fp32",
        "default_guidance": 1.0,
        "max_guidance": 9.0,
    }
    changes = {"models.pocket": GONE, "models.large": GONE, "pools.big": GONE}
    for name, model in models.items():
        rows = {"quality": {"bucket_rows": dict.fromkeys(model["sizes"], MAX_BATCH_ROWS)}}
        changes[f"models.{name}"] = {**common, "tiers": rows, **model}
    pool = {"models": list(models), "slots": 8, "max_batch_rows": MAX_BATCH_ROWS}
    return a_fleet({**changes, "pools.local": pool})


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, checkpoint):
    return fleet_of(models_in(tmp_path_factory.mktemp("doors"), checkpoint))


@pytest.fixture(scope="module")
def device():
    return Device("cpu", num_threads=1)


@pytest.fixture(scope="module")
def loaded(fleet, device):
    """Every checkpoint, loaded but not warmed up."""
    specs = checkpoint_specs(fleet, fleet.models, REPO)
    checkpoints = LoadedCheckpoints(specs, max_batch_rows=MAX_BATCH_ROWS)
    with torch.inference_mode():
        checkpoints.prepare(device)
        for spec in checkpoints.specs.values():
            checkpoints.add(checkpoints.read(spec, device))
            checkpoints.serve(spec.name)
    return checkpoints


@pytest.fixture(scope="module")
def known(loaded):
    """What the gateway knows of them: the published values, read back."""
    return {
        name: capabilities.read(json.loads(json.dumps(one.capabilities.as_json())))
        for name, one in loaded.held.items()
    }


def a_random_request(chance, fleet):
    """A request of which each field is plausible, and the whole often is not."""
    name = chance.choice(list(fleet.models))
    model = fleet.models[name]

    def picture(likely=0.4):
        return UUID(int=1) if chance.random() < likely else None

    init_image = picture(0.6)
    return RequestedParams(
        prompt="a red circle",
        negative_prompt=chance.choice(["", "", "a blue star"]),
        model=name,
        tier=chance.choice([None, "fast", "quality", "batch"]),
        size=chance.choice([None, *model.sizes]),
        steps=chance.choice([None, 1, 2, 3, 4, 7, 20, 49, 50, 51, 60]),
        guidance=chance.choice([None, 0.0, 1.0, 1.5, 9.0]),
        sampler=chance.choice([None, *model.samplers]),
        seed=chance.choice([None, -1, 0, 2**53 - 9]),
        n=chance.choice([1, 2]),
        init_image=init_image,
        mask=picture() if init_image is not None or chance.random() < 0.1 else None,
        control_image=picture(0.2),
        strength=chance.choice([None, None, 0.01, 0.05, 0.1429, 0.3, 0.5, 1.0]),
        clip_skip=chance.choice([None, None, None, 0, 1, 2, 12]),
        adapters=chance.choice([(), (), (RequestedAdapter("ink", chance.uniform(-4, 4)),)]),
    )


def accepted_of(fleet, known, count):
    """Resolve `count` random requests; give those that are accepted, and count them by model."""
    chance = random.Random(20261201)
    tried, accepted = Counter(), []
    for _ in range(count):
        requested = a_random_request(chance, fleet)
        tried[requested.model] += 1
        try:
            accepted.append(resolve(fleet, requested, default_seed=7, known=known))
        except InvalidParam:
            continue
    return tried, accepted


def request_of(job, number):
    """What the worker makes of the accepted job; its pictures are scaled to the job's size."""
    grey = np.full((job.height_px, job.width_px, 3), 127, np.uint8)
    pictures = {
        role: Picture(grey[..., 0] if role == "mask" else grey)
        for role, file_id in (
            ("init_image", job.init_file_id),
            ("mask", job.mask_file_id),
            ("control_image", job.control_file_id),
        )
        if file_id is not None
    }
    return ImageRequest(
        id=f"{number}",
        group=f"{number}",
        checkpoint=checkpoint_name(job.model, job.model_version),
        **rendering(job, 0, pictures),
    )


def render(image, runner):
    runner.start(image)
    while not image.is_denoised:
        runner.advance(image, runner.predict(Batch.alone(image))[0])
    pixels = runner.decode(image).pixels()
    runner.release(image)
    return pixels


def test_every_accepted_request_passes_the_engine_s_check(fleet, loaded, known):
    started = time.perf_counter()

    tried, accepted = accepted_of(fleet, known, REQUESTS)

    for number, job in enumerate(accepted):
        loaded.admit(request_of(job, number))  # raises for what it cannot render
    taken_s = time.perf_counter() - started
    print(f"\n{REQUESTS} requests, {len(accepted)} accepted, none refused later: {taken_s:.1f} s")
    assert set(tried) == {job.model for job in accepted} == set(fleet.models)


def test_a_sample_of_the_accepted_requests_is_rendered(fleet, loaded, known, device):
    _, accepted = accepted_of(fleet, known, REQUESTS)
    quick = [job for job in accepted if job.num_steps <= 4]
    sample = {job.model: job for job in quick} | dict(enumerate(quick[:RENDERED]))
    runner = Runner(loaded, device, ConditioningCache(2**20))

    for number, job in enumerate(sample.values()):
        pixels = render(loaded.admit(request_of(job, number)), runner)
        assert pixels.shape == (job.height_px, job.width_px, 3)
