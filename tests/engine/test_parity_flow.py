"""SD3 and FLUX: alone and unpadded, an image is the bits of diffusers' own `pipe(...)`, from noise,
from a picture and under a mask.
"""

import json
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from crosses import in_turn
from engine_builders import a_request, a_spec
from tiny_checkpoints import (
    a_family,
    a_mask,
    a_picture,
    a_recall,
    decoded,
    denoise,
    in_flight,
    started,
    stepped,
)
from tiny_flow_checkpoints import DEV_SCHEDULER, SCHNELL_SCHEDULER, save_tiny_flux, save_tiny_sd3

from engine.errors import CheckpointCorrupt, UnsupportedRequest
from engine.samplers import FLOW_SAMPLERS, SAMPLERS, fresh_sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORT = {"max_sequence_length": 24}
AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Every allowed sampler as diffusers' own documentation makes it from a flow checkpoint's scheduler.
TESTED = {
    "flow_euler": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config),
    "flow_euler_karras": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config, use_karras_sigmas=True
    ),
    "flow_euler_exponential": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config, use_exponential_sigmas=True
    ),
    "flow_lcm": lambda config: diffusers.FlowMatchLCMScheduler.from_config(config),
    "flow_dpmpp_2m": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(
        config, flow_shift=config["shift"], **AS_FLOW
    ),
    "flow_unipc": lambda config: diffusers.UniPCMultistepScheduler.from_config(
        config, flow_shift=config["shift"], **AS_FLOW
    ),
}
NOISE_ONLY = {"flow_dpmpp_2m", "flow_unipc"}
FROM_PICTURES = [name for name in TESTED if name not in NOISE_ONLY]
KINDS = {  # by family: the pipelines for text, a picture, a picture and a mask
    "sd3": (
        diffusers.StableDiffusion3Pipeline,
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
    ),
    "flux": (diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline),
    "fill": (None, None, diffusers.FluxFillPipeline),
}


class Checkpoint:
    """A folder, the families loaded from it and the pipelines of diffusers over it."""

    def __init__(self, path, family):
        self.path, self.family_name = path, family
        self.family = cache(self._family)
        self._parts = cache(self._read)

    def _family(self, precision="fp32"):
        return a_family(
            a_spec(self.path, family=self.family_name.replace("fill", "flux"), precision=precision)
        )

    def _read(self, precision):
        text_to_image = KINDS[self.family_name.replace("fill", "flux")][0]
        optional = ("text_encoder_3", "tokenizer_3") if self.family_name == "sd3" else ()
        left_out = {folder: None for folder in optional if not (self.path / folder).is_dir()}
        return text_to_image.from_pretrained(
            self.path, dtype=DTYPES[precision], **left_out
        ).components

    def piped(self, request, precision="fp32", output_type="latent", **more):
        """The same request through diffusers: latents, or pixels."""
        kind = 0 if request.init_image is None else 1 if request.mask is None else 2
        pipeline_class = KINDS[self.family_name][kind]
        given = dict(self._parts(precision))
        given |= {"scheduler": TESTED[request.sampler](given["scheduler"].config)}
        accepted = pipeline_class._get_signature_types()
        pipe = pipeline_class(**{name: part for name, part in given.items() if name in accepted})
        pipe.set_progress_bar_config(disable=True)
        if kind:
            more |= {"image": as_unit(request.init_image), "strength": request.strength}
        if kind == 2:
            more |= {"mask_image": as_unit(request.mask)}
        torch.manual_seed(request.seed)
        return pipe(
            request.prompt,
            width=request.width_px,
            height=request.height_px,
            num_inference_steps=request.num_steps,
            guidance_scale=request.guidance,
            # Without one, it and its scheduler draw from the process's generator, in the order that
            # ours draws from the image's.
            generator=None
            if request.sampler == "flow_lcm"
            else torch.Generator().manual_seed(request.seed),
            output_type=output_type,
            max_sequence_length=request.options.get(
                "max_sequence_length", 256 if self.family_name == "sd3" else 512
            ),
            **(
                {"negative_prompt": request.negative_prompt, "clip_skip": request.clip_skip or None}
                if self.family_name == "sd3"
                else {}
            ),
            **more,
        ).images


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, one_torch_thread):
    folder = tmp_path_factory.mktemp("flow")
    return {
        "sd3": Checkpoint(save_tiny_sd3(folder / "sd3"), "sd3"),
        "sd3, no T5, shifted by size": Checkpoint(
            save_tiny_sd3(
                folder / "no_t5",
                with_t5=False,
                scheduler={"use_dynamic_shifting": True, "base_shift": 0.4},
            ),
            "sd3",
        ),
        "dev": Checkpoint(save_tiny_flux(folder / "dev"), "flux"),
        "schnell": Checkpoint(
            save_tiny_flux(folder / "schnell", guidance_embeds=False, scheduler=SCHNELL_SCHEDULER),
            "flux",
        ),
        "fill": Checkpoint(
            save_tiny_flux(folder / "fill", context_channels=4 + 64, scheduler=DEV_SCHEDULER),
            "fill",
        ),
    }


