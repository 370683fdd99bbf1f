"""Tell Postgres which of this host's devices were lost, and ask which of them get no worker.

In a thread of its own: a launcher has to look after its workers while Postgres is away. Then a
device is quarantined by what the launcher itself has seen, and Postgres is told when it is back.
No connection is kept while there is nothing to tell or to ask.
"""

import sys
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from models import quarantine
from models.database import make_engine, run_transaction
from models.quarantine import Loss
from policy.workers import LOST_TWICE_WITHIN

LOOK_EVERY_S = 2.0
CLOSES_WITHIN_S = 5.0


@dataclass
class _Untold:
    """A loss that Postgres does not know yet."""

    loss: Loss
    at: float  # on the monotonic clock
    was_tried: bool = False  # to tell it


class Quarantine:
    """Know which devices of one launcher get no worker."""

    def __init__(self, database_url: str, devices: Collection[str]) -> None:
        self._database = make_engine(database_url, pool_size=1)
        self._devices = set(devices)
        self._quarantined: set[str] = set()
        self._untold: list[_Untold] = []
        self._was_asked = False  # Postgres, in vain or not
        self._is_known = False  # what Postgres says
        self._lock = threading.Lock()
        self._is_due = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quarantine", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def note_loss(self, loss: Loss) -> None:
        """Note that a worker has ended because its device was lost. Returns at once."""
        with self._lock:
            self._untold.append(_Untold(loss, time.monotonic()))
        self._is_due.set()

    def may_start(self, device: str) -> bool:
        """Tell whether a worker may be started on the device now.

        Not before Postgres was asked about it, whether or not it answered.
        """
        with self._lock:
            untold = [each for each in self._untold if each.loss.device == device]
            return (
                self._was_asked
                and device not in self._quarantined
                and all(each.was_tried for each in untold)
                and not _are_two_soon(untold)
            )

    def is_quarantined(self, device: str) -> bool:
        """Tell whether Postgres, or what was seen here, says that the device gets no worker."""
        with self._lock:
            untold = [each for each in self._untold if each.loss.device == device]
            return device in self._quarantined or _are_two_soon(untold)

    def close(self) -> None:
        """Tell what is untold, if that is possible soon, and end."""
        self._stop.set()
        self._is_due.set()
        if self._thread.is_alive():
            self._thread.join(CLOSES_WITHIN_S)

    def _run(self) -> None:
        while True:
            self._look()
            if self._stop.is_set():
                return
            self._is_due.wait(LOOK_EVERY_S)
            self._is_due.clear()

    def _look(self) -> None:
        """Tell and ask, if there is something to tell or to ask."""
        with self._lock:
            untold = list(self._untold)
            if self._is_known and not untold and not self._quarantined:
                return
        try:
            quarantined = run_transaction(
                self._database, lambda session: self._tell(session, untold)
            )
        except SQLAlchemyError as error:
            reason = type(error).__name__
            if not self._was_asked or not all(each.was_tried for each in untold):
                print(f"lost devices cannot be told or asked for: {reason}", file=sys.stderr)
            with self._lock:
                self._was_asked = True
                for each in untold:
                    each.was_tried = True
            return
        finally:
            self._database.dispose()
        with self._lock:
            self._untold = [each for each in self._untold if each not in untold]
            self._quarantined = quarantined
            self._was_asked = self._is_known = True

    def _tell(self, session: Session, untold: list[_Untold]) -> set[str]:
        for each in untold:
            quarantine.note_loss(session, each.loss, ago_s=time.monotonic() - each.at)
        return quarantine.quarantined_of(session, self._devices)


def _are_two_soon(untold: list[_Untold]) -> bool:
    """Tell whether two of these losses lie so near each other that the device is quarantined."""
    within_s = LOST_TWICE_WITHIN.total_seconds()
    return any(later.at - earlier.at < within_s for earlier, later in pairwise(untold))
