"""Tell images that probably show nothing: one colour, or noise alone.

A decoder that overflows, weights that were damaged and a prompt that asks for an empty picture look
alike here, so such an image is delivered as any other; it is marked and counted.
"""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 256  # of the middle, at which an image is looked: enough to tell, in under a millisecond
FLAT_LEVELS = 2.0  # standard deviation of 0..255
OTHER_LEVELS = 8.0  # beside the commonest colour: a pixel of another one
OTHER_PART = 0.001  # of all pixels: more of them are a picture
DARK_LEVEL = 8.0
LIGHT_LEVEL = 247.0
NOISE_LEVELS = 12.0
NOISE_CORRELATION = 0.1  # of neighbours; of what is a picture at any scale it is above 0.5


class Suspicion(StrEnum):
    """What is wrong with an image, as far as can be told without knowing what it should show."""

    BLACK = "black"
    WHITE = "white"
    FLAT = "flat"  # of another colour
    NOISE = "noise"  # no pixel has to do with the one beside it


def suspicion_of(pixels: NDArray[np.uint8]) -> Suspicion | None:
    """Look at the middle of an image [h, w, 3]; None if nothing is wrong with it."""
    height, width, _ = pixels.shape
    top, left = max(0, (height - SIDE_PX) // 2), max(0, (width - SIDE_PX) // 2)
    green = pixels[top : top + SIDE_PX, left : left + SIDE_PX, 1].astype(np.float32)
    spread = float(green.std())
    if spread < FLAT_LEVELS:
        # All of it is looked at only now: the middle may be empty in a good picture.
        return _of_one_colour(pixels)
    if spread > NOISE_LEVELS and _correlation(green, spread) < NOISE_CORRELATION:
        return Suspicion.NOISE
    return None


def _of_one_colour(pixels: NDArray[np.uint8]) -> Suspicion | None:
    stride = max(1, min(pixels.shape[:2]) // SIDE_PX)
    pixels = pixels[::stride, ::stride]
    colour = np.median(pixels.reshape(-1, 3), axis=0)
    is_other = (np.abs(pixels - colour) > OTHER_LEVELS).any(axis=2)
    if is_other.mean() > OTHER_PART:
        return None
    level = float(colour.mean())
    if level < DARK_LEVEL:
        return Suspicion.BLACK
    return Suspicion.WHITE if level > LIGHT_LEVEL else Suspicion.FLAT


def _correlation(green: NDArray[np.float32], spread: float) -> float:
    """Return how much neighbours in [h, w] have to do with each other, -1 to 1.

    That of the direction in which it is more: stripes have none across.  spread: its deviation.
    """
    if min(green.shape) < 2:
        return 1.0
    across = float(np.square(green[:, 1:] - green[:, :-1]).mean())
    down = float(np.square(green[1:] - green[:-1]).mean())
    return 1 - min(across, down) / (2 * spread * spread)
