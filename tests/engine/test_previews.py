"""Previews show what an image will become.

The right clean latents, in the right colours, not too often.
"""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.previews import FACTORS, Pace, Projector, clean_latents, fit, jpeg
from engine.samplers import FLOW_SAMPLERS, SAMPLERS, fresh_sampler
from pocket import world

POCKET = Path(__file__).parents[2] / "pocket" / "checkpoint"
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
TRAINED_FOR = {
    "epsilon": BETAS | {"prediction_type": "epsilon"},
    "sample": BETAS | {"prediction_type": "sample"},
    "v_prediction": BETAS
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
NUM_STEPS = 10
# correlation, over all pixels of 24 pictures, of each colour with the picture itself
LIKENESS = 0.75


def a_sampler(name="ddim", trained_for="epsilon"):
    sampler = fresh_sampler(
        name, {"shift": 3.0} if name in FLOW_SAMPLERS else TRAINED_FOR[trained_for]
    )
    sampler.set_timesteps(NUM_STEPS)
    return sampler


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fields_of(sampler):
    """A sampler's fields as they are now, comparable with ==."""
    return pickle.dumps(
        {name: value for name, value in vars(sampler).items() if not callable(value)}
    )


# What the sampler foresees


@pytest.mark.parametrize("trained_for", TRAINED_FOR)
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_exact_prediction_gives_the_clean_latents_back(name, trained_for):
    sampler = a_sampler(name, trained_for)
    clean, noise = drawn(1, 4, 8, 8), drawn(1, 4, 8, 8, seed=1)

    for timestep in sampler.timesteps:
        noisy = sampler.add_noise(clean, noise, timestep[None])
        # How much of each there is, asked of the sampler itself and scaled to unit variance, which
        # v is defined by.
        share = [
            float(sampler.add_noise(torch.tensor([a]), torch.tensor([b]), timestep[None]))
            for a, b in ((1.0, 0.0), (0.0, 1.0))
        ]
        of_clean, of_noise = (part / np.hypot(*share) for part in share)
        prediction = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": of_clean * noise - of_noise * clean,
        }[trained_for]

        assert torch.allclose(clean_latents(sampler, noisy, prediction, timestep), clean, atol=1e-4)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_an_exact_flow_gives_the_clean_latents_back(name):
    sampler = a_sampler(name)
    clean, noise = drawn(1, 16, 8, 8), drawn(1, 16, 8, 8, seed=1)

    for timestep, sigma in zip(sampler.timesteps, sampler.sigmas, strict=False):
        noisy = (1 - sigma) * clean + sigma * noise

        assert torch.allclose(
            clean_latents(sampler, noisy, noise - clean, timestep), clean, atol=1e-4
        )


@pytest.mark.parametrize("trained_for", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a"])
def test_it_is_what_the_sampler_itself_says_at_every_step(name, trained_for):
    sampler = a_sampler(name, trained_for)
    latents = drawn(1, 4, 8, 8) * sampler.init_noise_sigma

    for number, timestep in enumerate(sampler.timesteps):
        prediction = drawn(1, 4, 8, 8, seed=2 + number)
        foreseen = clean_latents(sampler, latents, prediction, timestep)
        stepped = sampler.step(
            prediction, timestep, latents, generator=torch.Generator().manual_seed(0)
        )

        assert torch.allclose(foreseen, stepped.pred_original_sample, rtol=1e-4, atol=1e-4)
        latents = stepped.prev_sample


@pytest.mark.parametrize(
    "name", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "lcm", *FLOW_SAMPLERS]
)
def test_the_last_step_arrives_where_it_was_foreseen(name):
    sampler = a_sampler(name, "v_prediction")
    latents = drawn(1, 4, 8, 8)

    for number, timestep in enumerate(sampler.timesteps):
        prediction = drawn(1, 4, 8, 8, seed=2 + number)
        foreseen = clean_latents(sampler, latents, prediction, timestep)
        latents = sampler.step(prediction, timestep, latents, return_dict=False)[0]

    # these two stop at a trace of noise
    assert torch.allclose(foreseen, latents, atol=2e-2 if name in ("ddim", "lcm") else 1e-5)


