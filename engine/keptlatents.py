"""Latents kept after chosen steps of an image: another request of its owner can start from there.

For iterative edits. No request of the product asks for that yet (`keep_steps`, `fork`): callers of
`Engine` do, and the tests.

Same owner only: latents hold a picture, and one customer's must never show in another's. Bounded in
bytes, least recently used out first, on the host.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetools import LRUCache

from engine.errors import UnsupportedRequest
from engine.request import Fork, ImageRequest

if TYPE_CHECKING:
    from torch import Tensor

# What must agree for two schedules to have one noise level at one step, and for the origin to have
# passed today's safety rules.
SAME_FOR_A_FORK = ("checkpoint", "width_px", "height_px", "num_steps", "sampler", "policy_version")


@dataclass(frozen=True)
class StepLatents:
    """The latents of `request` after `step`, on the CPU; nobody writes to them."""

    request: ImageRequest
    weights_digest: str
    step: int
    latents: Tensor

    @property
    def size_bytes(self) -> int:
        """Return the size of the latents."""
        return self.latents.numel() * self.latents.element_size()


class KeptLatents:
    """StepLatents latents by (owner, image id, step). Any thread may call."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._entries: LRUCache[tuple[str, str, int], StepLatents] = LRUCache(
            max_bytes,
            getsizeof=lambda kept: kept.size_bytes,
        )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Return the size of all latents that are kept."""
        return int(self._entries.currsize)

    def keep(self, kept: StepLatents) -> None:
        """Keep latents until there is no room for them.

        What is larger than all the room is not kept.
        """
        if kept.size_bytes > self.max_bytes:
            return
        with self._lock:
            self._entries[kept.request.owner, kept.request.id, kept.step] = kept

    def find(self, owner: str, fork: Fork) -> StepLatents:
        """Give what this owner's image kept after that step.

        Raises `UnsupportedRequest` when it is not (or no longer) here.
        """
        with self._lock:
            kept = self._entries.get((owner, fork.image_id, fork.step))
            if kept is not None:
                self.hits += 1
                return kept
            self.misses += 1
        reason = f"no latents of image {fork.image_id!r} are kept after step {fork.step}"
        raise UnsupportedRequest("fork", reason)

    def forget(self, weights_digest: str) -> None:
        """Drop the latents that these weights made."""
        with self._lock:
            entries = list(self._entries.items())
            for key, kept in entries:
                if kept.weights_digest == weights_digest:
                    del self._entries[key]

    def stats(self) -> dict[str, int]:
        """Give plain numbers since the start."""
        return {
            "latent_cache_hits": self.hits,
            "latent_cache_misses": self.misses,
            "latent_cache_bytes": self.size_bytes,
        }


def digest_of_latents(latents: Tensor) -> str:
    """Return the sha256 of the latents' bytes, hex.

    A fork's bits depend on them, and its request does not name them.
    """
    import torch

    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def check_fork(
    request: ImageRequest, origin: ImageRequest, weights_digest: str, origin_digest: str, step: int
) -> None:
    """Raise `UnsupportedRequest` when `request` cannot continue from latents of `origin`.

    The latents were kept after `step`.
    """
    for name in SAME_FOR_A_FORK:
        wanted = getattr(request, name)
        found = getattr(origin, name)
        if wanted != found:
            raise UnsupportedRequest(
                name, f"{wanted!r}: a fork must have that of its origin, {found!r}"
            )
    if weights_digest != origin_digest:
        raise UnsupportedRequest("fork", "its latents were made with other weights")
    if request.init_image is not None or origin.init_image is not None:
        raise UnsupportedRequest(
            "init_image", "a fork starts from kept latents, not from a picture"
        )
    if not 0 <= step < request.num_steps:
        raise UnsupportedRequest(
            "fork", f"after step {step} of {request.num_steps} nothing is left to denoise"
        )
