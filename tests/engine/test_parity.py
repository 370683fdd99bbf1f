"""Alone and unpadded, an image is the bits of diffusers' own `pipe(...)`: every allowed sampler, with and without guidance."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from engine_builders import SAMPLERS as TESTED
from engine_builders import a_request, a_spec, an_image

from engine.conditioning import ConditioningCache
from engine.device import Device
from engine.inflight import ImageState
from engine.loading import load_checkpoint
from engine.runner import Runner
from engine.samplers import SAMPLERS
from engine.scheduler import Batch


def a_pipe(path, dtype=torch.float32):
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, requires_safety_checker=False, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def piped(pipe, request, output_type="latent"):
    """The same request through diffusers: latents, or pixels."""
    recipe = SAMPLERS[request.sampler]
    given = pipe.scheduler
    pipe.scheduler = getattr(diffusers, recipe.scheduler_class).from_config(given.config, **recipe.overrides)
    out = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width_px,
        height=request.height_px,
        num_inference_steps=request.num_steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type=output_type,
    ).images
    pipe.scheduler = given
    return out


def stepped(runner, request) -> torch.Tensor:
    """The same request through the runner, alone: latents."""
    image = an_image(request.id)
    image.request, image.rows, image.state = request, 2 if request.is_guided else 1, ImageState.RUNNING
    runner.encode(image)
    for _ in range(image.num_steps):
        runner.advance(image, runner.predict(Batch.alone(image))[0])
        image.step += 1
    return image.tensors.latents


@pytest.fixture(scope="module")
def pairs(checkpoint, epsilon_checkpoint):
    """(runner, pipe) for both ways of prediction, and for bf16."""

    def pair(path, precision="fp32", dtype=torch.float32):
        device = Device("cpu", num_threads=1)
        loaded = load_checkpoint(a_spec(path, precision=precision), device)
        return Runner({"tiny": loaded}, device, ConditioningCache(1 << 20)), a_pipe(path, dtype)

    return {"v_prediction": pair(checkpoint), "epsilon": pair(epsilon_checkpoint), "bf16": pair(checkpoint, "bf16", torch.bfloat16)}


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", TESTED)
def test_latents_are_the_bits_of_the_pipeline(pairs, prediction, sampler, guidance):
    runner, pipe = pairs[prediction]
    request = a_request(sampler=sampler, guidance=guidance, num_steps=5, negative_prompt="a green star", seed=11)

    latents = stepped(runner, request)

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, piped(pipe, request))


@pytest.mark.parametrize("sampler", TESTED)
def test_latents_are_the_bits_of_the_pipeline_in_bf16_too(pairs, sampler):
    runner, pipe = pairs["bf16"]
    request = a_request(sampler=sampler, num_steps=3)

    assert torch.equal(stepped(runner, request), piped(pipe, request))


@pytest.mark.parametrize(("width_px", "height_px"), [(64, 64), (96, 64)])
def test_pixels_are_the_bits_of_the_pipeline(engine, pairs, width_px, height_px):
    request = a_request(width_px=width_px, height_px=height_px, sampler="dpmpp_2m", num_steps=6)

    finished = engine.submit(request).result(60)

    expected = piped(pairs["v_prediction"][1], request, output_type="np")[0]
    assert finished.pixels.shape == (height_px, width_px, 3)
    assert np.array_equal(finished.pixels, (expected * 255).round().astype(np.uint8))


def test_every_allowed_sampler_is_tested():
    assert set(TESTED) == set(SAMPLERS)


def test_every_allowed_sampler_makes_one_forward_per_step(checkpoint):
    from engine.samplers import fresh_sampler

    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    for name in SAMPLERS:
        for num_steps in (1, 2, 4, 20, 50):
            sampler = fresh_sampler(name, config)
            sampler.set_timesteps(num_steps)
            assert len(sampler.timesteps) == num_steps, (name, num_steps)
