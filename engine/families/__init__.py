"""Network families: each knows how one kind of checkpoint is loaded, encoded, denoised and decoded.

A family is named in a `CheckpointSpec` and imported only then. The contract is `contract.Family`; a
method of a family that says nothing of itself does what it says there.
"""

from importlib import import_module
from typing import cast

from engine.errors import UnsupportedRequest
from engine.families.contract import Family

FAMILIES = {
    "sd": "engine.families.sd:StableDiffusion",  # SD 1.x and 2.x: UNet, one CLIP text encoder
    # UNet, two CLIP text encoders, sizes as conditions.
    "sdxl": "engine.families.sdxl:StableDiffusionXL",
    # SD3 and 3.5: MMDiT, flow matching, two CLIP and T5.
    "sd3": "engine.families.sd3:StableDiffusion3",
    "flux": "engine.families.flux:Flux",  # FLUX.1: packed latents, distilled guidance, CLIP and T5
    # Any other diffusers pipeline, its denoiser calls batched.
    "pipeline": "engine.families.pipeline.batched:Pipeline",
    # The last resort: one whole call at a time, in turns of a step.
    "plain": "engine.families.pipeline.plain:PlainPipeline",
}


def family_named(name: str) -> type[Family]:
    """Give the class that serves checkpoints of this family.

    Raises `UnsupportedRequest` for a name nobody serves.
    """
    if name not in FAMILIES:
        raise UnsupportedRequest("family", f"{name!r} is none of {', '.join(sorted(FAMILIES))}")
    module, _, attribute = FAMILIES[name].partition(":")
    return cast(type[Family], getattr(import_module(module), attribute))
