"""Tell whether this gateway can accept jobs, and which parts it could not reach a moment ago.

Each part is checked in a thread of its own every two seconds. So /readyz answers from memory at
once, even while a part does not answer at all. Ready means that jobs can be accepted, and for that
the database must take writes. The other parts may be away for a while: jobs wait, and another
gateway would have the same trouble.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.objectstore import ObjectStore, StoreUnavailable
from models import workers
from models.database import make_engine, transaction
from policy import connections
from policy.current import CurrentFleet
from policy.fleet import Fleet
from policy.workers import keeps_failing, unheld
from settings import GatewaySettings

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 2.0
ANSWERS_WITHIN_S = 1.0
NEEDED = "database"
Check = Callable[[], dict[str, Any]]


@dataclass
class _Part:
    """The last result of one part. asked_at: when the running check began; None between checks."""

    said: dict[str, Any] | None = None
    asked_at: float | None = None


class Readiness:
    """The checks of one gateway process; threads start with `start()` or the first `parts()`."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._parts = {name: _Part() for name in checks}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._has_started = False

    def start(self) -> None:
        """Start checking; harmless when repeated."""
        with self._lock:
            if self._has_started:
                return
            self._has_started = True
        for name in self._checks:
            thread_name = f"ready-{name}"
            asking = threading.Thread(
                target=self._check_repeatedly, args=(name,), name=thread_name, daemon=True
            )
            asking.start()

    def close(self) -> None:
        """Stop checking."""
        self._stop.set()

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return every part, `ready` or with the reason why not, at most three seconds old.

        Answers from memory.
        """
        self.start()
        now = time.monotonic()
        with self._lock:
            return {name: _said(part, now) for name, part in self._parts.items()}

    def _check_repeatedly(self, name: str) -> None:
        part = self._parts[name]
        while True:
            with self._lock:
                part.asked_at = time.monotonic()
            said = _answer(self._checks[name])
            with self._lock:
                if part.said is None or part.said["ready"] != said["ready"]:
                    event = "part_ready" if said["ready"] else "part_not_ready"
                    log.info(event, part=name, detail=said.get("detail"))
                part.said = said
                part.asked_at = None
            if self._stop.wait(CHECK_EVERY_S):
                return


def checks(
    settings: GatewaySettings,
    current: CurrentFleet,
    *,
    broker: Broker,
    handoff: Handoff,
    store: ObjectStore,
) -> dict[str, Check]:
    """Return the check of each part.

    The database is checked over connections of its own, so that a busy pool cannot block the check.
    """
    database = make_engine(settings.database_url, pool_size=connections.GATEWAY_READINESS)
    return {
        "database": lambda: _takes_writes(database),
        "broker": lambda: _checked(broker.check),
        "handoff": lambda: _checked(handoff.check),
        "object_store": lambda: _checked(store.ping),
        "workers": lambda: _has_workers(database, current.fleet, silent_for_s=settings.lease_ttl_s),
    }


def _takes_writes(database: Engine) -> dict[str, Any]:
    try:
        with transaction(database) as session:
            session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
    except OperationalError as error:
        if "read-only" in str(error.orig):
            # A demoted primary; `make_engine` opens no new connections to it.
            return {"ready": False, "detail": "read-only"}
        raise
    return {"ready": True}


def _has_workers(database: Engine, fleet: Fleet, *, silent_for_s: float) -> dict[str, Any]:
    """Check that pools have their workers, that these get ready, and that each model is served.

    A pool with a warm floor must have that many live workers; jobs for other pools wait in
    Postgres.
    """
    with transaction(database) as session:
        found = workers.now(session, silent_for_s=silent_for_s)
    live = [worker.pool for worker in found if worker.is_live]
    short = [name for name, pool in fleet.pools.items() if live.count(name) < pool.warm_floor]
    failing = [worker.name for worker in found if keeps_failing(worker)]
    unserved = [name for names in unheld(found).values() for name in names]
    problems = []
    if short:
        problems.append(f"too few workers in pool {', '.join(short)}")
    if failing:
        problems.append(f"cannot start: {', '.join(failing)}")
    if unserved:
        problems.append(f"cannot be loaded: {', '.join(unserved)}")
    said = {
        "ready": not problems,
        "live": len(live),
        "pools": {pool: live.count(pool) for pool in fleet.pools},
        "failing": failing,
        "unserved": unserved,
    }
    return {**said, "detail": "; ".join(problems)} if problems else said


def _checked(check: Callable[[], None]) -> dict[str, Any]:
    check()
    return {"ready": True}


def _answer(check: Check) -> dict[str, Any]:
    try:
        return check()
    except (SQLAlchemyError, BrokerUnavailable, HandoffUnavailable, StoreUnavailable) as error:
        return {"ready": False, "detail": type(error).__name__}
    except Exception as error:
        # Libraries raise anything for a part that works only in part; checking must go on.
        log.error("part_not_checked", exc_info=error)
        return {"ready": False, "detail": type(error).__name__}


def _said(part: _Part, now: float) -> dict[str, Any]:
    if part.asked_at is not None and now - part.asked_at > ANSWERS_WITHIN_S:
        return {"ready": False, "detail": "does not answer"}
    return part.said or {"ready": False, "detail": "not asked yet"}
