"""Alone and unpadded, an image is the bits of diffusers' own `pipe(...)`.

SD and SDXL, from noise, from a picture, and repainted.
"""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from crosses import in_turn
from diffusers.image_processor import VaeImageProcessor
from engine_builders import SAMPLERS as TESTED
from engine_builders import a_request, a_spec
from tiny_checkpoints import (
    a_family,
    a_mask,
    a_picture,
    decoded,
    save_repainting,
    save_tiny_sdxl,
    started,
    stepped,
)

from engine.families.inpainting import mask_tensor, picture_tensor
from engine.loading import PRECISIONS
from engine.request import Picture
from engine.samplers import SAMPLERS, fresh_sampler

# One that is memoryless, one that draws, one that does both and remembers, one of three orders, one
# distilled.
FOR_PICTURES = ("ddim", "euler_a", "dpmpp_2m_sde", "unipc", "lcm")
MEAN_AND_STD = {"latents_mean": [-1.6, 1.2, 0.3, -0.5], "latents_std": [0.8, 1.1, 0.9, 1.3]}


class Pair:
    """One checkpoint, loaded by its family and by diffusers."""

    def __init__(self, path, family="sd", precision="fp32"):
        self.family = a_family(a_spec(path, family=family, precision=precision))
        name = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL"}[family]
        options = {
            "sd": {"safety_checker": None, "requires_safety_checker": False},
            "sdxl": {"add_watermarker": False},
        }[family]
        text_to_image = getattr(diffusers, f"{name}Pipeline").from_pretrained(
            path, dtype=PRECISIONS[precision], **options
        )
        self.config = text_to_image.scheduler.config
        self.pipes = {"text": text_to_image}
        for kind in ("Img2Img", "Inpaint"):
            more = (
                {"requires_safety_checker": False} if family == "sd" else {"add_watermarker": False}
            )
            self.pipes[kind] = getattr(diffusers, f"{name}{kind}Pipeline")(
                **text_to_image.components, **more
            )
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)

    def piped(self, request, output_type="latent") -> torch.Tensor:
        """The same request through diffusers: latents, or pixels in 0..1."""
        recipe = SAMPLERS[request.sampler]
        size = {"width": request.width_px, "height": request.height_px}
        if request.init_image is None:
            kind, more = "text", size
        else:
            kind, more = (
                "Img2Img",
                {"image": unit_tensor(request.init_image), "strength": request.noise_share},
            )
        if request.mask is not None:
            kind, more = "Inpaint", {**size, **more, "mask_image": unit_tensor(request.mask)}
        pipe = self.pipes[kind]
        pipe.scheduler = getattr(diffusers, recipe.scheduler_class).from_config(
            self.config, **recipe.overrides
        )
        return pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=request.num_steps,
            guidance_scale=request.guidance,
            clip_skip=request.clip_skip or None,
            generator=torch.Generator().manual_seed(request.seed),
            output_type=output_type,
            **more,
        ).images


def unit_tensor(picture: Picture) -> torch.Tensor:
    """[1, c, h, w] in 0..1, as `pipe(image=tensor)` takes it."""
    unit = torch.from_numpy(picture.pixels.astype(np.float32) / 255.0)
    return unit[None, None] if unit.ndim == 2 else unit.permute(2, 0, 1)[None].contiguous()


@pytest.fixture(scope="module")
def pair(checkpoint, epsilon_checkpoint, tmp_path_factory):
    """pair(name, precision): each loaded once."""
    folder = tmp_path_factory.mktemp("parity")
    sdxl = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    makers = {
        "sd": lambda path: epsilon_checkpoint,
        "sd v": lambda path: checkpoint,
        "sd 9": lambda path: save_repainting(path, epsilon_checkpoint),
        "sdxl": lambda path: save_tiny_sdxl(path, sdxl),
        "sdxl 9": lambda path: save_tiny_sdxl(path, sdxl, in_channels=9),
        "sdxl mean": lambda path: save_tiny_sdxl(path, sdxl, vae=MEAN_AND_STD),
        "sdxl no zeros": lambda path: save_tiny_sdxl(path, sdxl, zeros_for_no_prompt=False),
    }
    paths, pairs = {}, {}

    def loaded(name, precision="fp32"):
        if name not in paths:
            paths[name] = makers[name](folder / name)
        if (name, precision) not in pairs:
            pairs[name, precision] = Pair(paths[name], name.split()[0], precision)
        return pairs[name, precision]

    return loaded


