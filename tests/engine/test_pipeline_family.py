"""Any diffusers pipeline, unmodified, batched with strangers step by step.

The list in tiny_pipelines.py, each in every respect.
"""

import copy
import gc
import inspect
import json
import os
import random
import shutil
import threading
import weakref
from dataclasses import replace
from functools import cache, wraps

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import (
    OTHER_PROMPT,
    OTHERS,
    PIPELINES,
    SIZE,
    a_mask,
    a_picture,
    a_pipeline_request,
    a_pipeline_spec,
    save_tiny_pipeline,
)

from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.contract import State
from engine.families.coroutine import Coroutine, Returned
from engine.families.pipeline.folder import INDEX
from engine.families.pipeline.running import RunningCall
from engine.inflight import BatchKey, InFlight
from engine.loading import load_checkpoint
from engine.request import Determinism, Fork

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def loaded(tmp_path_factory, one_torch_thread):
    """loaded(name, precision, family): a pipeline of the list on disk, loaded by a family."""

    @cache
    def folder(name):
        return save_tiny_pipeline(name, tmp_path_factory.mktemp("pipeline") / name)

    @cache
    def load(name, precision="fp32", family="pipeline"):
        spec = a_pipeline_spec(name, folder(name), precision=precision, family=family)
        return load_checkpoint(spec, Device("cpu", num_threads=1)).family

    load.folder = folder
    return load


@pytest.fixture(scope="session")
def piped(loaded):
    """piped(name, request): the pixels, 0..1, of diffusers' own `pipe(...)`, [1, 3, h, w]."""

    @cache
    def pipe(name, precision):
        built = diffusers.DiffusionPipeline.from_pretrained(
            loaded.folder(name), dtype=DTYPES[precision]
        )
        built.set_progress_bar_config(disable=True)
        return built

    def call(name, request, precision="fp32"):
        pictures = {"init_image": "image", "mask": "mask_image", "control_image": "image"}
        tiny = (PIPELINES | OTHERS)[name]
        taken = inspect.signature(type(pipe(name, precision)).__call__).parameters
        given = {
            pictures[field]: Image.fromarray(getattr(request, field).pixels)
            for field in tiny.pictures
        }
        wanted = {"height": request.height_px, "width": request.width_px}
        if request.init_image is not None and request.strength is not None:
            wanted["strength"] = request.strength
        given |= {argument: value for argument, value in wanted.items() if argument in taken}
        return pipe(name, precision)(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            **{tiny.guidance: request.guidance},
            **given,
            **tiny.options | request.options,
        ).images

    return call


def in_flight(family, request) -> InFlight:
    """The request as the engine would queue it for this family."""
    family.check(request)
    key = BatchKey(
        request.checkpoint, request.height_px, request.width_px, family.text_length(request)
    )
    return InFlight(request=request, batch_key=key, rows=family.rows(request))


@torch.inference_mode()
def started(family, request) -> InFlight:
    image = in_flight(family, request)
    family.start(image, None)
    return image


@torch.inference_mode()
def step_together(family, images, until=lambda: False) -> list[tuple[list[str], int]]:
    """Denoise all images, whoever agrees on a forward in one, a pinned one always in its bucket.

    The result says who was in each forward, in how many rows.
    """
    forwards = []
    while not until() and (waiting := [image for image in images if not image.is_denoised]):
        key = waiting[len(forwards) % len(waiting)].batch_key
        sharing = [image for image in waiting if image.batch_key == key]
        rows = max([image.request.pinned_rows or 0 for image in sharing]) or sum(
            image.rows for image in sharing
        )
        assert sum(image.rows for image in sharing) <= rows
        parts = family.predict(sharing, rows)
        forwards.append(([image.id for image in sharing], rows))
        for image, part in zip(sharing, parts, strict=True):
            family.advance(image, part)
    return forwards


@torch.inference_mode()
def decoded(family, image) -> torch.Tensor:
    """The pixels as the engine's runner scales them, 0..1."""
    return (family.decode(image) * 0.5 + 0.5).clamp(0, 1).float()


