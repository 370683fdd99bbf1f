"""Propose a model's table for fleet.toml, from what is known of its checkpoint.

The defaults are those with which such checkpoints are known to work; whoever serves the model
edits them. Pure: what is known is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from policy.fleet import Family, Fleet, Model, most_rows_of_an_image, parse_size

# Samplers that suit a family's checkpoints, the usual one in front. Those that start from noise
# only are left out: jobs with a picture would fail.
NOISE_SAMPLERS = ("euler", "euler_a", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_karras", "unipc")
FLOW_SAMPLERS = ("flow_euler", "flow_euler_karras", "flow_euler_exponential")
DISTILLED_SAMPLERS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
# The sampler that is a checkpoint's own scheduler, by the class that its configuration names.
OWN_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
# Sizes for networks that were made for squares of a side.
SIZES = {
    512: ("512x512", "512x768", "768x512"),
    768: ("768x768", "576x1024", "1024x576"),
    1024: ("1024x1024", "832x1216", "1216x832"),
}
# FLUX Kontext makes so many pixels in the shape that is asked for, unless options say otherwise.
KONTEXT = "FluxKontextPipeline"
KONTEXT_PX = 1024 * 1024
KONTEXT_SIZES = ("1024x1024", "832x1248", "1248x832")
FEW_STEPS = 4
# Steps without which a network that is not distilled leaves noise; tiers may ask for fewer.
STEPS: dict[str, int] = {"sd": 20, "sdxl": 25, "sd3": 28, "flux": 28, "pipeline": 28, "plain": 28}
# Rows of a reproducible forward: many where an image is small.
SMALL_PX = 512 * 768
SMALL_ROWS = 8
LARGE_ROWS = 4


@dataclass(frozen=True)
class Guidance:
    """Guidance of a request that names none, and the most that may be asked for."""

    default: float
    most: float


GUIDANCE: dict[str, Guidance] = {
    "sd": Guidance(7.5, 20.0),
    "sdxl": Guidance(5.0, 15.0),
    "sd3": Guidance(4.5, 15.0),
    "flux": Guidance(3.5, 30.0),
    "pipeline": Guidance(4.0, 20.0),
    "plain": Guidance(4.0, 20.0),
}
GUIDANCE_OF_PIPELINES = {
    KONTEXT: Guidance(2.5, 10.0),
    "StableDiffusionInstructPix2PixPipeline": Guidance(7.5, 20.0),
    "StableDiffusionControlNetPipeline": Guidance(7.5, 20.0),
    "StableDiffusionXLControlNetPipeline": Guidance(5.0, 15.0),
}


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What is known of a checkpoint."""

    family: Family
    pipeline_class: str = ""
    scheduler: str = ""  # the class that its configuration names
    few_steps: bool = False  # distilled to a few steps
    guidance_distilled: bool = True  # family flux
    only_repaints: bool = False
    native_side_px: int | None = None


def propose(
    facts: CheckpointFacts,
    fleet: Fleet,
    *,
    title: str,
    pool: str,
    precision: str,
    created_at: datetime,
    version: Mapping[str, Any],
    sizes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the model's table.

    fleet, pool: where it will live; its tiers decide what is needed.  version: the table of its
    one version.  sizes: that are offered; (): those that suit the checkpoint.
    """
    guidance = _guidance(facts)
    samplers = fitting_samplers(facts)
    table: dict[str, Any] = {
        "title": title,
        "family": facts.family,
        "precision": precision,
        "sizes": list(sizes) or _sizes(facts),
        "samplers": samplers,
        "default_sampler": samplers[0],
        "default_guidance": guidance.default,
        "max_guidance": guidance.most,
        "created_at": created_at,
    }
    if facts.family == "flux" and not facts.guidance_distilled:
        table["guidance_distilled"] = False
    if options := _options(facts, table["sizes"]):
        table["options"] = options
    tiers = {name: _tier_table(facts, fleet, pool, name, table) for name in fleet.tiers}
    table["tiers"] = {name: own for name, own in tiers.items() if own}
    table["versions"] = [dict(version)]
    return table


def fitting_samplers(facts: CheckpointFacts) -> list[str]:
    """List the samplers that suit a checkpoint, its own or the usual one in front."""
    if facts.family in ("pipeline", "plain"):
        return ["default"]
    if facts.family in ("sd3", "flux"):
        return list(FLOW_SAMPLERS)
    if facts.scheduler in DISTILLED_SAMPLERS:
        return [DISTILLED_SAMPLERS[facts.scheduler]]
    own = OWN_SAMPLERS.get(facts.scheduler, NOISE_SAMPLERS[0])
    return [own, *(name for name in NOISE_SAMPLERS if name != own)]


def _guidance(facts: CheckpointFacts) -> Guidance:
    if facts.family == "flux" and facts.only_repaints:
        return Guidance(30.0, 50.0)  # as FLUX Fill is used
    if facts.few_steps:
        return Guidance(1.0, 2.0)  # more spoils what is distilled
    return GUIDANCE_OF_PIPELINES.get(facts.pipeline_class, GUIDANCE[facts.family])


def _options(facts: CheckpointFacts, sizes: Sequence[str]) -> dict[str, Any]:
    """Return the arguments without which the pipeline would make other sizes than the first."""
    pixels = math.prod(parse_size(sizes[0]))
    if facts.pipeline_class != KONTEXT or pixels == KONTEXT_PX:
        return {}
    return {"max_area": pixels, "_auto_resize": False}


def _sizes(facts: CheckpointFacts) -> list[str]:
    if facts.pipeline_class == KONTEXT:
        return list(KONTEXT_SIZES)
    side = facts.native_side_px or 1024
    return list(SIZES.get(side, (f"{side}x{side}",)))


def _tier_table(
    facts: CheckpointFacts, fleet: Fleet, pool: str, tier: str, table: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what differs in one tier; {} where nothing does."""
    own: dict[str, Any] = {}
    said = fleet.tiers[tier]
    needed = FEW_STEPS if facts.few_steps else max(STEPS[facts.family], said.default_steps)
    if min(needed, said.max_steps) != said.default_steps:
        own["default_steps"] = min(needed, said.max_steps)
    if said.determinism == "reproducible":
        most = fleet.pools[pool].max_batch_rows
        least = _rows_of_an_image(table)
        own["bucket_rows"] = {
            size: max(least, min(most, _bucket_rows(size, least))) for size in table["sizes"]
        }
    return own


def _rows_of_an_image(table: Mapping[str, Any]) -> int:
    fields = {"family", "guidance_distilled", "max_guidance"}
    told = {key: value for key, value in table.items() if key in fields}
    return most_rows_of_an_image(Model.model_construct(**told, versions=()))


def _bucket_rows(size: str, rows_of_an_image: int) -> int:
    rows = SMALL_ROWS if math.prod(parse_size(size)) <= SMALL_PX else LARGE_ROWS
    return rows if rows_of_an_image > 1 else rows // 2
