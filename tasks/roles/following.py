"""Follow the fleet's revisions for the length of a role's work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from dispatch.following import Following
from policy.current import CurrentFleet
from policy.fleet import Fleet
from settings import Settings


def _at_once(fleet: Fleet) -> bool:
    """Say that the process goes by the fleet already."""
    return True


@contextmanager
def following(
    settings: Settings,
    current: CurrentFleet,
    database: Engine,
    *,
    goes_by: Callable[[Fleet], bool] = _at_once,
    is_due_again: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Keep `current` up to date within the block, unless the settings say not to.

    goes_by: called in another thread with a new fleet, again and again until it returns True.
    is_due_again: tells whether it is to be called with the same fleet again.
    """
    if not settings.follow_revisions:
        yield
        return
    follower = Following(current, database, goes_by=goes_by, is_due_again=is_due_again)
    follower.start()
    try:
        yield
    finally:
        follower.close()