def as_unit(picture):
    """A picture or a mask as a tensor in 0..1, [1, channels, h, w].

    See engine/families/inpainting.py for why not as a PIL image.
    """
    pixels = torch.from_numpy(picture.pixels.astype(np.float32) / 255)
    return pixels.permute(2, 0, 1)[None].contiguous() if pixels.dim() == 3 else pixels[None, None]


def a_flow_request(id="image", **changes):
    given = {
        "sampler": "flow_euler",
        "num_steps": 3,
        "negative_prompt": "a green star",
        "guidance": 4.0,
        "seed": 11,
        "options": SHORT,
    }
    return a_request(id, **given | changes)


def image_to_image(**changes):
    return a_flow_request(**{"init_image": a_picture(), "strength": 0.6, "num_steps": 5} | changes)


def an_inpainting(**changes):
    return image_to_image(**{"mask": a_mask()} | changes)


def rendered(checkpoint, request, precision="fp32"):
    """The same request through the family, alone: latents."""
    return stepped(checkpoint.family(precision), request).tensors.latents


def one_step(family, image):
    """One forward of the image's own rows, and what follows it."""
    with torch.inference_mode():
        family.advance(image, family.predict([image], image.rows)[0])


# --- from noise ---


@pytest.mark.parametrize(
    ("sampler", "precision", "guidance"), in_turn([*TESTED], [*DTYPES], [1.0, 4.0])
)
def test_sd3_is_the_bits_of_the_pipeline(checkpoints, sampler, guidance, precision):
    request = a_flow_request(sampler=sampler, guidance=guidance, num_steps=4)

    latents = rendered(checkpoints["sd3"], request, precision)

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, checkpoints["sd3"].piped(request, precision))


@pytest.mark.parametrize(("sampler", "precision"), in_turn([*TESTED], [*DTYPES]))
def test_flux_dev_is_the_bits_of_the_pipeline(checkpoints, sampler, precision):
    request = a_flow_request(sampler=sampler, guidance=3.5, num_steps=4)

    latents = rendered(checkpoints["dev"], request, precision)

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, checkpoints["dev"].piped(request, precision))


@pytest.mark.parametrize(
    ("sampler", "precision"),
    in_turn([name for name in TESTED if name != "flow_dpmpp_2m"], [*DTYPES][::-1]),
)
def test_flux_schnell_is_the_bits_of_the_pipeline(checkpoints, sampler, precision):
    request = a_flow_request(sampler=sampler, guidance=3.5, negative_prompt="", num_steps=4)

    latents = rendered(checkpoints["schnell"], request, precision)

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, checkpoints["schnell"].piped(request, precision))


