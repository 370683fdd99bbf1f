"""The API keys that were used in the last moment, so that most requests ask the database nothing."""

import itertools
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from models import api_keys
from models.api_keys import KnownKey
from models.database import transaction
from policy.limits import Limits, limits_of

log = structlog.get_logger(__name__)

TRUSTED_FOR_S = 0.75  # after that a key is looked up again: a revoked one is refused within a second, in every process
REFRESHED_AFTER_S = 0.25  # from then on those in use are all looked up again, behind the requests' back
PATIENCE_S = 5.0  # with whoever looks up for all: under load another look-up makes it later still
IN_USE_FOR_S = 5.0
MOST_AT_ONCE = 500
MOST_REMEMBERED = 10_000
NO_LIVE_KEY = "This API key is unknown, revoked or expired."


class Known(NamedTuple):
    """A live key, and the limits of its tenant."""

    key: KnownKey
    limits: Limits


@dataclass
class _Entry:
    read_at: float
    used_at: float
    known: Known | None


class Keyring:
    """What is known of the keys that were used in the last moment, by their public ids; unknown ones are remembered as such."""

    def __init__(self, database: Engine, refresher: Executor) -> None:
        self._database, self._refresher = database, refresher
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one used last comes last
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def find(self, kid: str) -> Known | None:
        """The live key with that public id, as it was at most `TRUSTED_FOR_S` ago."""
        now = time.monotonic()
        with self._lock:
            entry = self._entries.get(kid)
            if entry is not None:
                entry.used_at = now
                self._entries.move_to_end(kid)
        if entry is None:
            return self._read({kid}).get(kid)
        if now - entry.read_at >= TRUSTED_FOR_S:
            return self._known_anew(kid)
        if now - entry.read_at > REFRESHED_AFTER_S and self._turn.acquire(blocking=False):
            self._refresher.submit(self._refresh)
        return entry.known

    def is_live(self, kid: str) -> bool:
        """Whether the key with that public id, which was live, still is; yes while nobody can say."""
        try:
            known = self.find(kid)
        except SQLAlchemyError:
            return True
        return known is not None and known.key.is_live(time.time())

    def _known_anew(self, kid: str) -> Known | None:
        """Whoever has the turn reads for all; who gets it late, because the database hangs, reads for himself."""
        if not self._turn.acquire(timeout=PATIENCE_S):
            return self._read({kid}).get(kid)
        try:
            with self._lock:
                entry = self._entries.get(kid)
            if entry is not None and time.monotonic() - entry.read_at < TRUSTED_FOR_S:
                return entry.known
            return self._read(self._in_use() | {kid}).get(kid)
        finally:
            self._turn.release()

    def _refresh(self) -> None:
        try:
            self._read(self._in_use())
        except SQLAlchemyError as error:  # nobody trusts what is there for much longer, and then asks by himself
            log.info("keys_not_refreshed", reason=type(error).__name__)
        finally:
            self._turn.release()

    def _in_use(self) -> set[str]:
        """The keys used last, as many as are worth asking for at once."""
        now = time.monotonic()
        with self._lock:
            latest = itertools.islice(reversed(self._entries.items()), MOST_AT_ONCE)
            return {kid for kid, entry in latest if now - entry.used_at < IN_USE_FOR_S}

    def _read(self, kids: set[str]) -> dict[str, Known]:
        now = time.monotonic()
        with transaction(self._database) as session:
            keys = api_keys.look_up(session, list(kids))
        found = {kid: Known(key, limits_of(key.limits)) for kid, key in keys.items()}
        with self._lock:
            for kid in kids:
                used_at = self._entries[kid].used_at if kid in self._entries else now
                self._entries[kid] = _Entry(now, used_at, found.get(kid))
            while len(self._entries) > MOST_REMEMBERED:
                self._entries.popitem(last=False)
        self._note_use([key.id for key in keys.values() if key.is_use_to_be_noted])
        return found

    def _note_use(self, key_ids: Sequence[uuid.UUID]) -> None:
        if not key_ids:
            return
        try:
            with transaction(self._database) as session:
                api_keys.note_use(session, key_ids)
        except SQLAlchemyError as error:
            log.info("key_use_not_noted", keys=len(key_ids), reason=type(error).__name__)
