"""The API keys that were used in the last moment, so that most requests ask the database nothing."""

import threading
import time
from collections import OrderedDict

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from models import api_keys
from models.api_keys import KnownKey
from models.database import transaction

log = structlog.get_logger(__name__)

TRUSTED_FOR_S = 0.75  # after that a key is looked up again: a revoked one is refused within a second, in every process
MOST_REMEMBERED = 10_000


class Keyring:
    """What is known of the keys that were used in the last moment, by their public ids; unknown ones are remembered as such."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._known: OrderedDict[str, tuple[float, KnownKey | None]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, kid: str) -> KnownKey | None:
        """The live key with that public id, as it was at most `TRUSTED_FOR_S` ago."""
        now = time.monotonic()
        with self._lock:
            read_at, known = self._known.get(kid, (-TRUSTED_FOR_S, None))
        if now - read_at < TRUSTED_FOR_S:
            return known
        with transaction(self._database) as session:
            known = api_keys.look_up(session, kid)
        with self._lock:
            self._known[kid] = (now, known)
            self._known.move_to_end(kid)
            while len(self._known) > MOST_REMEMBERED:
                self._known.popitem(last=False)
        if known is not None and known.is_use_to_be_noted:
            self._note_use(known)
        return known

    def _note_use(self, known: KnownKey) -> None:
        try:
            with transaction(self._database) as session:
                api_keys.note_use(session, known.id)
        except SQLAlchemyError as error:
            log.info("key_use_not_noted", api_key_id=str(known.id), reason=type(error).__name__)
