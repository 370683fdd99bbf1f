"""Count how much denoising an image takes: the steps it really makes, and the rows of each forward.

The engine's families decide both; this says beforehand what they will do, for prediction, quotas
and progress. tests/engine/test_steps.py compares the two.
"""

from dataclasses import dataclass
from typing import Protocol

from policy.fleet import OPEN_FAMILIES, Family, Fleet, Model, true_cfg_scale
from policy.params import Resolved

# Pipelines of flow matching round steps up; those of noise prediction round down.
ROUND_UP_FAMILIES: tuple[Family, ...] = ("sd3", "flux")


@dataclass(frozen=True)
class Denoising:
    """The denoising of one image.  steps: denoise steps.  rows: of each step's forward."""

    steps: int
    rows: int


class AcceptedJob(Protocol):
    """The columns of a job that count its steps.

    steps_per_image: None in a job that was accepted before the column existed.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def steps_per_image(self) -> int | None: ...


def image_steps(job: AcceptedJob) -> int:
    """Return the denoise steps that each image of an accepted job makes, as the job was counted."""
    return job.num_steps if job.steps_per_image is None else job.steps_per_image


def denoising_of(fleet: Fleet, job: Resolved) -> Denoising:
    """Count the denoising of each image of the job.

    A model that the catalogue no longer has counts as one of family `sd`.
    """
    model = fleet.model_or_retired(job.model).of_version(job.model_version)
    return Denoising(
        steps=steps_made(model.family, num_steps=job.num_steps, strength=job.strength),
        rows=rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt),
    )


def steps_made(family: str, *, num_steps: int, strength: float | None) -> int:
    """Count the denoise steps of an image, without those that a picture to start from spares.

    strength: how far from that picture it starts, above 0 and at most 1; None without one, or where
    a pipeline decides. Of the open families it is the most likely number: the engine tells the true
    one when the image begins.
    """
    if strength is None:
        return num_steps
    noisy_steps = min(num_steps * strength, num_steps)
    if family in ROUND_UP_FAMILIES:
        return max(1, num_steps - int(num_steps - noisy_steps))
    return max(1, int(noisy_steps))


def rows_taken(model: Model, *, guidance: float, negative_prompt: str) -> int:
    """Count the rows of an image in each forward: 2 with classifier-free guidance, else 1.

    FLUX guides by a second row only where its network does not take guidance as an input, and only
    away from a negative prompt. Of the open families it is the most likely number; an option of the
    catalogue that guides is told to every call.
    """
    scale: float = guidance
    if model.family == "flux" and model.guidance_distilled:
        scale = true_cfg_scale(model)
    elif model.family == "flux" and not negative_prompt:
        scale = 1.0
    elif model.family in OPEN_FAMILIES:
        said = model.options.get("true_cfg_scale", model.options.get("guidance_scale", guidance))
        scale = float(said)
    return 2 if scale > 1 else 1
