"""A finished image: its pixels and the account of how they were made."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.fingerprint import Fingerprint
from engine.inflight import InFlight
from engine.request import ImageRequest
from engine.texts import TokenCount

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RenderRecord:
    """What one image took, and everything its bits depended on besides the request.

    Device seconds are this image's share: of each forward's seconds, its own rows / the used
    (unpadded) rows, plus its own encode and decode. The shares of all images of a forward add up to
    that forward. Rows are counted without padding.
    """

    num_steps: int
    device_seconds: float  # encode_s + denoise_s + decode_s
    encode_s: float
    denoise_s: float
    decode_s: float
    padding_s: float  # of `denoise_s`: its share of rows that padded its forwards
    waited_s: float  # from submit to its first denoise step
    forwards: int
    shared_forwards: int  # forwards in which an image of another group took part
    max_rows: int
    max_images: int
    mean_rows: float
    bucket_rows: int | None  # the pinned rows of a reproducible image; None for best effort
    prompt: TokenCount | None  # the tokens of its prompt; None where its family cannot tell
    fingerprint: str  # sha256 of the facts, hex
    fingerprint_facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FinishedImage:
    """One rendered image. The caller owns `pixels`: the engine keeps no view of them."""

    request: ImageRequest
    pixels: NDArray[np.uint8]  # [h, w, 3]
    record: RenderRecord


def render_record(image: InFlight, bits: Fingerprint) -> RenderRecord:
    """Write the account of an image that has been decoded; `bits` is its fingerprint."""
    account = image.account
    return RenderRecord(
        num_steps=image.num_steps,
        device_seconds=account.device_seconds,
        encode_s=account.encode_s,
        denoise_s=account.denoise_s,
        decode_s=account.decode_s,
        padding_s=account.padding_s,
        waited_s=(image.first_step_at or image.submitted_at) - image.submitted_at,
        forwards=account.forwards,
        shared_forwards=account.shared_forwards,
        max_rows=account.max_rows,
        max_images=account.max_images,
        mean_rows=account.rows_total / account.forwards if account.forwards else 0.0,
        bucket_rows=image.request.pinned_rows,
        prompt=image.prompt,
        fingerprint=bits.sha256,
        fingerprint_facts=deepcopy(bits.facts),
    )
