"""What a finished image is handed out with: its pixels and the account of how they were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.request import ImageRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RenderRecord:
    """What one image took, and everything its bits depended on besides the request.

    Device seconds are this image's share: of each forward's seconds, its own rows / the used (unpadded) rows, plus its own
    encode and decode. The shares of all images of a forward add up to that forward. Rows are counted without padding.
    """

    num_steps: int
    device_seconds: float  # encode_s + denoise_s + decode_s
    encode_s: float
    denoise_s: float
    decode_s: float
    waited_s: float  # from submit to its first denoise step
    forwards: int
    shared_forwards: int  # forwards in which an image of another group took part
    max_rows: int
    max_images: int
    mean_rows: float
    bucket_rows: int | None  # the pinned rows of a reproducible image; None for best effort
    fingerprint: str  # sha256 of the facts, hex
    fingerprint_facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FinishedImage:
    """One rendered image. The caller owns `pixels`: the engine keeps no view of them."""

    request: ImageRequest
    pixels: NDArray[np.uint8]  # [h, w, 3]
    record: RenderRecord