@pytest.mark.parametrize(("name", "tokens"), [("sd3", 256), ("dev", 512)])
def test_text_is_as_long_as_the_pipelines_make_it(checkpoints, name, tokens):
    request = a_flow_request(options={}, num_steps=1)

    assert torch.equal(rendered(checkpoints[name], request), checkpoints[name].piped(request))
    assert checkpoints[name].family().text_length(request) == tokens + (16 if name == "sd3" else 0)


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_width_and_height_may_differ(checkpoints, name):
    wide = a_flow_request(width_px=96, height_px=64)
    tall = a_flow_request(width_px=64, height_px=96)

    assert torch.equal(rendered(checkpoints[name], wide), checkpoints[name].piped(wide))
    assert torch.equal(rendered(checkpoints[name], tall), checkpoints[name].piped(tall))


@pytest.mark.parametrize("sampler", TESTED)
def test_sd3_may_lack_t5_and_may_be_shifted_by_size(checkpoints, sampler):
    checkpoint = checkpoints["sd3, no T5, shifted by size"]
    request = a_flow_request(sampler=sampler)

    assert torch.equal(rendered(checkpoint, request), checkpoint.piped(request))
    assert set(checkpoint.family().networks()) == {"transformer", "text_encoder", "text_encoder_2"}


def test_sd3_leaves_out_layers_of_clip_for_the_prompt_alone(checkpoints):
    request = a_flow_request(clip_skip=1)

    latents = rendered(checkpoints["sd3"], request)

    assert torch.equal(latents, checkpoints["sd3"].piped(request))
    assert not torch.equal(latents, rendered(checkpoints["sd3"], replace(request, clip_skip=0)))


@pytest.mark.parametrize(
    ("name", "request_", "scale"),
    [
        ("dev", {"guidance": 3.5, "options": SHORT | {"true_cfg_scale": 2.5}}, 2.5),
        ("schnell", {"guidance": 2.5}, 2.5),
    ],
    ids=["dev", "schnell"],
)
def test_flux_with_true_guidance_is_the_pipeline_within_a_last_digit(
    checkpoints, name, request_, scale
):
    """In fp32 within 1e-5 of the largest latent, not bit for bit.

    It makes two forwards where this house makes one of two rows.
    """
    request = a_flow_request(**request_)

    image = stepped(checkpoints[name].family(), request)

    expected = checkpoints[name].piped(
        request, true_cfg_scale=scale, negative_prompt=request.negative_prompt
    )
    unguided = checkpoints[name].piped(request)
    assert image.rows == 2
    assert (image.tensors.latents - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (image.tensors.latents - unguided).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_pixels_are_the_bits_of_the_pipeline(checkpoints, name):
    request = a_flow_request()
    family = checkpoints[name].family()

    pixels = decoded(family, stepped(family, request))

    expected = checkpoints[name].piped(request, output_type="pt")
    assert torch.equal((pixels * 0.5 + 0.5).clamp(0, 1), expected)


# --- from a picture ---


@pytest.mark.parametrize(
    ("name", "strength", "precision"),
    in_turn(["sd3", "dev", "schnell"], [0.3, 0.6, 1.0], [*DTYPES]),
)
def test_image_to_image_is_the_bits_of_the_pipeline(checkpoints, name, precision, strength):
    request = image_to_image(strength=strength, negative_prompt="a star" if name == "sd3" else "")
    family = checkpoints[name].family(precision)

    image = stepped(family, request)

    assert image.num_steps == {0.3: 2, 0.6: 3, 1.0: 5}[strength]
    assert torch.equal(image.tensors.latents, checkpoints[name].piped(request, precision))


@pytest.mark.parametrize(
    ("name", "precision", "strength"),
    in_turn(["sd3", "dev", "schnell", "fill"], [*DTYPES], [0.6, 1.0]),
)
def test_inpainting_is_the_bits_of_the_pipeline(checkpoints, name, precision, strength):
    request = an_inpainting(strength=strength, negative_prompt="a star" if name == "sd3" else "")

    latents = rendered(checkpoints[name], request, precision)

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, checkpoints[name].piped(request, precision))


