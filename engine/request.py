"""What a caller asks of the engine: one image, every parameter resolved.

Plain values only. It does not know tiers, tenants or jobs; `rank` and `group` are all that is left of them here.
"""

from dataclasses import dataclass
from enum import StrEnum


class Determinism(StrEnum):
    """How strictly an image must not depend on its neighbours in a batch."""

    BEST_EFFORT = "best_effort"  # the smallest forward that fits: the last bits may differ with load
    REPRODUCIBLE = "reproducible"  # every forward has exactly `bucket_rows` rows: the same bits alone and in company


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to render. Frozen: what happens to it is an `InFlight`."""

    id: str  # unique among the requests in one engine
    group: str  # the job it belongs to; a neighbour is an image of another group
    checkpoint: str
    prompt: str
    negative_prompt: str = ""
    width_px: int
    height_px: int
    num_steps: int
    guidance: float  # 1 or less: no classifier-free guidance, one row of a forward instead of two
    sampler: str
    seed: int  # 0..2**63-1; drawn on the CPU, so the noise is the same on every device
    determinism: Determinism = Determinism.BEST_EFFORT
    bucket_rows: int | None = None  # required for reproducible, ignored for best effort
    rank: int = 0  # 0 is served first

    @property
    def is_guided(self) -> bool:
        """Does it ask for classifier-free guidance?"""
        return self.guidance > 1

    @property
    def pinned_rows(self) -> int | None:
        """The number of rows every forward of this image must have; None where the engine may choose."""
        return self.bucket_rows if self.determinism == Determinism.REPRODUCIBLE else None
