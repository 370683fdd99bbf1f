"""Hold the fleet that runs now, for everything in a process that goes by it.

fleet.toml is applied as a revision (models/revisions.py), and each process takes over the newest
one while it works. So nothing keeps a `Fleet`: it keeps a `CurrentFleet` and asks it each time.
"""

from contextvars import ContextVar
from typing import NamedTuple

from policy.fleet import Fleet

UNNUMBERED = 0  # a fleet that was read from a file, and is no revision


class Revision(NamedTuple):
    """A fleet with the number under which it was applied."""

    fleet: Fleet
    number: int


class CurrentFleet:
    """The fleet of this process at this moment. Safe for any thread."""

    def __init__(self, fleet: Fleet, number: int = UNNUMBERED) -> None:
        self._newest = Revision(fleet, number)
        self._pinned: ContextVar[Revision | None] = ContextVar("pinned_fleet", default=None)

    @property
    def fleet(self) -> Fleet:
        """Return the newest fleet, or after `pin` the one that was the newest then."""
        return (self._pinned.get() or self._newest).fleet

    @property
    def number(self) -> int:
        """Return the number of the revision that `fleet` is."""
        return (self._pinned.get() or self._newest).number

    def replace(self, fleet: Fleet, number: int) -> None:
        """Go by this fleet from now on."""
        self._newest = Revision(fleet, number)

    def pin(self) -> None:
        """Keep what is the newest now for the rest of this context, or until `unpin`.

        For a request, which must not see two fleets.
        """
        self._pinned.set(self._newest)

    def unpin(self) -> None:
        """Go by the newest fleet again."""
        self._pinned.set(None)


def current(fleet: Fleet | CurrentFleet) -> CurrentFleet:
    """Return the holder itself, or one for a fleet that never changes."""
    return fleet if isinstance(fleet, CurrentFleet) else CurrentFleet(fleet)
