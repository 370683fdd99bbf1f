"""Cache the API keys that were used a moment ago, so that most requests need no database."""

import threading
import time
import uuid
from collections.abc import Sequence, Set
from concurrent.futures import Executor
from typing import NamedTuple

import structlog
from cachetools import FIFOCache
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.live.cache import Cache
from models import api_keys
from models.api_keys import KnownKey
from models.database import transaction
from policy.limits import Limits, limits_of

log = structlog.get_logger(__name__)

# A key is looked up again after that, so every process refuses a revoked key within a second.
TRUSTED_FOR_S = 0.75
REFRESHED_AFTER_S = 0.25  # after that, all keys in use are looked up again in the background
IN_USE_FOR_S = 5.0
# Further keys in use are looked up one by one, whenever their time of trust is over.
MOST_AT_ONCE = 500
MOST_REMEMBERED = 10_000
NO_LIVE_KEY = "This API key is unknown, revoked or expired."
_IN_USE = "in use"


class CachedKey(NamedTuple):
    """A live key, and the limits of its tenant."""

    key: KnownKey
    limits: Limits


class Keyring:
    """The keys that were used in the last moment, by their public ids.

    All keys in use are read in one query. A key that is not among them, because it is new or there
    are too many, is looked up alone. Unknown keys are cached as unknown.
    """

    def __init__(self, database: Engine, refresher: Executor) -> None:
        self._database = database
        # When each key was last used. FIFO, because reading an entry here is no use of its key.
        self._used_at: FIFOCache[str, float] = FIFOCache(MOST_AT_ONCE)
        self._lock = threading.Lock()
        self._together: Cache[str, dict[str, CachedKey | None]] = Cache(
            "keys in use",
            1,
            keep_for_s=TRUSTED_FOR_S,
            refresh_after_s=REFRESHED_AFTER_S,
            refresher=refresher,
        )
        self._alone: Cache[str, CachedKey | None] = Cache(
            "other keys", MOST_REMEMBERED, keep_for_s=TRUSTED_FOR_S
        )
        self._refresher = refresher

    def find(self, kid: str) -> CachedKey | None:
        """Find the live key with this public id, as it was at most `TRUSTED_FOR_S` ago."""
        together = self._together.get(_IN_USE, self._read_those_in_use)
        if kid in together:
            known = together[kid]
        else:
            known = self._alone.get(kid, lambda: self._read({kid})[kid])
        if known is not None:  # made-up keys must not displace keys in use
            with self._lock:
                self._used_at[kid] = time.monotonic()
        return known

    def is_live(self, kid: str) -> bool:
        """Tell whether a key that was live still is; true while the database cannot be read."""
        try:
            known = self.find(kid)
        except SQLAlchemyError:
            return True
        return known is not None and known.key.is_live(time.time())

    def _read_those_in_use(self) -> dict[str, CachedKey | None]:
        since = time.monotonic() - IN_USE_FOR_S
        with self._lock:
            kids = {kid for kid, used_at in self._used_at.items() if used_at > since}
        return self._read(kids) if kids else {}

    def _read(self, kids: Set[str]) -> dict[str, CachedKey | None]:
        """Look up each of these keys; None for one that is not live."""
        with transaction(self._database) as session:
            keys = api_keys.look_up(session, list(kids))
        if used := [key.id for key in keys.values() if key.is_use_to_be_noted]:
            self._refresher.submit(self._note_use, used)  # no answer waits for a write
        live = {kid: CachedKey(key, limits_of(key.limits)) for kid, key in keys.items()}
        return {kid: live.get(kid) for kid in kids}

    def _note_use(self, key_ids: Sequence[uuid.UUID]) -> None:
        try:
            with transaction(self._database) as session:
                api_keys.note_use(session, key_ids)
        except SQLAlchemyError as error:
            log.info("key_use_not_noted", keys=len(key_ids), reason=type(error).__name__)