def assert_same_latents(pair, request):
    latents = stepped(pair.family, request).tensors.latents

    assert torch.isfinite(latents).all()
    assert torch.equal(latents, pair.piped(request))


# --- from noise ---


@pytest.mark.parametrize(
    ("name", "sampler", "guidance"), in_turn(["sd", "sd v", "sdxl"], TESTED, [1.0, 5.0])
)
def test_latents_are_the_bits_of_the_pipeline(pair, name, sampler, guidance):
    request = a_request(
        sampler=sampler, guidance=guidance, num_steps=5, negative_prompt="a green star", seed=11
    )

    assert_same_latents(pair(name), request)


@pytest.mark.parametrize(
    ("sampler", "checkpoint_and_guidance"),
    in_turn(TESTED, [("sd v", 5.0), ("sdxl", 1.0), ("sd v", 1.0), ("sdxl", 5.0)]),
)
def test_latents_are_the_bits_of_the_pipeline_in_bf16_too(pair, sampler, checkpoint_and_guidance):
    name, guidance = checkpoint_and_guidance
    assert_same_latents(
        pair(name, "bf16"), a_request(sampler=sampler, guidance=guidance, num_steps=3)
    )


def test_every_allowed_sampler_is_tested():
    assert set(TESTED) == set(SAMPLERS)


def test_an_outdated_scheduler_config_is_repaired_as_pipelines_do(epsilon_checkpoint, tmp_path):
    path = shutil.copytree(epsilon_checkpoint, tmp_path / "outdated")
    file = path / "scheduler" / "scheduler_config.json"
    outdated = {"clip_sample": True, "steps_offset": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | outdated))
    request = a_request(sampler="ddim", guidance=5.0, num_steps=5, seed=11)

    with pytest.warns(FutureWarning, match="(clip_sample|steps_offset)"):
        pair = Pair(path)

    assert_same_latents(pair, request)


# --- from a picture ---


@pytest.mark.parametrize(
    ("name", "sampler", "strength"), in_turn(["sd", "sdxl"], FOR_PICTURES, [0.6, 1.0])
)
def test_an_init_image_is_noised_and_denoised_as_the_pipeline_does(pair, name, sampler, strength):
    request = a_request(sampler=sampler, num_steps=5, init_image=a_picture(), strength=strength)

    assert_same_latents(pair(name), request)


@pytest.mark.parametrize("name", ["sd v", "sdxl"])
def test_an_init_image_gives_the_same_bits_in_bf16_too(pair, name):
    assert_same_latents(
        pair(name, "bf16"), a_request(sampler="dpmpp_2m_sde", init_image=a_picture(), strength=0.5)
    )


def test_an_init_image_leaves_only_the_steps_of_its_strength(pair):
    family = pair("sd").family

    assert (
        started(family, a_request(num_steps=10, init_image=a_picture(), strength=0.35)).num_steps
        == 3
    )
    assert started(
        family, a_request(num_steps=10, init_image=a_picture(), strength=0.35)
    ).tensors.timesteps.shape == (3,)


# --- repainted ---


@pytest.mark.parametrize(
    ("name", "sampler", "strength"),
    in_turn(["sd", "sd 9", "sdxl", "sdxl 9"], FOR_PICTURES, [0.6, 1.0]),
)
def test_a_mask_is_repainted_as_the_pipeline_does(pair, name, sampler, strength):
    request = a_request(
        sampler=sampler, num_steps=5, init_image=a_picture(), mask=a_mask(), strength=strength
    )

    assert_same_latents(pair(name), request)


@pytest.mark.parametrize("name", ["sd", "sd 9", "sdxl", "sdxl 9"])
def test_a_mask_is_repainted_without_guidance_as_the_pipeline_does(pair, name):
    request = a_request(
        guidance=1.0,
        sampler="euler",
        width_px=96,
        init_image=a_picture(96),
        mask=a_mask(96),
        strength=0.7,
    )

    assert_same_latents(pair(name), request)


