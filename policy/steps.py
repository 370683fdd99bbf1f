"""How much denoising an image takes: the steps it really makes, and the rows of each step's forward.

The engine's families decide both; this says beforehand what they will do, for prediction, quotas
and progress. tests/engine/test_steps.py holds the two together.
"""

from dataclasses import dataclass
from typing import Protocol

from policy.fleet import FLOW_FAMILIES, OPEN_FAMILIES, Fleet, Model
from policy.params import Resolved

ROUND_UP = (
    FLOW_FAMILIES  # as the pipelines of flow matching do; those of noise prediction round down
)


@dataclass(frozen=True)
class Denoising:
    """What one image takes.  steps: denoise steps.  rows: of each step's forward."""

    steps: int
    rows: int


class AcceptedJob(Protocol):
    """A job's row, as far as its steps go. steps_per_image: None of one accepted before they were noted."""

    @property
    def num_steps(self) -> int: ...

    @property
    def steps_per_image(self) -> int | None: ...


def image_steps(job: AcceptedJob) -> int:
    """Give the denoise steps that each image of an accepted job makes, as the job was counted."""
    return job.num_steps if job.steps_per_image is None else job.steps_per_image


def denoising_of(fleet: Fleet, job: Resolved) -> Denoising:
    """Tell what each image of the job takes; of a model that the catalogue no longer has, as `sd`."""
    model = fleet.model_or_retired(job.model)
    return Denoising(
        steps=steps_made(model.family, num_steps=job.num_steps, strength=job.strength),
        rows=rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt),
    )


def steps_made(family: str, *, num_steps: int, strength: float | None) -> int:
    """Count the denoise steps of an image: those that the picture it starts from makes needless are skipped.

    strength: how far from that picture it starts, above 0 and at most 1; None without one. Of the
    open families it is the most likely number: the engine tells the true one when the image begins.
    """
    if strength is None:
        return num_steps
    noisy_steps = min(num_steps * strength, num_steps)
    if family in ROUND_UP:
        return max(1, num_steps - int(num_steps - noisy_steps))
    return max(1, int(noisy_steps))


def rows_taken(model: Model, *, guidance: float, negative_prompt: str) -> int:
    """Count the rows of an image in each forward: 2 with classifier-free guidance, else 1.

    FLUX guides by a second row only where its network does not take guidance as an input, and only
    away from a negative prompt. Of the open families it is the most likely number; an option of the
    catalogue that guides is told to every call.
    """
    scale: float = guidance
    if model.family == "flux" and (model.guidance_distilled or not negative_prompt):
        scale = 1.0
    elif model.family in OPEN_FAMILIES:
        said = model.options.get("true_cfg_scale", model.options.get("guidance_scale", guidance))
        scale = float(said)
    return 2 if scale > 1 else 1
