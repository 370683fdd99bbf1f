"""The stack under test, and every way to look into it that does not ask the house: SQL as the owner, both Redis, the object store."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from darkroom_client import Client, Retries
from edges.objectstore import ObjectStore
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from policy import queues
from policy.fleet import Fleet, parse_fleet
from settings import StoreSettings, WorkerSettings

Row = dict[str, Any]
NOTICES = "PREEMPTION_NOTICES"


class Rig:
    """One running stack. Made by `running`."""

    def __init__(self, stack: Stack, fleet: Fleet, folder: Path) -> None:
        self.stack, self.fleet, self.folder = stack, fleet, folder
        env = self.env = stack.env
        self.broker = redis.Redis.from_url(env["BROKER_URL"], socket_timeout=10)
        self.handoff = redis.Redis.from_url(env["HANDOFF_URL"], socket_timeout=10)
        self.store = ObjectStore(StoreSettings.model_validate({name.lower(): value for name, value in env.items()}))
        self.queues = queues.all_queues(fleet)
        self._database = make_engine(env["MIGRATION_DATABASE_URL"], pool_size=4)
        self._application = make_engine(env["DATABASE_URL"], pool_size=2)

    @property
    def workers(self) -> list[str]:
        """Process names of the workers; there are two or more."""
        return [f"worker-{number}" for number in range(1, self.stack.workers + 1)]

    def sql(self, query: str, **values: Any) -> list[Row]:
        """Ask the database as its owner. Raises SQLAlchemyError while it is away."""
        with self._database.begin() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def has(self, table: str, column: str | None = None) -> bool:
        """Whether the schema knows this table, or this column of it."""
        query = "SELECT 1 FROM information_schema.columns WHERE table_name = :table AND column_name = coalesce(:column, column_name)"
        return bool(self.sql(f"{query} LIMIT 1", table=table, column=column))

    def new_tenant(self, name: str) -> tuple[str, Client]:
        """A tenant of its own: its id and a client with its key."""
        with transaction(self._application) as session:
            tenant = tenants.create(session, name=name)
            _, key = api_keys.issue(session, tenant_id=tenant.id, name=name, pepper=self.env["API_KEY_PEPPER"])
        return str(tenant.id), Client(
            self.env["DARKROOM_URL"], key, retries=Retries(attempts=1)
        )  # its customers count what was unknown, and ask again themselves

    def live_workers(self) -> int:
        """Workers that the gateway takes for alive; 0 while it cannot say."""
        try:
            parts = httpx.get(f"{self.env['DARKROOM_URL']}/readyz", timeout=5, trust_env=False).json()["parts"]
            return int(parts["workers"].get("live", 0)) if all(part["ready"] for part in parts.values()) else 0
        except (httpx.HTTPError, KeyError, ValueError):
            return 0

    def workers_heard_since(self, instant: datetime) -> int:
        """Workers that said after `instant`, by the database's clock, that they are alive. A killed one's row looks alive for a while."""
        return int(self.sql("SELECT count(*) AS n FROM workers WHERE seen_at > :instant", instant=instant)[0]["n"])

    def worker_name(self, process: str) -> str:
        """What the worker of this process calls itself: fleet/processes.py says so."""
        return f"{process}@{socket.gethostname()}"

    def notice_path(self, process: str) -> Path | None:
        """The file that tells this worker that its machine will be taken away; None if the house cannot be told so."""
        if not hears_notices():
            return None
        return Path(os.environ[NOTICES].removeprefix("file:").replace("{worker}", self.worker_name(process)))

    def close(self) -> None:
        self._database.dispose()
        self._application.dispose()
        self.broker.close()
        self.handoff.close()


def hears_notices() -> bool:
    """Whether workers can be told of a preemption through a file."""
    return NOTICES.lower() in WorkerSettings.model_fields


@contextlib.contextmanager
def running(
    fleet_file: Callable[[Path], Path],
    *,
    workers: int,
    variables: Mapping[str, str],
    wait_s: float,
    keep: Callable[[], bool],
    kind: type[Stack] = Stack,
) -> Iterator[Rig]:
    """A stack in a folder of its own, stopped in any case.

    fleet_file: writes fleet.toml into the folder it is given and says where.  variables: settings of every process.
    keep: asked in the end, whether the folder shall stay.  kind: of stack.
    """
    folder = Path(tempfile.mkdtemp(prefix="darkroom-bench-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us ends the stack
    notices = {}
    if hears_notices():
        (folder / "notices").mkdir()
        notices = {NOTICES: f"file:{folder}/notices/{{worker}}"}
    os.environ |= {"LOG_LEVEL": "INFO", "DEVICE": "cpu", **variables, **notices}  # the stack hands on what its processes know the name of
    stack = kind(folder / "data", fleet_file=fleet_file(folder), workers=workers)
    try:
        stack.up(wait_s=wait_s, on_stage=say)
        rig = Rig(stack, parse_fleet((folder / "fleet.toml").read_text()), folder)
        try:
            yield rig
        finally:
            rig.close()
    finally:
        stack.down()
        if keep():
            say(f"the data are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def say(what: str) -> None:
    """A line for whoever watches; results go to standard output."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def wait_until(is_true: Callable[[], bool], within_s: float, *, every_s: float = 0.3) -> bool:
    """Whether it came true in time. A database that is away is not true yet."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(SQLAlchemyError, redis.RedisError):
            if is_true():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
