"""Tell which owners of one rank have had so much of the device that the others go first.

So one owner's hundred images do not hold up another's one.

As in start-time fair queuing every owner's device seconds are counted while it has images here, and
whoever comes (again) starts from what everybody here has had, less a credit. Plain numbers;
`scheduler.py` decides what follows from being ahead.

The slack is wide on purpose. With 1 s of it (and 2 s of credit) whoever renders a long image is
ahead of every newcomer: simulated at 1.5 times the load that one by one could bear, with an owner
for each image, the p99 went from 29 s to 508 s, for images were put off and shared no forwards.
With at least `SLACK_S`, and never less than the owner's dearest image takes alone, it stays at 29
s. The credit is larger, so that a newcomer passes a dump at once and a light owner's bursts do,
too: its p99 beside an endless dump is 1.0 to 1.3 times what it is without (up to 2.0 times with 30
s of credit, 1.7 with 120; tests/engine/test_fairness.py).
"""

import math
from dataclasses import dataclass

# An owner may always have had so many more device seconds than the owner that had least.
SLACK_S = 10.0
CREDIT_S = 60.0  # device seconds by which a newcomer starts below what everybody here has had
MAX_GONE = 256  # owners remembered after they left


@dataclass(slots=True, eq=False)
class Owner:
    """An owner with images in a rank."""

    attained_s: float  # device seconds, on the rank's own scale
    images: int = 0
    dearest_s: float = 0.0  # what the dearest of its images takes alone, of those since it came
    is_ahead: bool = False


class Owners:
    """Those who have images in one rank."""

    def __init__(self) -> None:
        self._here: dict[str, Owner] = {}
        self._gone: dict[str, float] = {}  # what they had when they left, the last to leave last
        # The least that an owner here has had. It never falls, or each newcomer would overtake the
        # one before.
        self._least_s = 0.0

    def __len__(self) -> int:
        return len(self._here)

    def enter(self, name: str, alone_s: float) -> Owner:
        """Note one more image of this owner, which alone would take so long.

        Who left a moment ago goes on from what it had.
        """
        owner = self._here.get(name)
        if owner is None:
            had_s = self._gone.pop(name, -math.inf)
            self._here[name] = owner = Owner(max(had_s, self._least_s - CREDIT_S))
        owner.images += 1
        owner.dearest_s = max(owner.dearest_s, alone_s)
        return owner

    def leave(self, name: str) -> None:
        """Note one image of this owner less."""
        owner = self._here[name]
        owner.images -= 1
        if owner.images == 0:
            del self._here[name]
            self._gone[name] = owner.attained_s
            if len(self._gone) > MAX_GONE:
                del self._gone[next(iter(self._gone))]

    def compare(self) -> bool:
        """Judge anew who is ahead; True when that has changed for anybody.

        Who is ahead stays so until half of its slack is made up.
        """
        least_s = min(owner.attained_s for owner in self._here.values())
        self._least_s = max(self._least_s, least_s)
        has_changed = False
        for owner in self._here.values():
            slack_s = max(SLACK_S, owner.dearest_s)
            is_ahead = owner.attained_s - least_s > (slack_s / 2 if owner.is_ahead else slack_s)
            has_changed |= is_ahead != owner.is_ahead
            owner.is_ahead = is_ahead
        return has_changed
