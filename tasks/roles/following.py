"""Follow the fleet's revisions for the length of a role's work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from dispatch.following import Following
from policy.current import CurrentFleet
from policy.fleet import Fleet
from settings import Settings


def _nothing(old: Fleet, new: Fleet) -> None:
    """Do nothing."""


@contextmanager
def following(
    settings: Settings,
    current: CurrentFleet,
    database: Engine,
    *,
    on_change: Callable[[Fleet, Fleet], None] = _nothing,
) -> Iterator[None]:
    """Keep `current` up to date within the block, unless the settings say not to.

    on_change: called, in another thread, with the fleet before and the new one.
    """
    if not settings.follow_revisions:
        yield
        return
    follower = Following(current, database, on_change=on_change)
    follower.start()
    try:
        yield
    finally:
        follower.close()
