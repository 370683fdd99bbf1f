"""The samplers that may be asked for, and how a fresh one is made.

A sampler is a diffusers scheduler object made from the checkpoint's own scheduler config. It
belongs to one image: multi-step samplers remember earlier predictions, and stepping rows of a batch
together is not bit-equal in bf16. A call costs 0.05 to 1 ms.

Every name here was checked to give the bits of `pipe(...)` (tests/engine/test_parity*.py), and
makes exactly one forward per step.

For checkpoints that predict noise (or v, or the sample), `SAMPLERS`. Left out: Heun, KDPM2, PNDM
(more forwards than steps asked for, which progress and cost do not say yet), DPM-SDE and SASolver
(state that is not plain data), LMS (needs scipy). DEIS, IPNDM and singlestep DPM++ do not know zero
terminal SNR, which a checkpoint may be trained for, and would silently start at the wrong noise
level.

For checkpoints that predict a flow's velocity, `FLOW_SAMPLERS`. Left out: Heun again, beta sigmas
(need scipy), Euler with `stochastic_sampling` (it is flow_lcm by another name), the SDE variants of
DPM++, DEIS and singlestep DPM++ (an allowed name is a promise with a test; these promise nothing
that the two multi-step ones do not). What draws noise, flow_lcm alone, draws it from the image's
own generator; `pipe(...)` gives its scheduler none, and draws from the process's.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from engine.capabilities import SamplerLimits
from engine.tensors import Sampler
from engine.transfers import without_waits


@dataclass(frozen=True)
class Recipe:
    """A diffusers scheduler class and what is laid over the checkpoint's config."""

    scheduler_class: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # For checkpoints distilled to few steps: picks from the steps of the training schedule.
    is_distilled: bool = False
    # Names of the config that this class spells otherwise: its name -> theirs.
    renames: Mapping[str, str] = field(default_factory=dict)
    starts_from_noise_only: bool = False  # cannot mix a picture with noise as flow matching does
    refuses_idle_mu: bool = False  # cannot be told a shift (`mu`) that its config does not ask for


SAMPLERS: dict[str, Recipe] = {
    "ddim": Recipe("DDIMScheduler"),
    "ddpm": Recipe("DDPMScheduler"),
    "euler": Recipe("EulerDiscreteScheduler"),
    "euler_a": Recipe("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Recipe("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Recipe("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": Recipe("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Recipe("UniPCMultistepScheduler"),
    "lcm": Recipe("LCMScheduler", is_distilled=True),
    "tcd": Recipe("TCDScheduler", is_distilled=True),
}

# These override whatever the checkpoint asks for.
_PLAIN_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_AS_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} | _PLAIN_SIGMAS

FLOW_SAMPLERS: dict[str, Recipe] = {
    "flow_euler": Recipe("FlowMatchEulerDiscreteScheduler"),
    "flow_euler_karras": Recipe(
        "FlowMatchEulerDiscreteScheduler", _PLAIN_SIGMAS | {"use_karras_sigmas": True}
    ),
    "flow_euler_exponential": Recipe(
        "FlowMatchEulerDiscreteScheduler", _PLAIN_SIGMAS | {"use_exponential_sigmas": True}
    ),
    # None: latents keep their size from step to step.
    "flow_lcm": Recipe("FlowMatchLCMScheduler", {"scale_factors": None}),
    "flow_dpmpp_2m": Recipe(
        "DPMSolverMultistepScheduler",
        _AS_FLOW,
        renames={"flow_shift": "shift"},
        starts_from_noise_only=True,
        refuses_idle_mu=True,
    ),
    "flow_unipc": Recipe(
        "UniPCMultistepScheduler",
        _AS_FLOW,
        renames={"flow_shift": "shift"},
        starts_from_noise_only=True,
    ),
}


def sampler_limits(
    config: Mapping[str, Any], recipes: Mapping[str, Recipe] = SAMPLERS
) -> dict[str, SamplerLimits]:
    """Tell what each sampler takes with the schedule of this scheduler config."""
    schedule = int(config.get("num_train_timesteps", 1000))
    distilled = min(schedule, int(config.get("original_inference_steps", 50)))
    return {
        name: SamplerLimits(
            max_steps=distilled if recipe.is_distilled else schedule,
            takes_picture=not recipe.starts_from_noise_only,
        )
        for name, recipe in recipes.items()
    }


def fresh_sampler(name: str, config: Mapping[str, Any]) -> Sampler:
    """Make a sampler that no other image shares.

    `config` is the checkpoint's and is left untouched.
    """
    recipe = (SAMPLERS | FLOW_SAMPLERS)[name]
    renamed = {ours: config[theirs] for ours, theirs in recipe.renames.items() if theirs in config}
    kind = _scheduler_class(recipe.scheduler_class)
    return cast(Sampler, kind.from_config(dict(config), **recipe.overrides, **renamed))


def sampler_step(
    sampler: Sampler,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Advance latents by one step of their own sampler, as `pipe(...)` does.

    Waits for no device: noise is drawn on the host and its copy launched, and the factors of
    multi-step samplers are computed on the host.
    """
    with without_waits(latents.device, keeps_numbers=True):
        more = step_arguments(sampler, generator)
        return sampler.step(prediction, timestep, latents, **more)[0]


def add_noise(sampler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Mix clean latents with noise as they are before this timestep, bit for bit as the sampler.

    The sampler is asked on the host what part of each there is: it would move its tables to the
    latents' device, and look for its place there.
    """
    clean_parts = torch.tensor([1.0, 0.0], dtype=clean.dtype)
    noise_parts = torch.tensor([0.0, 1.0], dtype=clean.dtype)
    if hasattr(sampler, "scale_noise"):  # of a flow; it takes the same arguments in another order
        mixed = sampler.scale_noise(clean_parts, timestep[None], noise_parts)
    else:
        mixed = sampler.add_noise(clean_parts, noise_parts, timestep[None])
    of_clean, of_noise = mixed.tolist()
    noisy: Tensor = of_clean * clean + of_noise * noise
    return noisy


def step_arguments(sampler: Sampler, generator: torch.Generator) -> dict[str, Any]:
    """Return the extra arguments that `pipe(...)` would give to `sampler.step`.

    They are the image's own generator, and eta 0 where eta is known.
    """
    accepted = _step_parameters(type(sampler))
    arguments: dict[str, Any] = {"return_dict": False}
    if "generator" in accepted:
        arguments["generator"] = generator
    if "eta" in accepted:
        arguments["eta"] = 0.0
    return arguments


@cache
def _scheduler_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@cache
def _step_parameters(sampler_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(sampler_class.step).parameters)
