"""Services that answer with errors for some seconds: how each such state is made, and ended.

Redis, broker or hand-off: what can be had from the real server is had from it; what it says only
in a cluster, while it loads or after a failed save is said by a proxy on the way to it
(benchmarks/lib/refusals.py). Postgres: the real server throughout.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2  # type: ignore[import-untyped]
import redis

from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.refusals import REPLIES, RefusingProxy
from fleet import redis_users
from fleet.addresses import PROCESSES, Addresses, free_ports, password_of
from fleet.stack import Stack
from migrations.roles import OF_PROCESS

PROXIED = {"broker": "BROKER_URL", "handoff": "HANDOFF_URL"}
Lasting = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Outage:
    """One part that answers with one kind of error for the length of `lasting`."""

    part: str
    error: str
    lasting: Lasting
    how: str = "real"

    def __str__(self) -> str:
        return f"{self.part}: {self.error} ({self.how})"


class ProxiedStack(Stack):
    """A stack whose processes reach both Redis through proxies, which can be told to refuse."""

    def __init__(
        self, data_dir: Path, *, fleet_file: Path | None = None, workers: int | str = 1
    ) -> None:
        super().__init__(data_dir, fleet_file=fleet_file, workers=workers)
        self.proxies: dict[str, RefusingProxy] = {}
        self._proxied: dict[str, str] = {}

    def close(self) -> None:
        """Close the proxies."""
        for proxy in self.proxies.values():
            proxy.close()

    def _process_env(self, addresses: Addresses) -> dict[str, str]:
        env = super()._process_env(addresses)
        for part, variable in PROXIED.items():
            if part not in self.proxies:
                (port,) = free_ports(1)
                url = urlsplit(env[variable])
                self.proxies[part] = RefusingProxy(port, addresses.ports[part])
                address = url.netloc.replace(f":{url.port}", f":{port}")
                self._proxied[variable] = url._replace(netloc=address).geturl()
        return env | self._proxied


def outages(probe: StackProbe) -> list[Outage]:
    """Return every outage that can be made on this stack."""
    stack = probe.stack
    assert isinstance(stack, ProxiedStack)
    found = []
    for part, variable in PROXIED.items():
        server = RedisServer(probe.env[variable], stack.data_dir / part, _users(part, probe))
        found += [Outage(part, name, act) for name, act in server.errors().items()]
        refusing = stack.proxies[part].refusing
        found += [
            Outage(part, name, partial(refusing, reply), "proxied")
            for name, reply in REPLIES.items()
        ]
    postgres = Postgres(probe)
    return [*found, *(Outage("postgres", name, act) for name, act in postgres.errors().items())]


def _users(part: str, probe: StackProbe) -> dict[str, tuple[str, str]]:
    """Return rules and password of each account that a process of Darkroom logs in as.

    What is done to the operator's concerns none of them.
    """
    rules = {"broker": redis_users.BROKER, "handoff": redis_users.HANDOFF}[part]
    return {name: (rules[name], probe.env[password_of(name)]) for name in PROCESSES}


class RedisServer:
    """A real Redis and what can be done to it over one connection that stays."""

    def __init__(self, url: str, folder: Path, users: Mapping[str, tuple[str, str]]) -> None:
        """Connect. users: rules and password of each that a process of Darkroom logs in as."""
        self._url = url
        self._folder = folder
        self._users = users
        self._redis = redis.Redis.from_url(url, socket_timeout=10, single_connection_client=True)

    def errors(self) -> dict[str, Lasting]:
        """Return what makes each error, by its name."""
        return {
            "READONLY, UNBLOCKED": self.demoted,
            "MASTERDOWN": self.cut_off,
            "OOM": lambda: self._set("maxmemory", "1"),
            "NOREPLICAS": lambda: self._set("min-replicas-to-write", "1"),
            "MISCONF": self.unable_to_save,
            "NOPERM": self.forbidden,
            "WRONGPASS": self.with_another_password,
            "BUSY": self.busy,
            "max number of clients": self.crowded,
        }

    @contextlib.contextmanager
    def demoted(self) -> Iterator[None]:
        """Make it a replica of nobody: READONLY."""
        self._do("REPLICAOF", "127.0.0.1", "1")
        try:
            yield
        finally:
            self._do("REPLICAOF", "NO", "ONE")

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Make it a replica that serves no stale data: MASTERDOWN."""
        with self._set("replica-serve-stale-data", "no"), self.demoted():
            yield

    @contextlib.contextmanager
    def unable_to_save(self) -> Iterator[None]:
        """Put a folder where its file should be, which no user may write: MISCONF."""
        obstacle = self._folder / "dump.rdb"
        with contextlib.suppress(FileNotFoundError):
            obstacle.unlink()
        obstacle.mkdir()
        with self._set("stop-writes-on-bgsave-error", "yes"), self._set("save", "3600 1"):
            self._do("BGSAVE")
            try:
                yield
            finally:
                obstacle.rmdir()

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        """Take the right to write from every account: NOPERM."""
        for user in self._users:
            self._do("ACL", "SETUSER", user, "-@write", "-@blocking")
        try:
            yield
        finally:
            for user, (rules, _) in self._users.items():
                reset = ("nocommands", "resetkeys", "resetchannels")
                self._do("ACL", "SETUSER", user, *reset, *rules.split())

    @contextlib.contextmanager
    def with_another_password(self) -> Iterator[None]:
        """Change every password, and close all connections: WRONGPASS."""
        for user in self._users:
            self._do("ACL", "SETUSER", user, "resetpass", ">another")
        try:
            self._close_connections()
            yield
        finally:
            for user, (_, password) in self._users.items():
                self._do("ACL", "SETUSER", user, "resetpass", f">{password}")

    @contextlib.contextmanager
    def crowded(self) -> Iterator[None]:
        """Let nobody connect any more, and close all connections."""
        with self._set("maxclients", "1"):
            self._close_connections()
            yield

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Run a script without end: BUSY."""

        def run() -> None:
            with redis.Redis.from_url(self._url) as other, contextlib.suppress(redis.RedisError):
                other.eval("while true do end", 0)

        with self._set("lua-time-limit", "50"):
            script = threading.Thread(target=run)
            script.start()
            try:
                yield
            finally:
                self._do("SCRIPT", "KILL")
                script.join()

    @contextlib.contextmanager
    def _set(self, name: str, value: str) -> Iterator[None]:
        before = str(self._redis.config_get(name)[name])
        self._redis.config_set(name, value)
        try:
            yield
        finally:
            self._redis.config_set(name, before)

    def _close_connections(self) -> None:
        for kind in ("pubsub", "normal"):
            self._redis.client_kill_filter(_type=kind, skipme=True)

    def _do(self, *command: str) -> None:
        execute: Any = self._redis.execute_command  # not annotated
        execute(*command)


class Postgres:
    """The real Postgres, told so by its owner over a connection that stays writable."""

    def __init__(self, probe: StackProbe) -> None:
        self._probe = probe

    def errors(self) -> dict[str, Lasting]:
        """Return what makes each error, by its name."""
        return {
            "read-only (25006)": self.read_only,
            "restarts (57P01, 57P03)": self.restarting,
            "sessions ended, again and again (57P01)": self.ending_sessions,
            "too many connections (53300)": lambda: self._altered(
                "CONNECTION LIMIT 0", "CONNECTION LIMIT -1"
            ),
            "login refused (28000)": lambda: self._altered("NOLOGIN", "LOGIN"),
        }

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Make every transaction read-only."""
        self._do("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self._do("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")

    @contextlib.contextmanager
    def restarting(self) -> Iterator[None]:
        """Stop the server; start it again."""
        self._probe.stack.stop("postgres")
        try:
            yield
        finally:
            self._probe.stack.start("postgres")

    @contextlib.contextmanager
    def ending_sessions(self) -> Iterator[None]:
        """End all sessions twice a second."""
        enough = threading.Event()

        def run() -> None:
            while not enough.wait(0.5):
                self._end_sessions()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join()

    @contextlib.contextmanager
    def _altered(self, to: str, back: str) -> Iterator[None]:
        self._do(*(f"ALTER ROLE {role} {to}" for role in OF_PROCESS.values()))
        self._end_sessions()
        try:
            yield
        finally:
            self._do(*(f"ALTER ROLE {role} {back}" for role in OF_PROCESS.values()))

    def _end_sessions(self) -> None:
        self._do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE usename LIKE 'darkroom%' AND usename <> current_user"
        )

    def _do(self, *statements: str) -> None:
        url = self._probe.env["MIGRATION_DATABASE_URL"].replace("+psycopg2", "")
        connection = psycopg2.connect(url, options="-c default_transaction_read_only=off")
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
        finally:
            connection.close()