def rendered(family, request) -> torch.Tensor:
    """One image, alone."""
    image = started(family, request)
    step_together(family, [image])
    pixels = decoded(family, image)
    family.release(image)
    return pixels


def strangers(name, **changes):
    """Two requests that have as little in common as may share a forward.

    Other prompt, steps, guidance, seed and pictures.
    """
    one = a_pipeline_request(name, "one", **changes)
    pictures = {"init_image": a_picture(11), "control_image": a_picture(12)}
    other = a_pipeline_request(
        name, "other", prompt=OTHER_PROMPT, num_steps=5, guidance=6.0, seed=8, **changes
    )
    return one, replace(
        other, **{field: pictures[field] for field in PIPELINES[name].pictures if field in pictures}
    )


def pinned(request, bucket_rows=4):
    return replace(request, determinism=Determinism.REPRODUCIBLE, bucket_rows=bucket_rows)


# --- every pipeline of the list -------------------------------------------------------------------


# The three other Stable Diffusion pipelines call the same network.
IN_BF16 = [name for name in PIPELINES if not name.startswith("sd-")]
# Of an UNet, a transformer, and one that casts its latents itself.
SAMPLE = ("sdxl", "z-image", "sana")
IN_BOTH = [pytest.param(name, "fp32", id=name) for name in PIPELINES] + [
    pytest.param(
        name, "bf16", id=f"{name} bf16", marks=[] if name in SAMPLE else [pytest.mark.slow]
    )
    for name in IN_BF16
]


def assert_same_bits(name, pixels, expected) -> None:
    """Sana's last bits differ from its pipeline's on some processors (seen on an AMD EPYC), also
    with MKL in its strict mode.
    """
    if name == "sana":
        assert torch.allclose(pixels, expected, rtol=0, atol=1e-4)
    else:
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("name", "precision"), IN_BOTH)
def test_alone_an_image_is_the_bits_of_its_pipeline(loaded, piped, name, precision):
    for request in (
        a_pipeline_request(name),
        a_pipeline_request(name, guidance=PIPELINES[name].unguided, num_steps=2, seed=3),
    ):
        pixels = rendered(loaded(name, precision), request)

        expected = piped(name, request, precision)
        assert expected.std() > 0.01
        assert_same_bits(name, pixels, expected.float())


@pytest.mark.parametrize("name", PIPELINES)
def test_strangers_share_forwards_and_get_what_they_would_get_alone(loaded, piped, name):
    family, tiny = loaded(name), PIPELINES[name]
    requests = [
        *strangers(name),
        a_pipeline_request(name, "unguided", guidance=tiny.unguided, num_steps=4, seed=9),
    ]

    images = [started(family, request) for request in requests]
    assert [image.rows for image in images] == [tiny.rows[1], tiny.rows[1], tiny.rows[0]]
    assert all(image.rows <= family.rows(image.request) for image in images)
    forwards = step_together(family, images)

    assert sum(len(ids) == 3 for ids, _ in forwards) >= 2
    for image, request in zip(images, requests, strict=True):
        # Other shapes may take other kernels; the largest difference seen was 1e-6.
        assert torch.allclose(decoded(family, image), piped(name, request), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "precision"), IN_BOTH)
