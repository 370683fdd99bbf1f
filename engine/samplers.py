"""The samplers that may be asked for, and how a fresh one is made.

A sampler is a diffusers scheduler object made from the checkpoint's own scheduler config. It belongs to one image: multi-step
samplers remember earlier predictions, and stepping rows of a batch together is not bit-equal in bf16. A call costs 0.05 to 1 ms.

Every name here was checked to give the bits of `pipe(...)` (tests/engine/test_parity.py), and makes exactly one forward per step.
Left out: Heun, KDPM2, PNDM (more forwards than steps asked for, which progress and cost do not say yet), DPM-SDE and SASolver
(state that is not plain data), LMS (needs scipy). DEIS, IPNDM and singlestep DPM++ do not know zero terminal SNR, which a
checkpoint may be trained for, and would silently start at the wrong noise level.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch

from engine.errors import UnsupportedRequest
from engine.families.contract import Sampler


@dataclass(frozen=True)
class Recipe:
    """A diffusers scheduler class and what is laid over the checkpoint's config."""

    scheduler_class: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    is_distilled: bool = False  # for checkpoints distilled to few steps: picks from the steps of the training schedule


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


def check_sampler(name: str, num_steps: int, config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedRequest` for a sampler nobody allows, or more steps than its schedule has. Plain numbers only."""
    if name not in SAMPLERS:
        raise UnsupportedRequest("sampler", f"{name!r} is none of {', '.join(SAMPLERS)}")
    most = int(config.get("num_train_timesteps", 1000))
    if SAMPLERS[name].is_distilled:
        most = min(most, int(config.get("original_inference_steps", 50)))
    if not 1 <= num_steps <= most:
        raise UnsupportedRequest("num_steps", f"{num_steps} is not within 1..{most} for {name}")


def fresh_sampler(name: str, config: Mapping[str, Any]) -> Sampler:
    """Make a sampler that no other image shares; `config` is the checkpoint's and is left untouched."""
    recipe = SAMPLERS[name]
    return cast(Sampler, _scheduler_class(recipe.scheduler_class).from_config(dict(config), **recipe.overrides))


def step_arguments(sampler: Sampler, generator: torch.Generator) -> dict[str, Any]:
    """The extra arguments `pipe(...)` would give to `sampler.step`: the image's own generator, and eta 0 where eta is known."""
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
