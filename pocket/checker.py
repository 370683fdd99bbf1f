"""Tell whether a picture shows what its caption names: plain geometry on pixels, nothing learnt.

It reads the caption into a `Scene` in which None means *not said*, measures the picture, and
compares the two. It knows the pocket world and numpy, but not torch, so any process can use it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pocket.world import COLOURS, MARGIN_PX, PLACES, RADIUS_PX, SHAPES, SIDE_PX, Scene, Thing

FRAME_PX = 3  # this much of the rim is background
IGNORED_RIM_PX = 4
LEAST_CONTRAST = 60  # RGB distance; yellow and orange, the nearest two, are drawn at least 73 apart
LARGE_FROM_PX = 25  # half extent
FEWEST_PIXELS = 30

_ARTICLE_AND_SIZE = rf"an? (?:({'|'.join(RADIUS_PX)}) )?"
_PLACE = rf"(?: (?:at|in) the ({'|'.join(PLACES)}))?"
_THING = re.compile(rf"{_ARTICLE_AND_SIZE}({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}){_PLACE}")
_GROUND = re.compile(rf"(.+) on (?:an? )?({'|'.join(COLOURS)})(?: background)?")


class CaptionNotUnderstood(ValueError):
    """The text is not a sentence of the pocket world; only such sentences can be checked."""


@dataclass(frozen=True)
class Verdict:
    """What was asked, what was seen, and for each attribute whether they agree.

    An attribute is None where the caption did not name it.
    """

    expected: Scene
    seen: Scene
    background: bool
    colour: bool
    shape: bool
    place: bool | None
    size: bool | None

    @property
    def everything_right(self) -> bool:
        """Tell whether the picture shows all that the caption names."""
        return False not in self.attributes().values()

    def attributes(self) -> dict[str, bool | None]:
        """Return the answers by attribute name."""
        return {
            name: getattr(self, name) for name in ("background", "colour", "shape", "place", "size")
        }

    @property
    def summary(self) -> str:
        """Write one line for people: what was seen, and what is wrong with it."""
        words = (
            (thing.size, thing.colour, thing.shape, thing.place and f"({thing.place})")
            for thing in self.seen.things
        )
        seen = " and ".join(" ".join(filter(None, named)) for named in words)
        wrong = [name for name, is_right in self.attributes().items() if is_right is False]
        answer = f"wrong {', '.join(wrong)}" if wrong else "all right"
        return f"{answer}: {seen} on {self.seen.background}"


def read_caption(text: str) -> Scene:
    """Read a caption as a scene, with None wherever it names no size or place.

    Raises `CaptionNotUnderstood`.
    """
    words = " ".join(text.lower().strip(" .").split())
    ground = _GROUND.fullmatch(words)
    things = (
        [_THING.fullmatch(part) for part in re.split(r" and | left of ", ground[1])]
        if ground
        else []
    )
    if not ground or not 1 <= len(things) <= 2 or None in things:
        raise CaptionNotUnderstood(f"Not a sentence of the pocket world: {text!r}.")
    return Scene(
        ground[2], tuple(Thing(colour=t[2], shape=t[3], size=t[1], place=t[4]) for t in things if t)
    )


def check(image: np.ndarray, caption: str) -> Verdict:
    """Compare a picture, uint8 [128, 128, 3], with its caption.

    Raises `CaptionNotUnderstood`, or ValueError for another size.
    """
    expected = read_caption(caption)
    seen = look(image, is_pair=expected.is_pair)
    agree = partial(_agree, expected.things, seen.things)
    return Verdict(
        expected,
        seen,
        background=expected.background == seen.background,
        colour=agree("colour") is True,
        shape=agree("shape") is True,
        # Beside another object the halves already say who stands where.
        place=None if expected.is_pair else agree("place"),
        size=agree("size"),
    )


def _agree(wished: Sequence[Thing], seen: Sequence[Thing], name: str) -> bool | None:
    """Tell whether all that were named by this attribute have it; None where none was."""
    named = [
        (getattr(asked, name), getattr(got, name))
        for asked, got in zip(wished, seen, strict=True)
        if getattr(asked, name)
    ]
    return all(asked == got for asked, got in named) if named else None


def look(image: np.ndarray, *, is_pair: bool) -> Scene:
    """Measure a picture; with `is_pair`, measure each half separately.

    An object that is not there has the shape `nothing`.
    """
    if image.shape != (SIDE_PX, SIDE_PX, 3):
        raise ValueError(f"Pictures of {SIDE_PX}x{SIDE_PX} px can be checked, not {image.shape}.")
    pixels = image.astype(np.float32)
    ground = np.median(pixels[~_inside(FRAME_PX)], axis=0)
    inside = _inside(IGNORED_RIM_PX)
    if not is_pair:
        return Scene(
            _nearest_colour(ground), (_look_at_one(pixels, ground, inside, with_place=True),)
        )
    is_left = np.arange(SIDE_PX)[None, :] < SIDE_PX // 2
    halves = (inside & is_left, inside & ~is_left)
    return Scene(
        _nearest_colour(ground),
        tuple(_look_at_one(pixels, ground, half, with_place=False) for half in halves),
    )


def _inside(rim_px: int) -> np.ndarray:
    """Mark every pixel that is farther from the border than this: [128, 128]."""
    inside = np.zeros((SIDE_PX, SIDE_PX), bool)
    inside[rim_px:-rim_px, rim_px:-rim_px] = True
    return inside


def _look_at_one(
    pixels: np.ndarray, ground: np.ndarray, region: np.ndarray, *, with_place: bool
) -> Thing:
    from_ground = np.linalg.norm(pixels - ground, axis=2)
    rough = _majority((from_ground > LEAST_CONTRAST) & region)
    if rough.sum() < FEWEST_PIXELS:
        return Thing("no colour", "nothing")
    colour = np.median(pixels[rough], axis=0)
    # Decoded pictures are a little noisy and soft. The edge is where a pixel's colour is as near to
    # the object's as to the ground's.
    mask = _majority((np.linalg.norm(pixels - colour, axis=2) < from_ground) & region)
    if mask.sum() < FEWEST_PIXELS:
        return Thing(_nearest_colour(colour), "nothing")
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    half_px = max(box.shape) / 2
    centre = np.array([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2
    size = "large" if half_px > LARGE_FROM_PX else "small"
    return Thing(
        _nearest_colour(colour), _shape(box), size, _place(centre, half_px) if with_place else None
    )


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def _majority(mask: np.ndarray) -> np.ndarray:
    """Give each pixel the value of most pixels in its 3x3 neighbourhood."""
    padded = np.pad(mask.astype(np.uint8), 1)
    height, width = mask.shape
    is_most: np.ndarray = (
        np.add.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
        >= 5
    )
    return is_most


def _shape(box: np.ndarray) -> str:
    """Name the shape by how much of its bounding box it fills and where it is widest."""
    fill = box.mean()
    if fill > 0.90:
        return "square"
    if fill > 0.66:
        return "circle"
    widths = box.sum(axis=1)
    widest = np.flatnonzero(widths >= 0.9 * widths.max()).mean() / len(widths)
    # A triangle stands on its widest row, a star spreads its arms above the middle.
    return "triangle" if widest > 0.65 else "star"


def _place(centre: np.ndarray, half_px: float) -> str:
    """Return the nearest place.

    Places of large objects are moved inside the picture, as when they are drawn.
    """
    reach = min(half_px + MARGIN_PX, SIDE_PX / 2)
    spots = {
        name: np.clip(np.array(spot) * SIDE_PX, reach, SIDE_PX - reach)
        for name, spot in PLACES.items()
    }
    return min(spots, key=lambda name: float(np.linalg.norm(centre - spots[name])))
