"""Checkpoints without weights.

A checkpoint here is a folder of configs whose networks are drawn at random on the device that runs
them. A network of 12 billion parameters is there in seconds, with nothing downloaded and nothing
passing through the disk or the host. All else is the engine's own: the folder is hashed and loaded,
its family is one that `register` adds to the engine's. Random weights show cost and bits, and no
picture. Scales: `full` are the published configs; `small` takes the kernels of large networks in
milliseconds; `tiny` runs anywhere. Text encoders have the widths that are needed and next to no
depth.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.configs import CONFIGS, SAMPLERS, SIDES
from engine.config import CheckpointSpec
from engine.families import FAMILIES
from engine.request import ImageRequest

FOLDER = "drawn"  # of the checkpoint; holds one file
FILE = "networks.json"


def register() -> None:
    """Let the engine know the families whose weights are drawn at random."""
    FAMILIES.update(
        drawn_sd="benchmarks.gpu.random_networks:DrawnStableDiffusion",
        drawn_sdxl="benchmarks.gpu.random_networks:DrawnStableDiffusionXL",
        drawn_sd3="benchmarks.gpu.random_networks:DrawnStableDiffusion3",
        drawn_flux="benchmarks.gpu.random_networks:DrawnFlux",
    )


def write_checkpoint(
    folder: Path, family: str, scale: str, *, seed: int = 0, **changes: Any
) -> CheckpointSpec:
    """Write a checkpoint folder below `folder`, and return what an engine loads it by.

    family: sd, sdxl, sd3 or flux.  scale: full, small or tiny.  seed: of the weights.  changes: to
    the spec, which says bf16 and the size that goes with the scale.
    """
    register()
    path = folder / f"{family}-{scale}-{seed}"
    (path / FOLDER).mkdir(parents=True, exist_ok=True)
    contents = {"seed": seed, "networks": CONFIGS[family, scale]}
    (path / FOLDER / FILE).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    side_px = SIDES[scale]
    given = {
        "name": f"{family}-{scale}",
        "path": str(path),
        "family": f"drawn_{family}",
        "precision": "bf16",
        "sizes": ((side_px, side_px),),
        "samplers": SAMPLERS[family],
    }
    return CheckpointSpec(**{**given, **changes})


def a_request(spec: CheckpointSpec, id: str = "image", **changes: Any) -> ImageRequest:
    """Make a request that this checkpoint serves.

    Its first size and sampler, four steps, guided (classifier-free, but for FLUX).
    """
    width_px, height_px = spec.sizes[0]
    given = {
        "id": id,
        "group": id,
        "checkpoint": spec.name,
        "prompt": "a red circle on a blue background",
        "width_px": width_px,
        "height_px": height_px,
        "num_steps": 4,
        "guidance": 3.5,
        "sampler": spec.samplers[0],
        "seed": 0,
    }
    return ImageRequest(**{**given, **changes})
