"""Who asks for what, and when: Poisson arrivals of requests with few and many steps.

It knows neither a clock nor who serves them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.request import ImageRequest
from pocket.world import caption, random_scene


@dataclass(frozen=True)
class Kind:
    """One sort of request in the mix, named by its steps."""

    num_steps: int
    guidance: float  # 1: no classifier-free guidance, one row of a forward instead of two
    tenths: int  # of all requests


# Of the systems that collect requests for a while and then run them whole.
MAX_BATCH = 8
WINDOW_S = 0.05

MIX = (Kind(4, 1.0, 4), Kind(8, 1.0, 3), Kind(30, 1.5, 3))


@dataclass(frozen=True)
class Arrival:
    """A request and its instant, in units of the mean gap between two arrivals."""

    at: float
    request: ImageRequest


def arrivals(count: int, template: ImageRequest, *, seed: int) -> list[Arrival]:
    """Give `count` requests in the order of their instants within 0..count.

    They are like `template` but for id, prompt, seed and kind. A Poisson process that is known to
    have had `count` arrivals in that time: uniform instants, sorted. So the offered load is the
    nominal one in every trace, not only on average; for the same reason each kind has exactly its
    share. `count` is a multiple of 10.
    """
    rng = random.Random(seed)
    kinds = [kind for kind in MIX for _ in range(count * kind.tenths // 10)]
    rng.shuffle(kinds)
    instants = sorted(rng.uniform(0, count) for _ in range(count))
    return [
        Arrival(at, _of_kind(template, kind, f"{template.id}-{seed}-{number}", rng))
        for number, (at, kind) in enumerate(zip(instants, kinds, strict=True))
    ]


def one_of_each(template: ImageRequest) -> list[ImageRequest]:
    """Return a request of every kind."""
    return [
        _of_kind(
            template, kind, f"{template.id}-of-{kind.num_steps}", random.Random(kind.num_steps)
        )
        for kind in MIX
    ]


def by_kind(requests: Sequence[ImageRequest]) -> list[list[ImageRequest]]:
    """Sort requests into groups that one pipeline call can render.

    Equal in steps and guidance; the least work an image first.
    """
    groups: dict[tuple[bool, int, float], list[ImageRequest]] = {}
    for request in requests:
        groups.setdefault((request.is_guided, request.num_steps, request.guidance), []).append(
            request
        )
    return [groups[kind] for kind in sorted(groups)]


def _of_kind(template: ImageRequest, kind: Kind, id: str, rng: random.Random) -> ImageRequest:
    return replace(
        template,
        id=id,
        group=id,
        prompt=caption(random_scene(rng), rng),
        num_steps=kind.num_steps,
        guidance=kind.guidance,
        seed=rng.getrandbits(32),
    )