@pytest.mark.parametrize("name", [*SAMPLERS, *FLOW_SAMPLERS])
def test_looking_ahead_leaves_the_sampler_as_it_was(name):
    sampler = a_sampler(name)
    latents = drawn(1, 4, 8, 8)

    for timestep in sampler.timesteps[:3]:
        before = fields_of(sampler)
        clean_latents(sampler, latents, drawn(1, 4, 8, 8, seed=1), timestep)

        assert fields_of(sampler) == before
        latents = sampler.step(drawn(1, 4, 8, 8, seed=1), timestep, latents, return_dict=False)[0]


def test_an_image_that_starts_midway_is_foreseen_from_there():
    sampler = a_sampler("flow_euler")
    sampler.set_begin_index(6)
    clean, noise = drawn(1, 4, 8, 8), drawn(1, 4, 8, 8, seed=1)
    noisy = (1 - sampler.sigmas[6]) * clean + sampler.sigmas[6] * noise

    foreseen = clean_latents(sampler, noisy, noise - clean, torch.tensor(-1.0))

    assert torch.allclose(foreseen, clean, atol=1e-5)


def test_half_precision_latents_are_foreseen_in_single():
    sampler = a_sampler("euler", "v_prediction")

    foreseen = clean_latents(
        sampler, drawn(1, 4, 8, 8).half(), drawn(1, 4, 8, 8).half(), sampler.timesteps[0]
    )

    assert foreseen.dtype == torch.float32


def test_an_unknown_sampler_foresees_nothing():
    from diffusers import PNDMScheduler

    sampler = PNDMScheduler()
    sampler.set_timesteps(NUM_STEPS)

    assert (
        clean_latents(sampler, drawn(1, 4, 8, 8), drawn(1, 4, 8, 8), sampler.timesteps[0]) is None
    )


# Its colours


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(POCKET / "vae", local_files_only=True).eval()


@pytest.fixture(scope="module")
def encode(vae):
    """Pixels to latents as family sd's denoiser sees them."""

    def encode(pixels):
        with torch.inference_mode():
            return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

    return encode


def fitted(encode):
    return fit(
        encode,
        latent_channels=4,
        pixels_per_latent=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def projector(encode):
    """A projector for pocket's latents."""
    return fitted(encode)


def pocket_pictures(count=24):
    """Pictures of the world that pocket was trained on, [n, 3, 128, 128] in -1..1.

    None of them is fitted on.
    """
    rng = random.Random(77)
    drawings = [np.array(world.draw(world.random_scene(rng), rng)) for _ in range(count)]
    return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 127.5 - 1


def likeness(projector, encode, pictures):
    """The correlation of each projected colour with the same colour of the pictures, over all their
    pixels.
    """
    projected = np.concatenate(
        [projector.project(latents[None]).reshape(-1, 3) for latents in encode(pictures)]
    )
    real = torch.nn.functional.avg_pool2d(pictures, 8).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    return [np.corrcoef(projected[:, colour], real[:, colour])[0, 1] for colour in range(3)]


def test_a_fitted_projector_shows_pockets_pictures_in_their_colours(projector, encode):
    assert min(likeness(projector, encode, pocket_pictures())) > LIKENESS
    assert min(projector.r_squared) > 0.4


def test_a_wrong_projector_does_not(projector, encode):
    red_for_blue = Projector(
        tuple(row[::-1] for row in projector.factors), projector.bias[::-1], projector.squares
    )
    linear_only = Projector(projector.factors, projector.bias)

    # a family's table is for the family's VAE, which pocket has not
    for wrong in (FACTORS["sd"], red_for_blue, linear_only):
        assert min(likeness(wrong, encode, pocket_pictures())) < LIKENESS


def test_a_fit_is_always_the_same(projector, encode):
    assert fitted(encode) == projector


def test_a_linear_vae_is_fitted_exactly_and_without_squares():
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.3, 0.0, 1.0], [0.2, 0.2, 0.2]])

    def encode(pixels):
        return (
            torch.einsum("cr,nrhw->nchw", mixing, torch.nn.functional.avg_pool2d(pixels, 8)) + 0.25
        )

    projector = fitted(encode)

    assert projector.squares == ()
    assert projector.r_squared == pytest.approx((1, 1, 1))
    colours = (
        torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, 0.0]])
        .T.reshape(1, 3, 1, 3)
        .repeat_interleave(8, 2)
    )
    assert projector.project(encode(colours.repeat_interleave(8, 3))).tolist() == [
        [[255, 255, 255], [0, 0, 0], [255, 0, 128]]
    ]