def test_in_a_pinned_bucket_an_image_has_the_same_bits_alone_and_in_company(
    loaded, name, precision
):
    family = loaded(name, precision)
    one, other = strangers(name)
    alone = rendered(family, pinned(one))

    image, neighbour = started(family, pinned(one)), started(family, pinned(other))
    forwards = step_together(family, [neighbour, image])

    assert sum(ids == ["other", "one"] for ids, _ in forwards) >= 2
    assert {rows for _, rows in forwards} == {4}
    assert torch.equal(decoded(family, image), alone)
    family.release(neighbour)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_goes_on_elsewhere_with_the_same_bits_from_wherever_it_was(loaded, name):
    family, elsewhere = loaded(name), loaded.__wrapped__(name)
    request = pinned(a_pipeline_request(name, num_steps=2), bucket_rows=2)
    image = started(family, request)
    saved = [(image.step, through_a_file(family.save(image)))]
    while not image.is_denoised:
        calls = len(step_together(family, [image], until=iter([False, True]).__next__))
        assert calls == 1
        saved.append((image.step, through_a_file(family.save(image))))
    expected = decoded(family, image)

    for step, state in saved:
        resumed = in_flight(elsewhere, request)
        resumed.step, resumed.is_denoised = step, step == image.num_steps
        with torch.inference_mode():
            elsewhere.restore(resumed, state, None)
        assert (resumed.step, resumed.num_steps, resumed.is_denoised) == (
            step,
            image.num_steps,
            step == image.num_steps,
        )
        step_together(elsewhere, [resumed])
        assert torch.equal(decoded(elsewhere, resumed), expected)


def through_a_file(state: State) -> State:
    """What is left of it when it has been written and read."""
    assert all(
        tensor.device.type == "cpu" and not tensor.is_meta for tensor in state.tensors.values()
    )
    return State(
        {name: tensor.clone() for name, tensor in state.tensors.items()},
        json.loads(json.dumps(state.facts)),
    )


def test_a_sampler_that_writes_into_its_answers_spoils_no_snapshot(loaded, monkeypatch):
    family = loaded("sd")
    unguided = a_pipeline_request("sd", sampler="ddim", guidance=1.0)
    request = pinned(unguided, bucket_rows=2)  # a prediction goes to the sampler as it came
    step = diffusers.DDIMScheduler.step

    @wraps(step)  # pipelines ask for its signature
    def spoiling(sampler, model_output, *arguments, **more):
        moved = step(sampler, model_output, *arguments, **more)
        model_output.zero_()
        return moved

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", spoiling)
    image = started(family, request)
    step_together(family, [image], until=lambda: image.step == 2)
    saved = through_a_file(family.save(image))
    expected = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    resumed = in_flight(family, request)
    with torch.inference_mode():
        family.restore(resumed, saved, None)
    again = family.save(resumed)

    for tensors in (saved.tensors, again.tensors):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    family.release(image)
    family.release(resumed)


# --- what is shared, and who shares it ------------------------------------------------------------


def test_flux_with_true_guidance_is_batched_too(loaded, piped):
    family = loaded("flux")
    requests = [replace(request, options={"true_cfg_scale": 2.0}) for request in strangers("flux")]

    images = [started(family, request) for request in requests]
    forwards = step_together(family, images)

    assert sum(len(ids) == 2 for ids, _ in forwards) >= 2 * 3
    for image, request in zip(images, requests, strict=True):
        assert torch.allclose(decoded(family, image), piped("flux", request), rtol=0, atol=1e-5)


def test_prompts_of_different_length_share_a_forward_of_z_image_unless_the_bits_count(
    loaded, piped
):
    family = loaded("z-image")
    short = a_pipeline_request("z-image", "short", prompt="a star")
    long = a_pipeline_request("z-image", "long", prompt="a small star on the large red background")

    images = [started(family, short), started(family, long)]
    forwards = step_together(family, images)

    assert all(len(ids) == 2 for ids, _ in forwards)
    for image in images:
        assert torch.allclose(
            decoded(family, image), piped("z-image", image.request), rtol=0, atol=1e-5
        )
    pinned_images = [started(family, pinned(short)), started(family, pinned(long))]
    assert pinned_images[0].batch_key != pinned_images[1].batch_key
    for image in pinned_images:
        family.release(image)


def test_a_pipeline_whose_rows_cannot_be_told_apart_is_served_each_call_alone(loaded, piped):
    family = loaded("ddim")
    requests = [
        a_pipeline_request("ddim", id, guidance=1.0, seed=seed, num_steps=2)
        for id, seed in (("one", 1), ("other", 2))
    ]

    images = [started(family, request) for request in requests]
    assert [image.batch_key.call for image in images] == ["unet alone one", "unet alone other"]
    forwards = step_together(family, images)

    assert [ids for ids, _ in forwards] == [["one"], ["other"]] * 2
    for image, request in zip(images, requests, strict=True):
        assert torch.equal(decoded(family, image), drawn(loaded, request))


