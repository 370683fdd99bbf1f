"""What is asked for: jobs over all tiers and tenants. Same seed, same jobs."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TENANTS = 5
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
_SHAPES = ("circle", "square", "triangle", "star")
_PLACES = ("in the center", "at the top", "at the bottom", "at the left", "at the right")


@dataclass(frozen=True, kw_only=True)
class TierLoad:
    """What distinguishes the jobs of one tier. steps: from, to."""

    tier: str
    share: float
    steps: tuple[int, int]


TIERS = (
    TierLoad(tier="fast", share=0.4, steps=(2, 8)),
    TierLoad(tier="quality", share=0.3, steps=(6, 30)),
    TierLoad(tier="batch", share=0.3, steps=(6, 30)),
)


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job as it will be asked for.

    `marker` ends its prompt, so that the row tells whose it is when no answer did.
    """

    marker: str
    tenant: int
    at_s: float  # since the start of the run
    cancel_after_s: float | None  # since it was accepted; None: its tenant wants it
    parameters: dict[str, Any]  # of Client.create_job

    @property
    def num_images(self) -> int:
        """Return how many images it makes."""
        return int(self.parameters["n"])


def workload(
    count: int,
    *,
    every_s: float,
    seed: int,
    tiers: Sequence[TierLoad] = TIERS,
    cancel_share: float = 0.05,
    most_images: int = 3,
) -> list[PlannedJob]:
    """Plan `count` jobs, on average one every `every_s`.

    `cancel_share` of them are canceled, one in seven has two images or more.
    """
    rng = random.Random(f"workload {seed}")
    instants = sorted(rng.uniform(0, count * every_s) for _ in range(count))
    return [
        _job(rng, number, at_s, tiers, cancel_share, most_images)
        for number, at_s in enumerate(instants)
    ]


def endless_workload(
    *, seed: int, tiers: Sequence[TierLoad], most_images: int = 3, first: int = 0
) -> Iterator[PlannedJob]:
    """Plan jobs as long as they are wanted, none of which is canceled.

    first: number of the first; markers of other workloads of a run must not be met.
    """
    rng = random.Random(f"workload {seed}")
    for number in itertools.count(first):
        yield _job(rng, number, 0.0, tiers, 0.0, most_images)


def tiers_with(steps: tuple[int, int], *, without: str = "") -> list[TierLoad]:
    """Return the usual shares of the tiers with other steps. without: a tier that has none."""
    return [
        TierLoad(tier=each.tier, share=each.share, steps=steps)
        for each in TIERS
        if each.tier != without
    ]


def marker_of(prompt: str) -> str:
    """Return the marker that ends a prompt."""
    return prompt.rpartition(" ")[2]


def _job(
    rng: random.Random,
    number: int,
    at_s: float,
    tiers: Sequence[TierLoad],
    cancel_share: float,
    most_images: int,
) -> PlannedJob:
    tenant = rng.randrange(TENANTS)
    of_tier = rng.choices(tiers, [each.share for each in tiers])[0]
    is_canceled = rng.random() < cancel_share
    colour, background = rng.sample(_COLOURS, 2)
    marker = f"#c{tenant}-{number:04d}"
    size = rng.choice(("small", "large"))
    shape = rng.choice(_SHAPES)
    place = rng.choice(_PLACES)
    parameters = {
        "prompt": f"a {size} {colour} {shape} {place} on {background} {marker}",
        "tier": of_tier.tier,
        "steps": of_tier.steps[1] if is_canceled else rng.randint(*of_tier.steps),
        "guidance": 1.5 if rng.random() < 0.1 else 1.0,
        "seed": rng.randrange(2**31),
        "n": rng.randint(2, most_images) if rng.random() < 0.15 else 1,
        "output_format": "png",  # lossless: pixels can be compared by what is stored
    }
    cancel_after_s = rng.uniform(0, 3) if is_canceled else None
    return PlannedJob(
        marker=marker,
        tenant=tenant,
        at_s=at_s,
        cancel_after_s=cancel_after_s,
        parameters=parameters,
    )
