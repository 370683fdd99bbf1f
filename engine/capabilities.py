"""Describe what one loaded checkpoint can do, and judge requests by that description.

A family makes its `Capabilities` of the facts it was loaded with; its `check` judges by them, and
workers publish the same value, so that whoever admits requests elsewhere cannot think otherwise.
Plain values, no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from engine.errors import UnsupportedRequest
from engine.request import ImageRequest

FORMAT = 1  # counts up when what a member means changes; new members do not
ROLES = ("mask", "init_image", "control_image")  # of pictures, in the order of refusals


class Need(StrEnum):
    """Whether a picture is taken."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class NegativePrompt(StrEnum):
    """What becomes of a negative prompt."""

    REFUSED = "refused"
    IGNORED = "ignored"  # taken, without effect
    GUIDED = "guided"  # has an effect with guidance above 1
    USED = "used"


class Guidance(StrEnum):
    """What becomes of the guidance, which every request has."""

    IGNORED = "ignored"
    NEGATED = "negated"  # has an effect with a negative prompt
    USED = "used"


@dataclass(frozen=True, kw_only=True)
class SamplerLimits:
    """What one sampler takes with this checkpoint's schedule."""

    max_steps: int
    takes_picture: bool = True  # an init_image


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What an adapter's file says of it."""

    rank: int
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What may be asked of one checkpoint. The samplers are all that fit, offered or not."""

    family: str
    side_multiple_px: int
    pictures: Mapping[str, Need]  # by role
    samplers: Mapping[str, SamplerLimits]
    takes_strength: bool = True  # another one than 1
    default_strength: float = 1.0  # of a request that says none
    rounds_steps_up: bool = False  # where a strength leaves a part of a step
    negative_prompt: NegativePrompt = NegativePrompt.USED
    guidance: Guidance = Guidance.USED
    max_clip_skip: int = 0
    # Of a forward, at most; guided: with guidance above 1.
    rows: int = 1
    rows_guided: int = 1
    # Of each text encoder that reads the whole text; {}: not known.
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()  # as they were rendered when it was loaded
    adapters: Mapping[str, AdapterFacts] = field(default_factory=dict)

    def check(self, request: ImageRequest) -> None:
        """Raise `UnsupportedRequest`, naming the field, for what the checkpoint cannot render."""
        self._check_sides(request)
        self._check_sampler(request)
        self._check_pictures(request)
        self._check_strength(request)
        if request.negative_prompt and self.negative_prompt is NegativePrompt.REFUSED:
            raise UnsupportedRequest("negative_prompt", "is not taken by this checkpoint")
        if not 0 <= request.clip_skip <= self.max_clip_skip:
            raise UnsupportedRequest(
                "clip_skip", f"{request.clip_skip} is not within 0..{self.max_clip_skip}"
            )

    def as_json(self) -> dict[str, Any]:
        """Give the value as policy/capabilities.py reads it."""
        return {"format": FORMAT, **asdict(self)}

    def _check_sides(self, request: ImageRequest) -> None:
        for name, side_px in (("width_px", request.width_px), ("height_px", request.height_px)):
            if side_px < self.side_multiple_px or side_px % self.side_multiple_px:
                reason = f"{side_px} is not a multiple of {self.side_multiple_px}"
                raise UnsupportedRequest(name, reason)

    def _check_sampler(self, request: ImageRequest) -> None:
        limits = self.samplers.get(request.sampler)
        if limits is None:
            reason = f"{request.sampler!r} is none of {', '.join(self.samplers)}"
            raise UnsupportedRequest("sampler", reason)
        if not 1 <= request.num_steps <= limits.max_steps:
            reason = f"{request.num_steps} is not within 1..{limits.max_steps}"
            raise UnsupportedRequest("num_steps", f"{reason} for {request.sampler}")
        if request.init_image is not None and not limits.takes_picture:
            able = [name for name, one in self.samplers.items() if one.takes_picture]
            reason = f"{request.sampler!r} cannot start from an init_image; {', '.join(able)} can"
            raise UnsupportedRequest("sampler", reason)

    def _check_pictures(self, request: ImageRequest) -> None:
        for role in ROLES:
            is_given = getattr(request, role) is not None
            need = self.pictures[role]
            if is_given and need is Need.NONE:
                raise UnsupportedRequest(role, "is not taken by this checkpoint")
            if not is_given and need is Need.REQUIRED:
                raise UnsupportedRequest(role, "is needed by this checkpoint")
        if request.mask is not None and request.init_image is None:
            raise UnsupportedRequest("mask", "needs an init_image to repaint")

    def _check_strength(self, request: ImageRequest) -> None:
        strength = request.strength
        if strength is not None and strength != 1:
            if not self.takes_strength:
                raise UnsupportedRequest("strength", "is not taken by this checkpoint")
            if request.init_image is None:
                reason = f"{strength} needs an init_image; without one it is 1.0"
                raise UnsupportedRequest("strength", reason)
            if not 0 < strength <= 1:
                raise UnsupportedRequest("strength", f"{strength} is not above 0 and at most 1")
        share = self.default_strength if strength is None else strength
        if not self.rounds_steps_up and request.num_steps * share < 1:
            reason = f"{share} leaves none of {request.num_steps} steps"
            raise UnsupportedRequest("strength", reason)