def drawn(loaded, request):
    """What DDIMPipeline gives, as [1, 3, h, w]."""
    pipe = diffusers.DDIMPipeline.from_pretrained(loaded.folder("ddim"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(request.seed)
    pixels = pipe(
        generator=generator, num_inference_steps=request.num_steps, output_type="np"
    ).images
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_answers_that_are_objects_of_diffusers_are_replayed_too(loaded):
    family = loaded("ddim")
    request = a_pipeline_request("ddim", guidance=1.0)
    image = started(family, request)
    step_together(family, [image], until=lambda: image.step == 2)
    state = through_a_file(family.save(image))
    family.release(image)

    resumed = in_flight(family, request)
    with torch.inference_mode():
        family.restore(resumed, state, None)
    step_together(family, [resumed])

    assert torch.equal(decoded(family, resumed), drawn(loaded, request))


def test_a_stranger_that_fails_takes_nobody_with_it(loaded):
    family = loaded("sana")
    one, other = (pinned(request) for request in strangers("sana"))
    alone = rendered(family, one)
    before = {name: dict(vars(network)) for name, network in family.networks().items()}

    image, failing = started(family, one), started(family, other)
    parts = family.predict([image, failing], 4)
    with torch.inference_mode():
        family.advance(image, parts[0])
        with pytest.raises(ValueError):
            family.advance(failing, (torch.zeros(1),))
    family.release(failing)
    step_together(family, [image])

    assert torch.equal(decoded(family, image), alone)
    assert {name: dict(vars(network)) for name, network in family.networks().items()} == before


def test_an_image_can_be_canceled_wherever_it_is_and_the_others_do_not_notice(loaded):
    family = loaded("sana")
    one, other = (pinned(request) for request in strangers("sana"))
    alone = rendered(family, one)
    threads = threading.active_count()

    image = started(family, one)
    for steps in range(4):
        canceled = started(family, other)
        step_together(
            family, [canceled], until=lambda canceled=canceled, steps=steps: canceled.step == steps
        )
        if not image.is_denoised:
            step_together(family, [image], until=lambda start=image.step: image.step > start)
        family.release(canceled)
        family.release(canceled)
        assert canceled.held is None
    never_started = in_flight(family, other)
    family.release(never_started)

    assert torch.equal(decoded(family, image), alone)
    family.release(image)
    assert threading.active_count() == threads


def test_no_thread_is_left_of_fifty_images_canceled_at_random_moments(loaded):
    family, plain = loaded("ddim"), loaded("ddim", family="plain")
    dice = random.Random(7)
    threads = threading.active_count()

    for _ in range(50):
        chosen = dice.choice([family, plain])
        image = started(chosen, a_pipeline_request("ddim", guidance=1.0, num_steps=2))
        step_together(
            chosen, [image], until=lambda image=image, steps=dice.randrange(4): image.step == steps
        )
        if image.is_denoised and dice.random() < 0.5:
            decoded(chosen, image)
        chosen.release(image)

    assert threading.active_count() == threads


def test_a_released_image_leaves_nothing_on_the_device(loaded):
    family = loaded("sana")
    image = started(family, a_pipeline_request("sana", num_steps=3))
    step_together(family, [image], until=lambda: image.step == 2)
    held = [weakref.ref(held) for held in (image.held, image.held.pipe, image.held.pipe.scheduler)]

    gc.disable()  # a device's memory does not wait for the collector
    try:
        family.release(image)
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


def test_the_thread_of_a_call_brings_no_threads_of_its_own(loaded):
    """Until torch is told otherwise in it, a new thread convolves on all cores.

    Slower on a busy machine, and other bits.
    """

    pixels, weights = torch.ones(8, 64, 64, 64), torch.ones(64, 64, 3, 3)

    def threads_of_a_convolution(ask):
        before = len(os.listdir("/proc/self/task"))
        torch.nn.functional.conv2d(pixels, weights)
        return len(os.listdir("/proc/self/task")) - before

    coroutine = Coroutine(threads_of_a_convolution, within=loaded("ddim")._calls.surroundings())

    assert coroutine.resume() == Returned(0)


def test_the_end_of_a_call_does_not_reset_what_neighbours_have_on_the_network(loaded):
    family = loaded("sana")
    transformer = family.networks()["transformer"]
    resets = []
    transformer._reset_stateful_cache = lambda recurse=True: resets.append(recurse)

    try:
        rendered(family, a_pipeline_request("sana"))
    finally:
        del transformer._reset_stateful_cache

    assert resets == []


def test_a_decoder_cast_for_one_image_is_cast_back_when_that_image_fails(tmp_path):
    """SDXL decodes fp16 latents in fp32 by casting the VAE that all images share."""
    spec = a_pipeline_spec("sdxl", save_tiny_pipeline("sdxl", tmp_path / "sdxl"), precision="fp16")
    family = load_checkpoint(spec, Device("cpu", num_threads=1)).family
    vae = family._pipe.vae
    images = [
        started(family, a_pipeline_request("sdxl", "failing")),
        started(family, a_pipeline_request("sdxl", "sound")),
    ]
    step_together(family, images)
    assert vae.dtype == torch.float16

    def fail(module, arguments):
        assert arguments[0].dtype == torch.float32
        raise MemoryError

    hook = vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        decoded(family, images[0])
    hook.remove()

    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}
    assert torch.isfinite(decoded(family, images[1])).all()
    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}