def test_latents_of_another_shape_are_not_fitted():
    with pytest.raises(ValueError, match="were expected"):
        fitted(lambda pixels: torch.zeros(len(pixels), 64, 4))


@pytest.mark.parametrize(
    ("family", "channels"), [("sd", 4), ("sdxl", 4), ("sd3", 16), ("flux", 16)]
)
def test_every_native_family_has_a_published_table(family, channels):
    projector = FACTORS[family]

    assert np.array(projector.factors).shape == (channels, 3)
    assert projector.project(torch.zeros(1, channels, 4, 6)).shape == (4, 6, 3)


def test_the_clean_latents_tell_more_of_the_picture_than_the_noisy_ones(vae, projector):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(POCKET, local_files_only=True)
    sampler = fresh_sampler("ddim", pipe.scheduler.config)
    sampler.set_timesteps(8)
    latents, shown = drawn(1, 4, 16, 16), []
    with torch.inference_mode():
        text = torch.cat(
            pipe.encode_prompt("a large yellow star on a blue background", "cpu", 1, True, "")[::-1]
        ).float()
        for timestep in sampler.timesteps:
            uncond, cond = pipe.unet(latents.expand(2, -1, -1, -1), timestep, text).sample.chunk(2)
            prediction = uncond + 2 * (cond - uncond)
            shown.append(
                [
                    projector.project(each)
                    for each in (clean_latents(sampler, latents, prediction, timestep), latents)
                ]
            )
            latents = sampler.step(prediction, timestep, latents, return_dict=False)[0]
        picture = torch.nn.functional.avg_pool2d(
            vae.decode(latents / vae.config.scaling_factor).sample, 8
        )[0].permute(1, 2, 0)

    of_clean, of_noisy = (
        [np.corrcoef(each.ravel(), picture.ravel())[0, 1] for each in kind]
        for kind in zip(*shown, strict=True)
    )

    assert min(of_clean) > 0.65
    assert max(of_noisy) < 0.4


# Its file and its pace


def test_a_preview_is_a_small_jpeg_of_viewable_size(projector, encode):
    pixels = projector.project(encode(pocket_pictures(1))).numpy()

    packed = jpeg(pixels)

    picture = Image.open(io.BytesIO(packed))
    assert (picture.format, picture.size) == ("JPEG", (256, 256))
    assert 1024 < len(packed) < 9 * 1024
    smaller = np.array(picture.resize((16, 16), Image.Resampling.BOX))
    assert np.corrcoef(smaller.ravel(), pixels.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 64, 3), (256, 128)), ((64, 32, 3), (128, 256)), ((512, 512, 3), (256, 256))],
)
def test_a_preview_keeps_its_proportions(shape, size):
    packed = jpeg(np.zeros(shape, np.uint8))

    assert Image.open(io.BytesIO(packed)).size == size


def test_an_image_shows_at_most_so_many_previews_a_second():
    pace = Pace(per_s=2)

    shown = [now_s for now_s in np.arange(100, 103, 0.125) if pace.may_show(float(now_s))]

    assert shown == [100, 100.5, 101, 101.5, 102, 102.5]


def test_a_preview_that_came_too_early_does_not_delay_the_next():
    pace = Pace(per_s=2)

    assert [pace.may_show(now_s) for now_s in (0.0, 0.4, 0.49, 0.5)] == [True, False, False, True]
