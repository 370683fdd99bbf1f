"""A sampler goes on in a fresh object from any step as if nothing had happened, whatever it has to
remember.
"""

import json
from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from engine.errors import SnapshotRefused
from engine.samplers import FLOW_SAMPLERS, SAMPLERS, fresh_sampler, step_arguments
from engine.samplerstate import load_generator, load_sampler, save_generator, save_sampler

NUM_STEPS = 6
SHARED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
TRAINED = {
    "epsilon": SHARED | {"set_alpha_to_one": False, "skip_prk_steps": True},
    "v_prediction": SHARED
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "flow": {"shift": 3.0},
    "shifted": {"shift": 3.0, "use_dynamic_shifting": True},
}
OTHERS = {
    "heun": ("HeunDiscreteScheduler", SHARED),
    # takes 80 ms to make one of 1000
    "kdpm2": ("KDPM2DiscreteScheduler", SHARED | {"num_train_timesteps": 100}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", SHARED | {"num_train_timesteps": 100}),
    "deis": ("DEISMultistepScheduler", SHARED),
    "pndm": ("PNDMScheduler", SHARED | {"skip_prk_steps": True}),
    "pndm runge-kutta": ("PNDMScheduler", SHARED),
    "ipndm": ("IPNDMScheduler", {}),
    "singlestep": ("DPMSolverSinglestepScheduler", SHARED | {"lower_order_final": True}),
    "third order": ("DPMSolverMultistepScheduler", SHARED | {"solver_order": 3}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "edm": ("EDMEulerScheduler", {}),
    "edm dpmpp": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
}
ALLOWED = [f"{trained}/{name}" for trained in ("epsilon", "v_prediction") for name in SAMPLERS]
ALLOWED += [f"{trained}/{name}" for trained in ("flow", "shifted") for name in FLOW_SAMPLERS]
EVERY = [*ALLOWED, *OTHERS]


def made(name):
    """A fresh sampler: how it was trained/its name in the engine, or one that the engine does not
    offer.
    """
    if name in OTHERS:
        scheduler_class, config = OTHERS[name]
        return getattr(diffusers, scheduler_class).from_config(config)
    trained, _, sampler = name.partition("/")
    return fresh_sampler(sampler, TRAINED[trained])


def begun(name, num_steps=NUM_STEPS):
    """A sampler with its timesteps set."""
    sampler = made(name)
    # as a pipeline does by the size of the image
    shift = {"mu": 0.7} if sampler.config.get("use_dynamic_shifting") else {}
    sampler.set_timesteps(num_steps, **shift)
    return sampler


def an_image(sampler, dtype=torch.float32, shape=(1, 4, 4, 4)):
    """(latents, generator) before the first step."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    return noise * getattr(sampler, "init_noise_sigma", 1.0), generator


def step_on(sampler, step, latents, generator):
    """One denoise step, with a denoiser that is quick and bends."""
    timestep = sampler.timesteps[step]
    scaled = (
        sampler.scale_model_input(latents, timestep)
        if hasattr(sampler, "scale_model_input")
        else latents
    )
    prediction = torch.tanh(scaled * 1.5) + scaled.roll(1, -1) * 0.3
    return sampler.step(prediction, timestep, latents, **step_arguments(sampler, generator))[0]


def go_on(sampler, step, latents, generator):
    """From `step` to the end: the final latents."""
    for later in range(step, len(sampler.timesteps)):
        latents = step_on(sampler, later, latents, generator)
    return latents


def carried(name, tensors, facts, device="cpu"):
    """A fresh sampler with the saved state, its facts having been text in between."""
    sampler = made(name)
    load_sampler(sampler, tensors, json.loads(json.dumps(facts, allow_nan=False)), device)
    return sampler


def is_same(left, right):
    """Equal in type, layout, place and every bit?"""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        about = [
            (tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in (left, right)
        ]
        return (
            about[0] == about[1]
            and torch.equal(left.isnan(), right.isnan())
            and torch.equal(left.nan_to_num(), right.nan_to_num())
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            is_same(left[name], right[name]) for name in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_same, left, right))
    return left == right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_a_sampler_goes_on_from_every_step(name, dtype):
    sampler = begun(name)
    latents, generator = an_image(sampler, dtype)
    saved = []
    for step in range(len(sampler.timesteps)):
        saved.append((*save_sampler(sampler), latents.clone(), save_generator(generator)))
        latents = step_on(sampler, step, latents, generator)

    ends = [
        go_on(carried(name, tensors, facts), step, latents_then, load_generator(generator_then))
        for step, (tensors, facts, latents_then, generator_then) in enumerate(saved)
    ]

    assert torch.isfinite(latents).all()
    assert all(torch.equal(end, latents) for end in ends)


@pytest.mark.parametrize("name", EVERY)
def test_every_field_comes_back_as_it_was(name):
    sampler = begun(name)
    latents, generator = an_image(sampler, torch.bfloat16)
    for step in range(3):
        latents = step_on(sampler, step, latents, generator)

    restored = carried(name, *save_sampler(sampler))

    assert is_same(vars(restored), vars(sampler))


def test_loading_a_sampler_leaves_nothing_of_what_it_held_before():
    sampler, other = begun("epsilon/unipc"), begun("epsilon/unipc", num_steps=9)
    go_on(other, 0, *an_image(other))
    other.of_another_life = torch.ones(3)

    load_sampler(other, *save_sampler(sampler), "cpu")

    assert is_same(vars(other), vars(sampler))


def test_a_saved_state_shares_no_memory():
    sampler = begun("epsilon/dpmpp_2m")
    step_on(sampler, 0, *an_image(sampler))
    tensors, facts = save_sampler(sampler)
    restored = carried("epsilon/dpmpp_2m", tensors, facts)

    for tensor in tensors.values():
        tensor.fill_(9)

    assert is_same(vars(restored), vars(sampler))
    assert not is_same(vars(carried("epsilon/dpmpp_2m", tensors, facts)), vars(sampler))


def test_all_plain_data_can_be_a_field():
    sampler = begun("epsilon/ddim")
    plain = [
        None,
        True,
        3,
        0.1,
        -1e-320,
        float("inf"),
        "é",
        [],
        (),
        (1, [2.5, (None,)]),
        {"a": (1,), 2: [torch.ones(2)]},
    ]
    sampler.size = torch.Size([2, 3])
    numbers = [
        np.float64(0.1),
        np.int64(3),
        np.bool_(True),
        np.arange(6).reshape(2, 3).T,
        np.array(2.5),
        np.zeros((0, 2), np.float16),
    ]
    tensors = [
        torch.tensor(1.5),
        torch.zeros(0, 4),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.eye(3)[:, :1],
    ]
    sampler.plain, sampler.numbers, sampler.tensors = (
        plain,
        numbers,
        [tensor.clone() for tensor in tensors],
    )

    restored = carried("epsilon/ddim", *save_sampler(sampler))

    assert is_same(vars(restored), vars(sampler))


@pytest.mark.parametrize(
    "foreign",
    [len, object(), {1, 2}, torch.Generator(), np.array([object()])],
    ids=lambda value: type(value).__name__,
)
def test_a_field_that_is_no_plain_data_is_refused(foreign):
    sampler = begun("epsilon/ddim")
    sampler.memory = [1, foreign]

    with pytest.raises(SnapshotRefused, match=r"memory\.1 is no plain data but a "):
        save_sampler(sampler)


def test_a_sampler_that_holds_a_function_is_refused():
    with pytest.raises(SnapshotRefused, match="tau_func is no plain data but a function"):
        save_sampler(diffusers.SASolverScheduler())


def test_a_state_fits_its_own_class_only():
    saved = save_sampler(begun("epsilon/ddim"))

    with pytest.raises(
        SnapshotRefused, match="the sampler is DDIMScheduler there, EulerDiscreteScheduler here"
    ):
        load_sampler(made("epsilon/euler"), *saved, "cpu")


def test_a_state_fits_its_own_config_only():
    saved = save_sampler(begun("epsilon/ddim"))
    other = made("v_prediction/ddim")
    before = dict(vars(other))

    with pytest.raises(
        SnapshotRefused,
        match=(
            "prediction_type epsilon there, v_prediction here; "
            "rescale_betas_zero_snr false there, true"
        ),
    ):
        load_sampler(other, *saved, "cpu")

    assert is_same(vars(other), before)


def test_a_config_is_the_same_however_it_was_said():
    said = fresh_sampler("ddim", SHARED | {"num_train_timesteps": 1000, "thresholding": False})
    said.set_timesteps(NUM_STEPS)

    restored = carried("epsilon/ddim", *save_sampler(fresh_sampler("ddim", TRAINED["epsilon"])))
    load_sampler(fresh_sampler("ddim", SHARED), *save_sampler(said), "cpu")

    assert restored.config.prediction_type == "epsilon"


def test_a_generator_goes_on_drawing_where_it_was():
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    state = save_generator(generator)
    draw = partial(torch.randn, 9, dtype=torch.float64)

    assert state.nbytes == 5056
    assert torch.equal(draw(generator=load_generator(state)), draw(generator=generator))


def test_tensors_that_lay_beside_the_latents_go_to_the_device():
    sampler = begun("epsilon/unipc")
    latents, generator = an_image(sampler)
    for step in range(2):
        latents = step_on(sampler, step, latents, generator)
    tensors, facts = save_sampler(sampler)
    facts["fields"]["last_sample"]["on"] = "device"  # as a device's worker writes it

    restored = carried("epsilon/unipc", tensors, facts, device="meta")

    assert restored.last_sample.device.type == "meta"
    assert {
        tensor.device.type
        for tensor in [restored.sigmas, restored.timesteps, *restored.model_outputs]
    } == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALLOWED)
def test_a_sampler_goes_on_from_every_step_on_a_gpu(name):
    sampler = begun(name)
    latents, generator = an_image(sampler, torch.bfloat16)
    latents = latents.cuda()
    saved = []
    for step in range(NUM_STEPS):
        saved.append((*save_sampler(sampler), latents.clone(), save_generator(generator)))
        latents = step_on(sampler, step, latents, generator)

    for step, (tensors, facts, latents_then, generator_then) in enumerate(saved):
        restored = carried(name, tensors, facts, device="cuda")
        assert torch.equal(
            go_on(restored, step, latents_then, load_generator(generator_then)), latents
        )
    assert is_same(
        vars(carried(name, *save_sampler(sampler), device=latents.device)), vars(sampler)
    )