def test_the_control_networks_answers_are_most_of_the_bytes_and_not_saved(loaded):
    family = loaded("sd-controlnet")
    image = started(family, a_pipeline_request("sd-controlnet"))
    step_together(family, [image], until=lambda: image.batch_key.call.startswith("unet"))
    between = sum(tensor.nbytes for tensor in family.save(image).tensors.values())
    step_together(family, [image], until=lambda: image.step == 1)
    after = family.save(image).tensors
    family.release(image)

    assert sum(tensor.nbytes for tensor in after.values()) < between / 4
    assert [tuple(tensor.shape) for tensor in after.values()] == [(2, 4, SIZE // 4, SIZE // 4)]


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 6), (0.5, 3)])
def test_steps_are_those_the_pipeline_takes(loaded, piped, strength, steps):
    request = a_pipeline_request("sd-img2img", num_steps=6, sampler="ddim", strength=strength)
    family = loaded("sd-img2img")
    image = started(family, request)

    assert (image.step, image.num_steps) == (0, steps)
    step_together(family, [image])

    assert (image.step, image.is_denoised) == (steps, True)
    family.release(image)


def test_with_the_weights_of_a_picture_half_kept_the_bits_are_still_the_pipelines(loaded, piped):
    request = a_pipeline_request("sd-img2img", num_steps=6, strength=0.5)

    assert torch.equal(rendered(loaded("sd-img2img"), request), piped("sd-img2img", request))


@pytest.mark.parametrize("name", ["sd-img2img", "sd-inpaint", "flux-kontext", "instruct-pix2pix"])
def test_without_a_strength_an_image_is_what_the_pipeline_makes_by_itself(loaded, piped, name):
    request = a_pipeline_request(name, num_steps=5, guidance=1.0, strength=None)
    loaded(name).check(request)

    pixels = rendered(loaded(name), request)

    assert torch.equal(pixels, piped(name, request))
    if name == "sd-img2img":  # whose own strength is 0.8
        assert not torch.equal(pixels, rendered(loaded(name), replace(request, strength=1.0)))


def test_the_own_strength_of_a_pipeline_leaves_a_step_or_the_request_is_refused(loaded):
    with pytest.raises(UnsupportedRequest) as refused:
        loaded("sd-img2img").check(a_pipeline_request("sd-img2img", num_steps=1, strength=None))

    assert refused.value.field == "strength"


