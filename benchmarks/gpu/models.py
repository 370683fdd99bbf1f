"""The two models of which speed is measured, as people use them, and what makes them faster."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.cells import Setting

Changes = Mapping[str, Any]
"""Of a checkpoint's spec."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is rendered, and how often."""

    family: str
    num_steps: int
    guidance: float
    rows: int  # of one image: 2 with classifier-free guidance
    max_batch_rows: int
    plain_images: int  # before the engine's, and once more after them
    alone_images: int  # one after the other
    busy_images: int  # all at once
    variant_alone_images: int  # the same, of the engine's faster variants
    variant_busy_images: int

    @property
    def plain_batch(self) -> int:
        """Return the images of a call of the pipeline that has as many rows as ours."""
        return self.max_batch_rows // self.rows


MODELS = {
    "sdxl": Model(
        family="sdxl",
        num_steps=20,
        guidance=5.0,
        rows=2,
        max_batch_rows=16,
        plain_images=5,
        alone_images=8,
        busy_images=24,
        variant_alone_images=4,
        variant_busy_images=24,
    ),
    # Rows bring it next to nothing, so its variants render few at once.
    "flux": Model(
        family="flux",
        num_steps=28,
        guidance=3.5,
        rows=1,
        max_batch_rows=4,
        plain_images=1,
        alone_images=2,
        busy_images=4,
        variant_alone_images=1,
        variant_busy_images=2,
    ),
}

VARIANTS: dict[str, Changes] = {
    "graphs": {"cuda_graphs": True},
    "channels_last": {"channels_last": True},
    "compiled": {"compile_blocks": True},
    "compiled_graphs": {"compile_blocks": True, "cuda_graphs": True},
    "float8": {"quantize": "float8"},
    "float8_graphs": {"quantize": "float8", "cuda_graphs": True},
    "int8": {"quantize": "int8"},
    "int8_graphs": {"quantize": "int8", "cuda_graphs": True},
}
"""Faster or smaller checkpoints, by the names of their cells."""

LAUNCHES = {"eager": "launches", "graphs": "launches_graphs"}
"""Cells that part launch and device, by variant."""

ROWS = (1, 2, 4, 8, 16)  # of the forwards that curves are drawn through


def model_named(name: str, setting: Setting) -> Model:
    """Return the model with as many images as the setting allows."""
    model = MODELS[name]
    if setting.tiny:
        return replace(
            model,
            num_steps=3,
            plain_images=1,
            alone_images=1,
            busy_images=3,
            variant_alone_images=1,
            variant_busy_images=2,
            max_batch_rows=4,
        )
    if setting.quick:
        return replace(
            model,
            plain_images=min(2, model.plain_images),
            alone_images=2,
            busy_images=model.busy_images // 3 + 1,
            variant_alone_images=1,
            variant_busy_images=model.variant_busy_images // 3 + 1,
        )
    return model
