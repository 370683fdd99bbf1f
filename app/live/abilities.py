"""Cache what the checkpoints of live and earlier workers can do, which jobs are judged by."""

from collections.abc import Mapping
from concurrent.futures import Executor

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.live.cache import Cache
from models import capabilities as published
from models.database import transaction
from policy import capabilities
from policy.capabilities import Capabilities, Known
from policy.fleet import checkpoint_name

log = structlog.get_logger(__name__)

FRESH_FOR_S = 2.0  # as long as every process may take to follow a change
STALE_FOR_S = 5.0  # longer, while it is read again
_ALL = "all"


class Abilities:
    """What is published of every checkpoint. One per gateway process."""

    def __init__(self, database: Engine, refresher: Executor) -> None:
        self._database = database
        self._last: Mapping[str, Capabilities] = {}
        self._cache: Cache[str, Known] = Cache(
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
        return self._cache.get(_ALL, self._read)

    def forget(self) -> None:
        """Read again at the next call."""
        self._cache.forget(_ALL)

    def _read(self) -> Known:
        try:
            with transaction(self._database) as session:
                described = published.read_all(session)
        except SQLAlchemyError as error:
            log.info("capabilities_not_read", reason=type(error).__name__)
            return self._last
        found = {
            checkpoint_name(*version): capabilities.read(value)
            for version, value in described.items()
        }
        self._last = {name: able for name, able in found.items() if able is not None}
        return self._last
