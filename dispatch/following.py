"""Follow the fleet's revisions: every process goes by the newest one within two seconds.

A process asks Postgres once a second for the newest number, and for the text only when that is
another one. While Postgres is away, or the text cannot be read, it goes on with the fleet it has.
"""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from edges import telemetry
from models import revisions
from models.database import make_engine, transaction
from policy.current import CurrentFleet
from policy.fleet import Fleet, FleetInvalid, parse_fleet

log = structlog.get_logger(__name__)

ASK_EVERY_S = 1.0


def fleet_at_start(database_url: str) -> CurrentFleet | None:
    """Return the fleet in force, for a process that starts.

    None if none was ever applied, if Postgres cannot be asked now, or if this release cannot read
    what was applied: then the process starts with its file.
    """
    database = make_engine(database_url, pool_size=1)
    try:
        with transaction(database) as session:
            revision = revisions.newest(session)
            if revision is None:
                return None
            return CurrentFleet(parse_fleet(revision.content), revision.number)
    except SQLAlchemyError as error:
        log.info("fleet_not_looked_at", reason=type(error).__name__)
    except FleetInvalid as error:
        telemetry.FLEET_UNREADABLE.inc()
        log.error("fleet_revision_unreadable", problems=error.problems)
    finally:
        database.dispose()
    return None


class Following:
    """Keep a `CurrentFleet` up to date in a thread of its own."""

    def __init__(
        self,
        current: CurrentFleet,
        database: Engine,
        *,
        goes_by: Callable[[Fleet], bool] = lambda fleet: True,
        is_due_again: Callable[[], bool] = lambda: False,
    ) -> None:
        """Know what to keep up to date.

        goes_by: has the process go by a new fleet. Called once a second until it returns True,
        with what is the newest then.  is_due_again: asked once a second; tells whether `goes_by`
        is to be called with the same fleet again.
        """
        self._current = current
        self._database = database
        self._goes_by = goes_by
        self._is_due_again = is_due_again
        self._is_behind = False
        self._unreadable = 0  # number of the revision that could not be read last
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self) -> None:
        """Begin to follow; the first look is at once."""
        telemetry.FLEET_REVISION.set(self._current.number)
        self._thread.start()

    def close(self) -> None:
        """Follow no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def catch_up(self) -> None:
        """Take over the newest revision, if it is another."""
        with transaction(self._database) as session:
            number = revisions.newest_number(session)
            if number in (self._current.number, self._unreadable):
                return
            content = revisions.find(session, number).content
        try:
            fleet = parse_fleet(content)
        except FleetInvalid as error:
            self._unreadable = number
            telemetry.FLEET_UNREADABLE.inc()
            log.error("fleet_revision_unreadable", number=number, problems=error.problems)
            return
        self._current.replace(fleet, number)
        telemetry.FLEET_REVISION.set(number)
        log.info("fleet_revision_taken_over", number=number)
        self._is_behind = True

    def _run(self) -> None:
        while True:
            try:
                self.catch_up()
                self._go_by_newest()
            except SQLAlchemyError as error:
                log.info("fleet_not_looked_at", reason=type(error).__name__)
            except Exception:  # this thread has to go on: later revisions may mend it
                log.exception("fleet_not_followed", number=self._current.number)
            if self._stop.wait(ASK_EVERY_S):
                return

    def _go_by_newest(self) -> None:
        if self._is_behind or self._is_due_again():
            self._is_behind = not self._goes_by(self._current.fleet)
