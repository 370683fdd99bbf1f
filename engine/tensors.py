"""What images of native families hold on the device, and the terms for it. Knows torch alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Named tensors, each [b, ...] with the same b."""


class Sampler(Protocol):
    """What the engine uses of a diffusers scheduler object.

    In this house a *scheduler* decides which images advance.
    """

    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
    ) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]: ...


@dataclass(eq=False)
class Tensors:
    """What an image of a native family holds on the device between two forwards."""

    # A diffusers scheduler object of its own: multi-step samplers remember earlier steps.
    sampler: Sampler
    timesteps: Tensor  # [num_steps], on the CPU
    conditioning: Rows  # each tensor [rows, ...]; with guidance in the order uncond, cond
    # [1, c, h/8, w/8], or packed as the family's denoiser takes them: [1, tokens, c].
    latents: Tensor
    generator: torch.Generator  # on the CPU: initial noise, then what a stochastic sampler draws
    # What image-to-image and inpainting need again at every step.
    extras: dict[str, Tensor] = field(default_factory=dict)
    clean: Tensor | None = None  # latents as the last step predicted them; only for who watches