@pytest.mark.parametrize("name", ["flux-kontext", "instruct-pix2pix"])
def test_an_edit_pipeline_takes_no_strength_but_1_and_needs_none(loaded, name):
    for strength in (None, 1.0):
        loaded(name).check(a_pipeline_request(name, strength=strength))

    with pytest.raises(UnsupportedRequest) as refused:
        loaded(name).check(a_pipeline_request(name, strength=0.8))
    assert refused.value.field == "strength"


def test_a_pipeline_that_makes_another_size_than_is_offered_stops_the_start(loaded):
    sizes = ((SIZE, SIZE), (SIZE, 2 * SIZE))  # its options say the area of the first
    spec = a_pipeline_spec("flux-kontext", loaded.folder("flux-kontext"), sizes=sizes)
    engine = Engine(EngineConfig(), [spec])

    with pytest.raises(UnsupportedRequest) as refused:
        engine.start()

    assert refused.value.field == "sizes"
    for told in ("FluxKontextPipeline", "where 32x64 is asked for", "max_area, _auto_resize"):
        assert told in refused.value.problem


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_sde", "unipc"])
def test_a_sampler_of_the_house_gives_the_bits_of_the_pipeline_with_that_scheduler(loaded, sampler):
    from engine.samplers import fresh_sampler

    pipe = diffusers.DiffusionPipeline.from_pretrained(loaded.folder("sd"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = fresh_sampler(sampler, pipe.scheduler.config)
    request = a_pipeline_request("sd", sampler=sampler)
    expected = pipe(
        request.prompt,
        negative_prompt="",
        height=SIZE,
        width=SIZE,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
    ).images

    assert torch.equal(rendered(loaded("sd"), request), expected)


def test_previews_are_kept_only_while_somebody_watches(loaded):
    family = loaded("sd")
    image = started(family, a_pipeline_request("sd", sampler="ddim", num_steps=2))
    step_together(family, [image], until=lambda: image.step == 1)
    assert family.clean_latents(image) is None

    image.is_watched = True
    step_together(family, [image])
    clean = family.clean_latents(image)
    family.release(image)

    assert clean.shape == (1, 4, SIZE // 4, SIZE // 4)
    assert torch.isfinite(clean).all()


@pytest.mark.parametrize("name", ["sd", "sana", "qwen-image"])
def test_previews_are_projected_by_what_the_vae_itself_says(loaded, name):
    with torch.inference_mode():
        projector = loaded(name).projector()

    if name == "qwen-image":  # its latents are packed, and no preview is ever made of them
        assert projector is None
    else:
        assert projector.project(torch.zeros(1, 4, 3, 5)).shape == (3, 5, 3)


def test_a_deep_copy_of_an_images_sampler_steps_on_its_own(loaded):
    family = loaded("sd")
    image = started(family, a_pipeline_request("sd", sampler="ddim"))
    sampler = image.held.pipe.scheduler

    other = copy.deepcopy(sampler)
    other.set_timesteps(7)

    assert (len(other.timesteps), len(sampler.timesteps)) == (7, 3)
    assert type(other).__name__ == "DDIMScheduler"
    family.release(image)


def test_pixels_of_a_pipeline_reach_the_runner_without_the_loss_of_a_bit(loaded):
    """A VAE's pixels come from -1..1 and survive the way back in any case.

    A pipeline may have done more to them than that.
    """
    given = torch.rand((1, 3, 256, 256), generator=torch.Generator().manual_seed(7)) / 3
    size = {"width_px": 256, "height_px": 256}
    image = in_flight(loaded("sd3"), a_pipeline_request("sd3", **size))
    image.held = RunningCall(Coroutine(lambda ask: None), returned=Returned((given,)))

    assert torch.equal(decoded(loaded("sd3"), image), given)


# --- the last resort ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd-img2img", "sd-controlnet", "flux", "sana", "z-image"])
def test_a_plain_call_is_the_bits_of_its_pipeline_in_turns_of_a_step(loaded, piped, name):
    family = loaded(name, family="plain")
    requests = strangers(name)
    images = [started(family, request) for request in requests]

    steps = []
    while not all(image.is_denoised for image in images):
        for image in images:
            if not image.is_denoised:
                with torch.inference_mode():
                    family.advance(image, family.predict([image], 1)[0])
                steps.append((image.id, image.step))

    assert [step for id, step in steps if id == "other"] == list(range(1, images[1].num_steps + 1))
    assert images[0].batch_key != images[1].batch_key
    for image, request in zip(images, requests, strict=True):
        assert image.rows == 1
        assert_same_bits(name, decoded(family, image), piped(name, request))


def test_a_plain_call_can_be_canceled_between_its_steps(loaded):
    family = loaded("sana", family="plain")
    threads = threading.active_count()

    for steps in range(4):
        image = started(family, a_pipeline_request("sana", num_steps=3))
        with torch.inference_mode():
            for _ in range(steps):
                family.advance(image, None)
        assert image.step == steps
        family.release(image)

    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("name", "field"),
    [("sd-img2img", "init_image"), ("sd-inpaint", "mask"), ("sd-controlnet", "control_image")],
)
def test_a_plain_call_is_known_to_need_its_pictures(loaded, name, field):
    with pytest.raises(UnsupportedRequest) as refused:
        loaded(name, family="plain").check(a_pipeline_request(name, **{field: None}))

    assert refused.value.field == field


def test_a_plain_call_cannot_be_saved(loaded):
    family = loaded("sana", family="plain")
    image = started(family, a_pipeline_request("sana"))

    with pytest.raises(UnsupportedRequest) as refused:
        family.save(image)

    assert refused.value.field == "snapshot"
    family.release(image)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "changes"),
    [
        ("sd", "width_px", {"width_px": SIZE + 4}),
        ("flux", "height_px", {"height_px": SIZE + 2}),
        ("sd", "sampler", {"sampler": "flow_euler"}),
        ("flux", "sampler", {"sampler": "ddim"}),
        ("sana", "sampler", {"sampler": "ddim"}),
        ("sd", "num_steps", {"num_steps": 0}),
        ("sd", "options", {"options": {"steps": 3}}),
        ("sd", "options", {"options": {"num_images_per_prompt": 2}}),
        ("sd", "options", {"options": {"output_type": "latent"}}),
        ("sd", "init_image", {"init_image": a_picture(1)}),
        ("sd", "control_image", {"control_image": a_picture(1)}),
        ("sd", "strength", {"strength": 0.5}),
        ("sd-img2img", "init_image", {"init_image": None}),
        ("sd-img2img", "init_image", {"init_image": a_picture(1, size=2 * SIZE)}),
        ("sd-img2img", "mask", {"mask": a_mask()}),
        ("sd-img2img", "strength", {"strength": 0.1}),
        ("sd-inpaint", "mask", {"mask": None}),
        ("sd-controlnet", "control_image", {"control_image": None}),
        ("flux", "clip_skip", {"clip_skip": 1}),
        ("sd", "fork", {"fork": Fork("earlier", 1)}),
        ("sd", "keep_steps", {"keep_steps": (1,)}),
    ],
)
def test_a_request_that_a_pipeline_cannot_render_is_refused_by_field(loaded, name, field, changes):
    with pytest.raises(UnsupportedRequest) as refused:
        loaded(name).check(a_pipeline_request(name, **changes))

    assert refused.value.field == field


