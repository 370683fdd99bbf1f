"""Cache what the checkpoints of live and earlier workers can do, which jobs are judged by.

And which of them are loaded.
"""

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import NamedTuple

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.live.cache import Cache
from models import capabilities as published
from models import workers
from models.database import transaction
from policy import capabilities
from policy.capabilities import Capabilities, Known
from policy.fleet import checkpoint_name

log = structlog.get_logger(__name__)

FRESH_FOR_S = 2.0  # as long as every process may take to follow a change
STALE_FOR_S = 5.0  # longer, while it is read again
_ALL = "all"


class _Told(NamedTuple):
    """What workers tell of checkpoints. loaded: those in the memory of a live worker's device."""

    known: Mapping[str, Capabilities]
    loaded: frozenset[str]


class Abilities:
    """What is published of every checkpoint. One per gateway process."""

    def __init__(self, database: Engine, refresher: Executor, *, worker_silence_s: float) -> None:
        """Read nothing yet. worker_silence_s: a worker not heard of for so long counts as gone."""
        self._database = database
        self._worker_silence_s = worker_silence_s
        self._last = _Told({}, frozenset())
        self._cache: Cache[str, _Told] = Cache(
            "capabilities",
            1,
            keep_for_s=FRESH_FOR_S,
            stale_for_s=STALE_FOR_S,
            refresh_after_s=FRESH_FOR_S / 2,
            refresher=refresher,
        )

    def known(self) -> Known:
        """Return what each checkpoint can do, by its name; at most FRESH_FOR_S old.

        While the database cannot be read, what was known before.
        """
        return self._cache.get(_ALL, self._read).known

    def loaded(self) -> frozenset[str]:
        """Name the checkpoints that need not be loaded first, as `known` does."""
        return self._cache.get(_ALL, self._read).loaded

    def forget(self) -> None:
        """Read again at the next call."""
        self._cache.forget(_ALL)

    def _read(self) -> _Told:
        try:
            with transaction(self._database) as session:
                described = published.read_all(session)
                silent_for_s = self._worker_silence_s
                loaded = workers.loaded_checkpoints(session, silent_for_s=silent_for_s)
        except SQLAlchemyError as error:
            log.info("capabilities_not_read", reason=type(error).__name__)
            return self._last
        found = {
            checkpoint_name(*version): capabilities.read(value)
            for version, value in described.items()
        }
        known = {name: able for name, able in found.items() if able is not None}
        self._last = _Told(known, loaded)
        return self._last
