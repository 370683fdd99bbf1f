"""The request for one image, with every parameter resolved.

Plain values only. It does not know tiers, tenants or jobs; `rank`, `group` and `owner` are all that
is left of them here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Option = str | int | float | bool


class Determinism(StrEnum):
    """How strictly an image must not depend on its neighbours in a batch."""

    # The smallest forward that fits: the last bits may differ with load.
    BEST_EFFORT = "best_effort"
    # Every forward has exactly `bucket_rows` rows: the same bits alone and in company.
    REPRODUCIBLE = "reproducible"


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels that a request starts from, repaints or is guided by.

    Two pictures are equal when their pixels are.
    """

    # [h, w, 3]; a mask is [h, w], 255 where it is repainted. Not written to from here on.
    pixels: NDArray[np.uint8]

    @cached_property
    def sha256(self) -> str:
        """Return the sha256 of the shape and the pixels, hex."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


@dataclass(frozen=True)
class AdapterUse:
    """One adapter laid over the checkpoint for this image alone."""

    name: str  # of one of the checkpoint's adapters
    strength: float = 1.0


@dataclass(frozen=True)
class Fork:
    """Start from latents that an earlier image of the same owner kept after a step.

    The prompt is this request's.
    """

    image_id: str
    step: int  # one of that image's `keep_steps`


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to render. Frozen: what happens to it is an `InFlight`."""

    id: str  # unique among the requests in one engine
    group: str  # the job it belongs to; a neighbour is an image of another group
    owner: str = ""  # whose it is: only images of one owner share kept latents
    # Version of the safety rules it was admitted under; results cached under others are not used.
    policy_version: str = ""
    checkpoint: str
    prompt: str
    negative_prompt: str = ""
    width_px: int
    height_px: int
    num_steps: int
    guidance: float  # 1 or less: no classifier-free guidance, one row of a forward instead of two
    sampler: str
    seed: int  # 0..2**63-1; drawn on the CPU, so the noise is the same on every device
    # [height_px, width_px, 3]: start from it instead of from noise alone.
    init_image: Picture | None = None
    # [height_px, width_px]: repaint where it is 255; needs `init_image`.
    mask: Picture | None = None
    # 0..1: how much of `init_image` is noise at the start; the steps behind that are skipped. None:
    # what the call of a pipeline does by itself; everywhere else 1.
    strength: float | None = None
    control_image: Picture | None = None  # what a control network follows
    clip_skip: int = 0  # layers of the CLIP text encoder left out at its end
    adapters: tuple[AdapterUse, ...] = ()
    # Further arguments of a diffusers pipeline's own call.
    options: Mapping[str, Option] = field(default_factory=dict)
    # For iterative edits; workers set neither yet. Keep the latents after these steps for a `Fork`:
    keep_steps: tuple[int, ...] = ()
    fork: Fork | None = None
    determinism: Determinism = Determinism.BEST_EFFORT
    bucket_rows: int | None = None  # required for reproducible, ignored for best effort
    rank: int = 0  # 0 is served first
    # Whether a best-effort image may skip blocks, where the checkpoint has a block cache.
    may_skip_blocks: bool = True

    @property
    def is_guided(self) -> bool:
        """Tell whether the request asks for classifier-free guidance."""
        return self.guidance > 1

    @property
    def noise_share(self) -> float:
        """Return the strength, 1 where the request leaves it open."""
        return 1.0 if self.strength is None else self.strength

    @property
    def is_reproducible(self) -> bool:
        """Tell whether the image must have the same bits alone and in company."""
        return self.determinism == Determinism.REPRODUCIBLE

    @property
    def pinned_rows(self) -> int | None:
        """Return the number of rows that every forward of this image must have.

        None where the engine may choose.
        """
        return self.bucket_rows if self.is_reproducible else None