def test_an_option_of_the_call_is_passed_on(loaded, piped):
    request = a_pipeline_request("sd", options={"guidance_rescale": 0.7})

    pixels = rendered(loaded("sd"), request)

    assert torch.equal(pixels, piped("sd", request))
    assert not torch.equal(pixels, piped("sd", a_pipeline_request("sd")))


def test_an_option_of_a_request_goes_before_the_catalogs(loaded, piped):
    options = {"guidance_rescale": 0.2}
    spec = a_pipeline_spec("sd", loaded.folder("sd"), options=options)
    family = load_checkpoint(spec, Device("cpu", num_threads=1)).family
    request = a_pipeline_request("sd", options={"guidance_rescale": 0.7})

    assert torch.equal(rendered(family, request), piped("sd", request))
    unsaid = rendered(family, replace(request, options={}))
    assert torch.equal(unsaid, piped("sd", replace(request, options=options)))


def test_facts_hold_what_the_index_alone_says_of_a_pipeline(folder):
    before = load(folder).facts()
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"requires_aesthetics_score": True}))

    assert load(folder).facts() != before


def test_facts_hold_what_sets_a_pipeline_apart(loaded):
    facts = loaded("sana").facts()

    assert facts["pipeline"] == "SanaPipeline"
    assert facts["options"] == dict(PIPELINES["sana"].options)
    assert facts["attention"] == {
        "transformer": ["SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0"]
    }
    assert json.loads(json.dumps(facts)) == facts