@pytest.mark.parametrize("sampler", FROM_PICTURES)
@pytest.mark.parametrize("name", ["sd3", "dev", "fill"])
def test_every_sampler_that_can_start_from_a_picture_does(checkpoints, name, sampler):
    request = an_inpainting(
        sampler=sampler, width_px=96, init_image=a_picture(width_px=96), mask=a_mask(width_px=96)
    )

    assert torch.equal(rendered(checkpoints[name], request), checkpoints[name].piped(request))
    if name != "fill":
        request = replace(request, mask=None)
        assert torch.equal(rendered(checkpoints[name], request), checkpoints[name].piped(request))


def test_sd3_undoes_the_shift_of_the_vae_after_inpainting_too(checkpoints):
    """Where diffusers 0.42's own inpainting pipeline forgets to.

    Its pixels are those of latents off by the shift.
    """
    family, request = checkpoints["sd3"].family(), an_inpainting()
    image = stepped(family, request)

    pixels = decoded(family, image)

    vae = family._vae
    with torch.inference_mode():
        expected = vae.decode(
            image.tensors.latents / vae.config.scaling_factor + vae.config.shift_factor
        ).sample
        forgotten = vae.decode(image.tensors.latents / vae.config.scaling_factor).sample
    assert torch.equal(pixels, expected)
    assert torch.equal(
        (forgotten * 0.5 + 0.5).clamp(0, 1), checkpoints["sd3"].piped(request, output_type="pt")
    )


# --- in company ---


def company(name):
    """Strangers of one batch key for a bucket of 4 rows, all unlike the request they meet: by two,
    their rows.
    """
    guided = [
        a_flow_request(
            "a",
            prompt="a small square",
            guidance=7.0,
            seed=1,
            options=SHORT | TRUE_CFG[name],
            num_steps=9,
        )
    ]
    single = [
        a_flow_request(
            "b",
            prompt="the star",
            guidance=1.0,
            negative_prompt="",
            sampler="flow_unipc",
            seed=2,
            num_steps=2,
        ),
        image_to_image(prompt="blue", guidance=1.0, negative_prompt="", sampler="flow_lcm", seed=3),
    ]
    return guided, single


TRUE_CFG = {"sd3": {}, "dev": {"true_cfg_scale": 3.0}, "schnell": {}}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["sd3", "dev", "schnell"])
def test_in_a_fixed_bucket_neighbours_change_no_bit(checkpoints, name, precision):
    family = checkpoints[name].family(precision)
    request = a_flow_request("mine", options=SHORT | TRUE_CFG[name])
    mine = started(family, request)
    guided, single = (
        [started(family, stranger) for stranger in strangers] for strangers in company(name)
    )
    assert [image.rows for image in [mine, *guided, *single]] == [2, 2, 1, 1]

    with torch.inference_mode():
        alone = family.predict([mine], 4)[0]
        in_company = [
            family.predict([mine, *guided], 4)[0],
            family.predict([*guided, mine], 4)[1],
            family.predict([*single, mine], 4)[2],
            family.predict([single[0], mine], 4)[1],
        ]

    assert all(torch.equal(alone, prediction) for prediction in in_company)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_a_whole_image_is_the_same_alone_and_in_company(checkpoints, name):
    family = checkpoints[name].family()
    request = a_flow_request("mine", guidance=1.0, sampler="flow_dpmpp_2m")
    alone, mine = started(family, request), started(family, request)
    other = started(family, an_inpainting(id="other", guidance=1.0))

    with torch.inference_mode():
        while not alone.is_denoised:
            family.advance(alone, family.predict([alone], 4)[0])
        while not mine.is_denoised:
            images = [image for image in (other, mine) if not image.is_denoised]
            for image, prediction in zip(images, family.predict(images, 4), strict=True):
                family.advance(image, prediction)

    assert torch.equal(mine.tensors.latents, alone.tensors.latents)


