"""What the house does with samplers of diffusers has their own bits."""

import pytest
import torch

from engine.samplers import FLOW_SAMPLERS, SAMPLERS, add_noise, fresh_sampler

TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FROM_A_PICTURE = [
    *SAMPLERS,
    *(name for name, recipe in FLOW_SAMPLERS.items() if not recipe.starts_from_noise_only),
]


@pytest.mark.parametrize("begins_at", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FROM_A_PICTURE)
def test_noise_is_added_with_the_bits_of_the_sampler_before_every_step(name, dtype, begins_at):
    sampler = fresh_sampler(name, {"shift": 3.0} if name in FLOW_SAMPLERS else TRAINED)
    sampler.set_timesteps(6)
    if begins_at is not None and hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(begins_at)
    generator = torch.Generator().manual_seed(0)
    clean, noise, latents = torch.randn((3, 1, 4, 8, 8), generator=generator).to(dtype)

    for timestep in sampler.timesteps[begins_at or 0 :]:
        if name in FLOW_SAMPLERS:
            expected = sampler.scale_noise(clean, timestep[None], noise)
        else:
            expected = sampler.add_noise(clean, noise, timestep[None])

        assert torch.equal(add_noise(sampler, clean, noise, timestep), expected)
        latents = sampler.step(noise, timestep, latents, return_dict=False)[0]
