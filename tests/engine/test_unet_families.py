"""SD and SDXL beside parity: what they refuse, how a repainted image is saved and goes on, who may
share its forwards.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from engine_builders import a_request, a_spec
from tiny_checkpoints import (
    a_family,
    a_mask,
    a_picture,
    a_recall,
    decoded,
    denoise,
    in_flight,
    save_repainting,
    save_tiny_sdxl,
    started,
    stepped,
)

from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.families.contract import State
from engine.request import Fork, Picture


@pytest.fixture(scope="module")
def family(checkpoint, tmp_path_factory):
    """family(name): each loaded once."""
    folder = tmp_path_factory.mktemp("families")
    makers = {
        "sd": lambda path: checkpoint,
        "sd 9": lambda path: save_repainting(path, checkpoint),
        "sdxl": lambda path: save_tiny_sdxl(path, EulerDiscreteScheduler()),
        "sdxl mean": lambda path: save_tiny_sdxl(
            path,
            EulerDiscreteScheduler(),
            vae={"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4},
        ),
    }
    families = {}

    def loaded(name):
        if name not in families:
            families[name] = a_family(a_spec(makers[name](folder / name), family=name.split()[0]))
        return families[name]

    return loaded


def a_repaint(id="image", **changes):
    return a_request(
        id,
        **{"init_image": a_picture(), "mask": a_mask(), "strength": 0.8, "num_steps": 5} | changes,
    )


# --- what is refused ---


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("width_px", {"width_px": 60}),
        ("sampler", {"sampler": "heun"}),
        ("num_steps", {"num_steps": 0}),
        ("mask", {"mask": a_mask()}),
        ("strength", {"strength": 0.5}),
        ("strength", {"init_image": a_picture(), "strength": 0.0}),
        ("strength", {"init_image": a_picture(), "strength": 1.5}),
        ("strength", {"init_image": a_picture(), "strength": 0.2}),
        ("init_image", {"init_image": a_picture(96, 64)}),
        ("init_image", {"init_image": a_mask()}),
        ("init_image", {"init_image": Picture(np.zeros((64, 64, 3), dtype=np.float32))}),
        ("mask", {"init_image": a_picture(), "mask": a_picture()}),
        ("mask", {"init_image": a_picture(), "mask": a_mask(64, 96)}),
        ("control_image", {"control_image": a_picture()}),
        ("options", {"options": {"guidance_rescale": 0.7}}),
        ("clip_skip", {"clip_skip": 3}),
        ("fork", {"fork": Fork("other", 2), "init_image": a_picture()}),
        ("fork", {"fork": Fork("other", 4)}),
    ],
)
def test_a_request_that_cannot_be_rendered_is_refused_by_field(family, name, field, changes):
    with pytest.raises(UnsupportedRequest) as refused:
        family(name).check(a_request(**changes))

    assert refused.value.field == field


@pytest.mark.parametrize("changes", [{}, {"init_image": a_picture()}])
def test_a_network_that_sees_the_mask_only_repaints(family, changes):
    family("sd 9").check(a_repaint())

    with pytest.raises(UnsupportedRequest) as refused:
        family("sd 9").check(a_request(**changes))

    assert refused.value.field == "mask"


def test_no_mask_is_taken_where_the_pipeline_would_spoil_what_is_kept(family):
    with pytest.raises(UnsupportedRequest) as refused:
        family("sdxl mean").check(a_repaint())

    assert refused.value.field == "mask"


def test_networks_of_another_family_are_refused_by_file(checkpoint, tmp_path):
    sdxl = save_tiny_sdxl(tmp_path / "sdxl", EulerDiscreteScheduler())

    with pytest.raises(CheckpointCorrupt) as as_sd:
        a_family(a_spec(sdxl))
    with pytest.raises(CheckpointCorrupt) as as_sdxl:
        a_family(a_spec(checkpoint, family="sdxl"))

    assert as_sd.value.file == "unet/config.json"
    assert as_sdxl.value.file == "text_encoder_2"


# --- what is kept of a picture ---


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_latents_that_the_mask_keeps_are_those_of_the_picture(family, name):
    image = stepped(family(name), a_repaint())

    mask, clean = image.tensors.extras["mask"].bool(), image.tensors.extras["clean"]
    assert torch.equal(image.tensors.latents.masked_select(~mask), clean.masked_select(~mask))
    assert not torch.equal(image.tensors.latents.masked_select(mask), clean.masked_select(mask))


# --- saved, restored, forked ---


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpmpp_2m_sde"])
@pytest.mark.parametrize("name", ["sd", "sd 9", "sdxl"])
def test_a_repainted_image_saved_after_any_step_goes_on_with_the_same_bits(family, name, sampler):
    request = a_repaint(sampler=sampler)
    expected = stepped(family(name), request)
    image = started(family(name), request)
    states = [family(name).save(image)]
    with torch.inference_mode():
        while not image.is_denoised:
            family(name).advance(image, family(name).predict([image], image.rows)[0])
            states.append(family(name).save(image))

    for step, state in enumerate(states):
        resumed = in_flight(family(name), request)
        resumed.step = step
        with torch.inference_mode():
            family(name).restore(
                resumed, State(state.tensors, json.loads(json.dumps(state.facts))), a_recall()
            )
        assert resumed.num_steps == 4
        assert resumed.is_denoised == (step == 4)
        assert torch.equal(
            denoise(family(name), resumed).tensors.latents, expected.tensors.latents
        ), step

    assert torch.equal(decoded(family(name), resumed), decoded(family(name), expected))


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_fork_under_the_same_prompt_goes_on_as_the_image_it_came_from(family, name, sampler):
    request = a_request(sampler=sampler)
    image = started(family(name), request)
    with torch.inference_mode():
        for _ in range(2):
            family(name).advance(image, family(name).predict([image], image.rows)[0])
    kept = family(name).latents(image).clone()

    fork = in_flight(family(name), replace(request, id="fork", seed=99, fork=Fork(image.id, 2)))
    fork.step = 2
    with torch.inference_mode():
        family(name).fork(fork, kept, a_recall())

    expected = denoise(family(name), image).tensors.latents
    assert torch.equal(denoise(family(name), fork).tensors.latents, expected)


# --- in company ---


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_images_from_noise_and_from_pictures_share_forwards_and_keep_their_bits(family, name):
    requests = [
        a_request("noise", sampler="euler"),
        a_request("picture", sampler="unipc", init_image=a_picture(), strength=0.9, guidance=1.0),
        a_repaint("repainted", sampler="dpmpp_2m_sde"),
    ]
    alone = [
        denoise(family(name), started(family(name), request), bucket_rows=8).tensors.latents
        for request in requests
    ]

    images = [started(family(name), request) for request in requests]
    with torch.inference_mode():
        while waiting := [image for image in images if not image.is_denoised]:
            for image, prediction in zip(waiting, family(name).predict(waiting, 8), strict=True):
                family(name).advance(image, prediction)

    for image, latents in zip(images, alone, strict=True):
        assert torch.equal(image.tensors.latents, latents), image.id


def test_latents_in_another_memory_layout_are_denoised_to_the_same_bits(family):
    plain, twisted = (started(family("sd"), a_request(sampler="euler")) for _ in range(2))
    twisted.tensors.latents = twisted.tensors.latents.contiguous(memory_format=torch.channels_last)

    assert torch.equal(
        denoise(family("sd"), plain).tensors.latents, denoise(family("sd"), twisted).tensors.latents
    )


# --- what is said ---


def test_a_vae_that_overflows_says_which_halves_run_in_float32(tmp_path):
    path = save_tiny_sdxl(tmp_path / "sdxl", EulerDiscreteScheduler())

    halves = {
        precision: (facts["vae_encoder"], facts["vae_decoder"])
        for precision in ("fp32", "bf16", "fp16")
        if (facts := a_family(a_spec(path, family="sdxl", precision=precision)).facts())
    }

    assert halves == {
        "fp32": ("torch.float32", "torch.float32"),
        "bf16": ("torch.float32", "torch.bfloat16"),
        "fp16": ("torch.float32", "torch.float32"),
    }


@pytest.mark.parametrize(
    ("name", "text_encoders"),
    [("sd", {"text_encoder"}), ("sdxl", {"text_encoder", "text_encoder_2"})],
)
def test_adapters_may_lie_over_the_unet_and_the_text_encoders(family, name, text_encoders):
    assert set(family(name).networks()) == {"unet"} | text_encoders


def test_an_encoding_is_kept_apart_by_all_the_encoder_is_told(family):
    keys = set()

    def recall(key, encode):
        keys.add(key)
        return encode()

    for clip_skip in (0, 1):
        image = in_flight(
            family("sdxl"),
            a_request(clip_skip=clip_skip, negative_prompt="a star", prompt="a circle"),
        )
        with torch.inference_mode():
            family("sdxl").start(image, recall)

    assert keys == {
        "text_encoder text_encoder_2 clip_skip=0 a star",
        "text_encoder text_encoder_2 clip_skip=0 a circle",
        "text_encoder text_encoder_2 clip_skip=1 a circle",
    }