# --- elsewhere ---


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        *[
            (name, a_flow_request(sampler=sampler, num_steps=4))
            for name in ("sd3", "dev")
            for sampler in TESTED
        ],
        *[(name, an_inpainting()) for name in ("sd3", "dev", "fill")],
        *[(name, an_inpainting(sampler="flow_lcm")) for name in ("sd3", "dev")],
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.sampler}{'-inpaint' if value.mask else ''}"
    ),
)
def test_an_image_goes_on_elsewhere_with_the_same_bits(checkpoints, name, request_):
    family = checkpoints[name].family("bf16")
    image = started(family, request_)
    states = [family.save(image)]
    while not image.is_denoised:
        one_step(family, image)
        states.append(family.save(image))

    ends = []
    for step, state in enumerate(states[:-1]):
        resumed = in_flight(family, request_)
        resumed.step = step
        with torch.inference_mode():
            family.restore(resumed, state, a_recall())
        ends.append(denoise(family, resumed).tensors.latents)

    assert all(torch.equal(end, image.tensors.latents) for end in ends)


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_a_fork_goes_on_from_kept_latents(checkpoints, name):
    family = checkpoints[name].family()
    request = a_flow_request(num_steps=4)
    image = started(family, request)
    one_step(family, image)
    one_step(family, image)

    fork = in_flight(family, request)
    fork.step = 2
    with torch.inference_mode():
        family.fork(fork, family.latents(image), a_recall())

    assert torch.equal(
        denoise(family, fork).tensors.latents, denoise(family, image).tensors.latents
    )


@pytest.mark.parametrize(("name", "channels"), [("sd3", 16), ("dev", 4)])
def test_a_preview_is_given_unpacked_clean_latents(checkpoints, name, channels):
    family = checkpoints[name].family()
    image = started(family, a_flow_request(width_px=96, num_steps=2))
    image.is_watched = True

    denoise(family, image)

    clean = family.clean_latents(image)
    assert clean.shape == (1, channels, 8, 12)
    # the last step goes all the way
    assert torch.equal(clean, family.picture_latents(image, image.tensors.latents))


def test_a_text_is_encoded_once_by_each_encoder(checkpoints):
    asked = []

    def recall(key, encode):
        asked.append(key)
        return encode()

    request = a_flow_request(negative_prompt="a star", prompt="a star")
    with torch.inference_mode():
        for name in ("sd3", "schnell"):
            checkpoints[name].family().encode(request, recall)

    encoders = [
        "text_encoder clip_skip=0",
        "text_encoder_2 clip_skip=0",
        "text_encoder_3 length=24",
    ] * 2
    encoders += ["text_encoder"] * 2 + ["text_encoder_2 length=24"] * 2
    assert asked == [f"{encoder} a star" for encoder in encoders]


# --- what is allowed ---


def test_every_allowed_flow_sampler_is_tested():
    assert set(TESTED) == set(FLOW_SAMPLERS)
    assert not set(FLOW_SAMPLERS) & set(SAMPLERS)


@pytest.mark.parametrize("name", ["sd3", "dev", "schnell"])
def test_every_allowed_flow_sampler_makes_one_forward_per_step(checkpoints, name):
    family = checkpoints[name].family()
    for sampler in FLOW_SAMPLERS:
        if (name, sampler) != ("schnell", "flow_dpmpp_2m"):
            for num_steps in (1, 2, 4, 20, 50):
                request = a_flow_request(sampler=sampler, num_steps=num_steps)
                assert len(family.sampler(request).timesteps) == num_steps, (sampler, num_steps)