def test_adapters_can_lie_over_denoisers_and_text_encoders(loaded):
    assert set(loaded("sd-controlnet").networks()) == {"unet", "controlnet", "text_encoder"}


@pytest.fixture
def folder(loaded, tmp_path):
    return shutil.copytree(loaded.folder("sana"), tmp_path / "sana")


def load(folder, **changes):
    return load_checkpoint(
        a_pipeline_spec("sana", folder, **changes), Device("cpu", num_threads=1)
    ).family


@pytest.mark.parametrize(
    "place",
    [
        ["own_code", "SanaTransformer2DModel"],
        ["os", "system"],
        ["diffusers", "NoSuchModel"],
        ["diffusers", "utils"],
        ["diffusers"],
    ],
)
def test_parts_from_elsewhere_than_diffusers_and_transformers_are_refused(folder, place):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"transformer": place}))

    with pytest.raises(CheckpointCorrupt) as refused:
        load(folder)

    assert refused.value.file == INDEX


@pytest.mark.parametrize(
    "name",
    [
        "OwnPipeline",
        "UNet2DModel",
        ["pipeline", "OwnPipeline"],
        "KandinskyV22CombinedPipeline",
        None,
    ],
)
def test_a_class_that_is_no_single_pipeline_of_diffusers_is_refused(folder, name):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"_class_name": name}))
    (folder / "pipeline.py").write_text("raise SystemExit('code from the folder ran')")

    with pytest.raises(UnsupportedRequest) as refused:
        load(folder)

    assert refused.value.field == "pipeline_class"


def test_the_catalog_may_name_another_class_than_the_folder(loaded, piped):
    family = load_checkpoint(
        a_pipeline_spec(
            "sd-img2img", loaded.folder("sd"), pipeline_class="StableDiffusionImg2ImgPipeline"
        ),
        Device("cpu", num_threads=1),
    ).family

    assert family.facts()["pipeline"] == "StableDiffusionImg2ImgPipeline"


def test_a_folder_without_an_index_is_refused(folder):
    (folder / INDEX).unlink()

    with pytest.raises(CheckpointCorrupt) as refused:
        load(folder)

    assert refused.value.file == INDEX


def test_an_option_in_the_catalog_that_the_pipeline_does_not_take_stops_the_load(folder):
    with pytest.raises(UnsupportedRequest) as refused:
        load(folder, options={"true_cfg_scale": 3.0})

    assert refused.value.field == "options"


def test_a_pipeline_that_cannot_be_called_as_the_catalog_says_stops_the_load(folder):
    with pytest.raises(CheckpointCorrupt, match="trial"):
        load(folder, options={"sigmas": 3})


def test_a_lacking_tensor_is_an_error_and_not_a_random_one(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)

    with pytest.raises(CheckpointCorrupt) as refused:
        load(folder)

    assert refused.value.file == "transformer"


def test_the_safety_checker_is_not_read(loaded, tmp_path):
    folder = shutil.copytree(loaded.folder("sd"), tmp_path / "sd")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(
        json.dumps(index | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]})
    )

    assert load_checkpoint(
        a_pipeline_spec("sd", folder), Device("cpu", num_threads=1)
    ).family.networks().keys() == {"unet", "text_encoder"}
