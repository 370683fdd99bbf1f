"""A running stack, and every way to look into it that does not ask Darkroom.

SQL as the owner, both Redis, the object store.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.lib.stack import environment, running_stack, temporary_folder
from darkroom_client import Client, Retries
from edges.objectstore import ObjectStore
from fleet.processes import name_of_worker, pools_served, worker_processes
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from policy import queues
from policy.fleet import Fleet, Pool, parse_fleet
from policy.limits import DEFAULT_SCOPES, NAMES_VERSIONS
from policy.workers import workers_by_class
from settings import StoreSettings, WorkerSettings

Row = dict[str, Any]
NOTICES = "PREEMPTION_NOTICES"

_HAS_COLUMN = """
SELECT 1 FROM information_schema.columns
WHERE table_name = :table AND column_name = coalesce(:column, column_name) LIMIT 1
"""


class StackProbe:
    """Looks into one running stack. Made by `probed_stack`."""

    def __init__(self, stack: Stack, fleet: Fleet) -> None:
        self.stack = stack
        self.fleet = fleet
        self.env = stack.env
        self.broker = redis.Redis.from_url(self.env["BROKER_URL"], socket_timeout=10)
        self.handoff = redis.Redis.from_url(self.env["HANDOFF_URL"], socket_timeout=10)
        self.store = ObjectStore(
            StoreSettings.model_validate({name.lower(): value for name, value in self.env.items()})
        )
        self.queues = queues.all_queues(fleet)
        pools = {name: fleet.pool_or_retired(name) for name in pools_served(fleet, self.env)}
        counts = workers_by_class(str(stack.workers), pools)
        self._places = worker_processes(fleet, counts)
        self._database = make_engine(self.env["MIGRATION_DATABASE_URL"], pool_size=4)
        self._application = make_engine(self.env["DATABASE_URL"], pool_size=2)

    @property
    def workers(self) -> list[str]:
        """Return the process names of the workers."""
        return list(self._places)

    def pool_of(self, process: str) -> Pool:
        """Return the pool whose worker this process is."""
        return self.fleet.pools[self._places[process][0]]

    def sql(self, query: str, **values: Any) -> list[Row]:
        """Ask the database as its owner. Raises SQLAlchemyError while it is away."""
        with self._database.begin() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def has(self, table: str, column: str | None = None) -> bool:
        """Tell whether the schema knows this table, or this column of it."""
        return bool(self.sql(_HAS_COLUMN, table=table, column=column))

    def new_tenant(self, name: str) -> tuple[str, Client]:
        """Make a tenant; return its id and a client with its key, which may name versions.

        The client never tries again: who uses it counts what was unknown, and asks again itself.
        """
        with transaction(self._application) as session:
            tenant = tenants.create(session, name=name)
            pepper = self.env["API_KEY_PEPPER"]
            _, key = api_keys.issue(
                session,
                tenant_id=tenant.id,
                name=name,
                pepper=pepper,
                scopes=(*DEFAULT_SCOPES, NAMES_VERSIONS),
            )
        client = Client(self.env["DARKROOM_URL"], key, retries=Retries(attempts=1))
        return str(tenant.id), client

    def live_workers(self) -> int:
        """Count the workers that the gateway takes for alive; 0 while it cannot say."""
        url = f"{self.env['DARKROOM_URL']}/readyz"
        try:
            parts = httpx.get(url, timeout=5, trust_env=False).json()["parts"]
            if not all(part["ready"] for part in parts.values()):
                return 0
            return int(parts["workers"].get("live", 0))
        except (httpx.HTTPError, KeyError, ValueError):
            return 0

    def workers_heard_since(self, instant: datetime) -> int:
        """Count the workers that said after `instant`, by the database's clock, that they live.

        A killed one's row looks alive for a while.
        """
        query = "SELECT count(*) AS n FROM workers WHERE seen_at > :instant"
        return int(self.sql(query, instant=instant)[0]["n"])

    def worker_name(self, process: str) -> str:
        """Return what the worker of this process calls itself."""
        return name_of_worker(*self._places[process])

    def process_of(self, worker: str) -> str:
        """Return the process of this stack whose worker has this name; the name if none has."""
        return next((name for name in self.workers if self.worker_name(name) == worker), worker)

    def notice_path(self, process: str) -> Path | None:
        """Return the file that tells this worker that its machine will be taken away.

        None if workers cannot be told so.
        """
        if not hears_notices():
            return None
        pattern = os.environ[NOTICES].removeprefix("file:")
        return Path(pattern.replace("{worker}", self.worker_name(process)))

    def close(self) -> None:
        """Give all connections back."""
        self._database.dispose()
        self._application.dispose()
        self.broker.close()
        self.handoff.close()


def hears_notices() -> bool:
    """Tell whether workers can be told of a preemption through a file."""
    return NOTICES.lower() in WorkerSettings.model_fields


@contextlib.contextmanager
def probed_stack(
    write_fleet_file: Callable[[Path], Path],
    *,
    workers: int | str,
    keep: Callable[[], bool],
    variables: Mapping[str, str] | None = None,
    wait_s: float = 300,
    kind: type[Stack] = Stack,
) -> Iterator[StackProbe]:
    """Start a stack in a folder of its own; stop it in any case.

    write_fleet_file: writes fleet.toml into the folder it is given and says where.  workers: as for
    `Stack`.  variables: settings of every process.  keep: asked in the end, whether the folder
    shall stay.  kind: of stack.
    """
    with temporary_folder(keep) as folder:
        settings = {"LOG_LEVEL": "INFO", "DEVICE": "cpu", **(variables or {})}
        if hears_notices():
            (folder / "notices").mkdir()
            settings[NOTICES] = f"file:{folder}/notices/{{worker}}"
        file = write_fleet_file(folder)
        stack = running_stack(folder, fleet_file=file, workers=workers, wait_s=wait_s, kind=kind)
        with environment(settings), stack as started:
            probe = StackProbe(started, parse_fleet(file.read_text()))
            with contextlib.closing(probe):
                yield probe


def wait_until(is_true: Callable[[], bool], within_s: float, *, every_s: float = 0.3) -> bool:
    """Tell whether it came true in time. A database that is away is not true yet."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(SQLAlchemyError, redis.RedisError):
            if is_true():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
