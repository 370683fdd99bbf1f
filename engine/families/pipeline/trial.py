"""Calls made when a checkpoint is loaded, to find out what cannot be read off a signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import CheckpointSpec
from engine.families.calls import Run
from engine.families.latent import not_loadable
from engine.families.pipeline.signature import OWN_SAMPLER, CallSignature
from engine.folders import INDEX
from engine.inflight import BatchKey, InFlight
from engine.request import ImageRequest, Picture


@dataclass(frozen=True)
class TrialCalls:
    """What calls a request makes, for one image and for two."""

    is_guided: bool
    of_one: Run
    of_two: Run


def try_calls(
    signature: CallSignature,
    spec: CheckpointSpec,
    call: Callable[[ImageRequest], list[TrialCalls]],
) -> list[TrialCalls]:
    """Make trial calls with every picture the pipeline takes, and with none, to see whether it can.

    Sets `signature.needs_pictures`. Raises `CheckpointCorrupt` when it cannot be called with all.
    """
    bare = _smallest_request(spec)
    pictures = _grey_pictures(signature, bare)
    trials: list[TrialCalls] = []
    if pictures:
        try:
            trials += call(bare)
        except Exception:  # noqa: BLE001  whatever it says, it does not go without
            signature.needs_pictures = True
    try:
        return trials + call(replace(bare, **pictures))
    except Exception as problem:
        reason = f"a trial call of {signature.name} failed"
        raise not_loadable(INDEX, reason, problem) from problem


def _grey_pictures(signature: CallSignature, request: ImageRequest) -> dict[str, Any]:
    """Make every picture the call takes, by the request's names for them."""
    grey = np.full((request.height_px, request.width_px, 3), 127, np.uint8)
    pictures = {name: Picture(grey) for name in signature.pictures}
    if "mask" in pictures:
        pictures["mask"] = Picture(grey[..., 0])
    return pictures


def image_in_trial(request: ImageRequest) -> InFlight:
    """Give an image of a trial request, that no scheduler knows."""
    key = BatchKey(request.checkpoint, request.height_px, request.width_px, 0)
    return InFlight(request, key, rows=1)


def _smallest_request(spec: CheckpointSpec) -> ImageRequest:
    width_px, height_px = min(spec.sizes, key=lambda size: size[0] * size[1])
    return ImageRequest(
        id="trial",
        group="trial",
        checkpoint=spec.name,
        prompt="a picture",
        width_px=width_px,
        height_px=height_px,
        num_steps=2,
        guidance=1.0,
        strength=1.0,  # so that both steps are made
        sampler=OWN_SAMPLER,
        seed=0,
    )