@pytest.mark.parametrize("sampler", sorted(NOISE_ONLY))
def test_a_first_timestep_that_is_there_twice_skips_no_noise_level(checkpoints, sampler):
    """As in diffusers' own SD3 pipeline, which then has one noise level too few, and fails."""
    made = checkpoints["sd3"].family().sampler(a_flow_request(sampler=sampler, num_steps=700))
    latents = torch.zeros(1, 16, 8, 8)

    made.step(latents, made.timesteps[0], latents)

    assert made.timesteps[0] == made.timesteps[1]
    assert made.step_index == 1


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("sd3", {"width_px": 72}, "width_px"),
        ("dev", {"height_px": 8}, "height_px"),
        ("sd3", {"sampler": "euler"}, "sampler"),
        ("dev", {"num_steps": 1001}, "num_steps"),
        ("dev", {"sampler": "flow_unipc", "init_image": a_picture()}, "sampler"),
        ("schnell", {"sampler": "flow_dpmpp_2m"}, "sampler"),
        ("sd3", {"mask": a_mask()}, "mask"),
        ("fill", {}, "mask"),
        ("fill", {"init_image": a_picture()}, "mask"),
        ("sd3", {"init_image": a_mask()}, "init_image"),
        ("dev", {"init_image": a_picture(), "mask": a_picture()}, "mask"),
        ("dev", {"init_image": a_picture(width_px=96)}, "init_image"),
        ("sd3", {"strength": 0.5}, "strength"),
        ("sd3", {"init_image": a_picture(), "strength": 0.0}, "strength"),
        ("sd3", {"init_image": a_picture(), "strength": 1e-18}, "strength"),
        ("dev", {"control_image": a_picture()}, "control_image"),
        ("dev", {"clip_skip": 1}, "clip_skip"),
        ("sd3", {"clip_skip": 3}, "clip_skip"),
        ("sd3", {"options": {"true_cfg_scale": 2.0}}, "options"),
        ("schnell", {"options": {"true_cfg_scale": 2.0}}, "options"),
        ("dev", {"options": {"true_cfg_scale": "2"}}, "options"),
        ("dev", {"options": {"max_sequence_length": 513}}, "options"),
        ("sd3", {"options": {"max_sequence_length": True}}, "options"),
        ("sd3", {"options": {"sigmas": "1,0"}}, "options"),
    ],
)
def test_a_request_that_cannot_be_rendered_is_refused_by_field(checkpoints, name, changes, field):
    with pytest.raises(UnsupportedRequest) as refusal:
        checkpoints[name].family().check(a_flow_request(**changes))

    assert refusal.value.field == field


def test_the_pipelines_cannot_do_either_what_is_refused_of_samplers(checkpoints):
    with pytest.raises(AssertionError):
        checkpoints["schnell"].piped(a_flow_request(sampler="flow_dpmpp_2m"))
    with pytest.raises(AttributeError, match="scale_noise"):
        checkpoints["sd3"].piped(image_to_image(sampler="flow_unipc"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "does not sample a flow"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "Only one of"),
    ],
)
def test_a_scheduler_config_that_no_sampler_can_be_made_of_is_refused(tmp_path, changes, problem):
    path = save_tiny_flux(tmp_path / "flux")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    with pytest.raises(CheckpointCorrupt, match=problem):
        a_family(a_spec(path, family="flux"))


def test_a_network_of_another_task_is_refused(tmp_path):
    path = save_tiny_flux(tmp_path / "control", context_channels=4)

    with pytest.raises(CheckpointCorrupt, match="8 latent channels"):
        a_family(a_spec(path, family="flux"))


def test_the_checkpoint_s_own_spacing_does_not_leak_into_another_sampler():
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_exponential_sigmas": True,
    }

    assert fresh_sampler("flow_euler_karras", config).config.use_exponential_sigmas is False
    assert fresh_sampler("flow_unipc", config).config.use_exponential_sigmas is False
    assert fresh_sampler("flow_unipc", config).config.flow_shift == 3.0
