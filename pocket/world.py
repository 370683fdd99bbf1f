"""The pocket model's whole world: coloured shapes on coloured grounds, captions and pictures.

Procedural and exact: every picture is drawn from a `Scene`, so every caption is true and no
third-party data is involved. Randomness comes from the `random.Random` that the caller passes. This
module does not know what a network is.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE_PX = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 75, 215),
    "yellow": (250, 220, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
RADIUS_PX: dict[str, tuple[float, float]] = {"small": (15, 19), "large": (32, 38)}
PLACES: dict[str, tuple[float, float]] = {  # x and y of the centre, as fractions of the side
    "center": (0.5, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
}
PAIR_X = (0.28, 0.72)  # where the first and the second of two objects stand
MARGIN_PX = 2
COLOUR_JITTER = 4
CENTRE_JITTER = 0.02
OVERSAMPLING = 2
HELD_OUT_SHARE = 10  # one scene in ten is kept out of training


@dataclass(frozen=True)
class Thing:
    """One object.

    `place` is None beside another object: there the order says which one stands left. None
    elsewhere means *not said*.
    """

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects, the left one first.

    In a scene that was read from a caption, whatever is None may be anything.
    """

    background: str
    things: tuple[Thing, ...]

    @property
    def is_pair(self) -> bool:
        """Tell whether there are two objects."""
        return len(self.things) == 2


def is_held_out(scene: Scene) -> bool:
    """Tell whether training never draws this combination of colours, shapes, sizes and place."""
    digest = hashlib.sha256(repr(scene).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def random_scene(
    rng: random.Random, *, pair_share: float = 0.3, held_out: bool | None = None
) -> Scene:
    """Draw a fully specified scene, all its colours different.

    held_out: True for scenes training never sees, False for those it may, None for any.
    """
    while True:
        is_pair = rng.random() < pair_share
        background, first, second = rng.sample(list(COLOURS), 3)
        if is_pair:
            things = tuple(Thing(colour, rng.choice(SHAPES), "small") for colour in (first, second))
        else:
            things = (
                Thing(
                    first, rng.choice(SHAPES), rng.choice(list(RADIUS_PX)), rng.choice(list(PLACES))
                ),
            )
        scene = Scene(background, things)
        if held_out is None or is_held_out(scene) is held_out:
            return scene


def caption(scene: Scene, rng: random.Random, *, is_complete: bool = False) -> str:
    """Say the scene in words.

    Unless `is_complete`, it leaves out the size in 20 % and the place in 15 % of the cases.
    """
    with_size = is_complete or rng.random() < 0.80
    with_place = is_complete or rng.random() < 0.85
    named = []
    for thing in scene.things:
        words = ["a", thing.size if with_size else None, thing.colour, thing.shape]
        if thing.place and with_place:
            words.append("in the center" if thing.place == "center" else f"at the {thing.place}")
        named.append(" ".join(word for word in words if word))
    ground = rng.choice((f"on a {scene.background} background", f"on {scene.background}"))
    return f"{rng.choice((' and ', ' left of ')).join(named)} {ground}"


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """Paint a fully specified scene: uint8 [128, 128, 3].

    `rng` varies colours, radii and centres a little.
    """
    side = SIDE_PX * OVERSAMPLING
    image = Image.new("RGB", (side, side), _jittered(scene.background, rng))
    pen = ImageDraw.Draw(image)
    for index, thing in enumerate(scene.things):
        if thing.size is None or (thing.place is None and not scene.is_pair):
            raise ValueError(f"Only a fully specified scene can be drawn, not {scene}.")
        x, y = PLACES[thing.place] if thing.place else (PAIR_X[index], 0.5)
        radius = rng.uniform(*RADIUS_PX[thing.size])
        reach = radius * 1.08 + MARGIN_PX
        centre = [_jittered_place(at, reach, rng) * OVERSAMPLING for at in (x, y)]
        colour = _jittered(thing.colour, rng)
        _paint(pen, thing.shape, centre[0], centre[1], radius * OVERSAMPLING, colour)
    return np.asarray(image.reduce(OVERSAMPLING))


def _jittered_place(at: float, reach: float, rng: random.Random) -> float:
    """Give a centre along one side, in pixels, from which `reach` pixels stay in the picture."""
    wanted_px = (at + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER)) * SIDE_PX
    return min(max(wanted_px, reach), SIDE_PX - reach)


def _jittered(colour: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, level + rng.randint(-COLOUR_JITTER, COLOUR_JITTER)))
        for level in COLOURS[colour]
    )
    return red, green, blue


def _paint(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - 0.95 * r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=fill)
    elif shape == "star":
        radii = [1.08 * r if point % 2 == 0 else 0.45 * r for point in range(10)]
        angles = [math.pi * point / 5 - math.pi / 2 for point in range(10)]
        spokes = zip(radii, angles, strict=True)
        pen.polygon(
            [(x + reach * math.cos(angle), y + reach * math.sin(angle)) for reach, angle in spokes],
            fill=fill,
        )
    else:
        raise ValueError(f"No such shape: {shape!r}.")