@pytest.mark.parametrize("name", ["sd", "sd 9", "sdxl", "sdxl 9"])
def test_a_mask_gives_the_same_bits_in_bf16_too(pair, name):
    request = a_request(sampler="dpmpp_2m_sde", init_image=a_picture(), mask=a_mask(), strength=0.5)

    assert_same_latents(pair(name, "bf16"), request)


def test_the_numbers_of_pictures_are_those_diffusers_makes_of_pil_images():
    picture, mask = (
        a_picture(96, 64),
        Picture(np.random.default_rng(1).integers(0, 256, (64, 96), dtype=np.uint8)),
    )
    for_pictures = VaeImageProcessor()
    for_masks = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    assert torch.equal(
        picture_tensor(picture, torch.float32, torch.device("cpu")),
        for_pictures.preprocess(as_pil(picture)),
    )
    assert torch.equal(mask_tensor(mask), for_masks.preprocess(as_pil(mask)))


def as_pil(picture: Picture) -> PIL.Image.Image:
    return PIL.Image.fromarray(picture.pixels)


# --- prompts ---


@pytest.mark.parametrize("name", ["sdxl", "sdxl no zeros"])
def test_no_negative_prompt_is_zeros_where_the_checkpoint_says_so(pair, name):
    assert_same_latents(pair(name), a_request(negative_prompt="", num_steps=2))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_skipped_layers_of_the_text_encoders_give_the_bits_of_the_pipeline(pair, name):
    both = pair(name)
    text_encoder = both.pipes["text"].text_encoder
    # SD's pipeline looks for the layer norm where transformers 4 had it (diffusers issue 14124).
    vars(text_encoder)["text_model"] = text_encoder
    request = a_request(clip_skip=1, negative_prompt="a small star", num_steps=2)

    assert_same_latents(both, request)
    assert not torch.equal(both.piped(request), both.piped(replace(request, clip_skip=0)))


# --- pixels ---


@pytest.mark.parametrize(
    ("name", "precision", "changes"),
    [
        ("sd", "fp32", {}),
        ("sd", "bf16", {"init_image": a_picture(), "strength": 0.5}),
        ("sd 9", "fp32", {"init_image": a_picture(), "mask": a_mask()}),
        ("sdxl", "fp32", {"init_image": a_picture(), "mask": a_mask(), "strength": 0.5}),
        ("sdxl", "bf16", {"init_image": a_picture(), "strength": 0.5}),
        ("sdxl", "fp16", {"init_image": a_picture(), "strength": 0.5}),
        ("sdxl mean", "fp32", {"init_image": a_picture(), "strength": 0.5}),
        ("sdxl mean", "fp16", {}),
    ],
)
def test_decoded_pixels_are_the_bits_of_the_pipeline(pair, name, precision, changes):
    both = pair(name, precision)
    request = a_request(sampler="dpmpp_2m", num_steps=2, **changes)

    pixels = decoded(both.family, stepped(both.family, request))

    pixels, expected = (pixels * 0.5 + 0.5).clamp(0, 1), both.piped(request, output_type="pt")
    # a processor without units for it takes kernels by where things lie: less than a shade
    if precision == "fp16":
        assert torch.allclose(pixels, expected, rtol=0, atol=1 / 255)
    else:
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("width_px", "height_px"), [(64, 64), (96, 64)])
def test_finished_pixels_are_those_of_the_pipeline(engine, pair, width_px, height_px):
    request = a_request(width_px=width_px, height_px=height_px, sampler="dpmpp_2m", num_steps=6)

    finished = engine.submit(request).result(60)

    expected = pair("sd v").piped(request, output_type="np")[0]
    assert finished.pixels.shape == (height_px, width_px, 3)
    assert np.array_equal(finished.pixels, (expected * 255).round().astype(np.uint8))


def test_every_allowed_sampler_makes_one_forward_per_step(checkpoint):
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    for name in SAMPLERS:
        for num_steps in (1, 2, 4, 20, 50):
            sampler = fresh_sampler(name, config)
            sampler.set_timesteps(num_steps)
            assert len(sampler.timesteps) == num_steps, (name, num_steps)
