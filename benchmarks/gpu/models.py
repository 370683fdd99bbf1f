"""The two models of which speed is measured, as people use them, and how long that takes."""

from collections.abc import Mapping
from dataclasses import dataclass

Changes = Mapping[str, bool]
"""Of a checkpoint's spec."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is rendered, how often, and in which variants of the engine."""

    family: str
    num_steps: int
    guidance: float
    max_batch_rows: int
    plain_images: int  # before the engine's, and once more after them
    alone_images: int  # one after the other
    busy_images: int  # all at once
    variants: Mapping[str, Changes]
    needs_s: Mapping[str, float]  # on an H200, about: a cell is not begun with less left


MODELS = {
    "sdxl": Model(
        family="sdxl",
        num_steps=20,
        guidance=5.0,
        max_batch_rows=16,
        plain_images=5,
        alone_images=8,
        busy_images=24,
        variants={
            "graphs": {"cuda_graphs": True},
            "channels_last": {"channels_last": True},
            "compiled": {"compile_blocks": True},
            "compiled_graphs": {"compile_blocks": True, "cuda_graphs": True},
        },
        needs_s={
            "eager": 45,
            "overlap": 5,
            "graphs": 25,
            "channels_last": 25,
            "plain_compiled": 60,
            "compiled": 45,
            "compiled_graphs": 30,
        },
    ),
    "flux": Model(
        family="flux",
        num_steps=28,
        guidance=3.5,
        max_batch_rows=4,
        plain_images=2,
        alone_images=3,
        busy_images=4,
        variants={
            "graphs": {"cuda_graphs": True},
            "compiled": {"compile_blocks": True},
            "compiled_graphs": {"compile_blocks": True, "cuda_graphs": True},
        },
        needs_s={
            "eager": 80,
            "overlap": 12,
            "graphs": 50,
            "plain_compiled": 60,
            "compiled": 60,
            "compiled_graphs": 50,
        },
    ),
}

ROWS = (1, 2, 4, 8, 16)  # of the forwards that curves are drawn through
