"""Choose the one-machine stack's ports and secrets once, and keep them in `<data>/env`.

Nothing else stores them: ports and passwords are read back from that file's URLs. This module
starts nothing.
"""

import os
import random
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

HOST = "127.0.0.1"
LISTENERS = ("gateway", "flower", "postgres", "broker", "handoff", "s3")
DATABASE, OWNER, APP, AUDITOR = "darkroom", "darkroom_owner", "darkroom_app", "darkroom_auditor"
# Each has a password of its own, for Postgres and both Redis.
PROCESSES = ("gateway", "worker", "results", "sweeper", "webhooks")
FLOWER_BROKER = (
    "flower_broker"  # Flower's password at the broker; people log in to Flower by another
)
BUCKET = "darkroom"
FLOWER_USER = "darkroom"

# Below the ephemeral range: no outgoing connection takes a port while its owner restarts.
_LOWEST_PORT = 20_000
_HIGHEST_PORT = 32_000


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Hold everything that is decided at the first start; others read it from `env()`."""

    ports: Mapping[str, int]
    # Of OWNER, APP, AUDITOR, broker, handoff, flower, FLOWER_BROKER and PROCESSES.
    passwords: Mapping[str, str]
    s3_access_key_id: str
    s3_secret_access_key: str
    api_key_pepper: str
    api_key: str | None = None
    # Lines that an operator added to the file; handed on unchanged.
    extra: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def fresh(cls) -> "Addresses":
        """Choose free ports and random secrets."""
        owners = (OWNER, APP, AUDITOR, "broker", "handoff", "flower", FLOWER_BROKER, *PROCESSES)
        return cls(
            ports=dict(zip(LISTENERS, free_ports(len(LISTENERS)), strict=True)),
            passwords={owner: secrets.token_hex(16) for owner in owners},
            s3_access_key_id=secrets.token_hex(10),
            s3_secret_access_key=secrets.token_hex(20),
            api_key_pepper=secrets.token_hex(32),
        )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Addresses":
        """Read back what `env()` wrote; KeyError names the line that is missing."""
        urls = {name: urlsplit(env[variable]) for name, variable in _URLS.items()}
        addresses = cls(
            ports={name: urls[name].port or 0 for name in LISTENERS},
            passwords={
                **{
                    name: urls[name].password or ""
                    for name in (OWNER, APP, AUDITOR, "broker", "handoff")
                },
                "flower": env["FLOWER_PASSWORD"],
                # A stack that an older version started has none for its processes yet.
                **{
                    name: env.get(password_of(name)) or secrets.token_hex(16)
                    for name in (FLOWER_BROKER, *PROCESSES)
                },
            },
            s3_access_key_id=env["S3_ACCESS_KEY_ID"],
            s3_secret_access_key=env["S3_SECRET_ACCESS_KEY"],
            api_key_pepper=env["API_KEY_PEPPER"],
            api_key=env.get("DARKROOM_API_KEY") or None,
        )
        ours = addresses.env()
        extra = {name: value for name, value in env.items() if name not in ours}
        return replace(addresses, extra=extra)

    def env(self) -> dict[str, str]:
        """Return the lines of `<data>/env`."""
        at = {name: f"{HOST}:{port}" for name, port in self.ports.items()}
        server = f"{at['postgres']}/{DATABASE}"
        database = {
            role: f"postgresql+psycopg2://{role}:{self.passwords[role]}@{server}"
            for role in (OWNER, APP, AUDITOR)
        }
        return {
            "DARKROOM_URL": f"http://{at['gateway']}",
            "DARKROOM_API_KEY": self.api_key or "",
            "DATABASE_URL": database[APP],
            "MIGRATION_DATABASE_URL": database[OWNER],
            "AUDITOR_DATABASE_URL": database[AUDITOR],
            "BROKER_URL": f"redis://:{self.passwords['broker']}@{at['broker']}/0",
            "HANDOFF_URL": f"redis://:{self.passwords['handoff']}@{at['handoff']}/0",
            "S3_ENDPOINT_URL": f"http://{at['s3']}",
            "S3_ACCESS_KEY_ID": self.s3_access_key_id,
            "S3_SECRET_ACCESS_KEY": self.s3_secret_access_key,
            "S3_BUCKET": BUCKET,
            "API_KEY_PEPPER": self.api_key_pepper,
            "FLOWER_URL": f"http://{at['flower']}",
            "FLOWER_USER": FLOWER_USER,
            "FLOWER_PASSWORD": self.passwords["flower"],
            **{password_of(name): self.passwords[name] for name in (FLOWER_BROKER, *PROCESSES)},
            "GATEWAY_BIND": at["gateway"],
            **self.extra,
        }

    def with_free_ports(self, names: Iterable[str]) -> "Addresses":
        """Return a copy with another port for each listener of `names` whose port is now taken."""
        taken = [name for name in names if not is_free(self.ports[name])]
        if not taken:
            return self
        new_ports = dict(zip(taken, free_ports(len(taken)), strict=True))
        return replace(self, ports={**self.ports, **new_ports})


_URLS = {
    "gateway": "DARKROOM_URL",
    "flower": "FLOWER_URL",
    "postgres": "DATABASE_URL",
    "broker": "BROKER_URL",
    "handoff": "HANDOFF_URL",
    "s3": "S3_ENDPOINT_URL",
    OWNER: "MIGRATION_DATABASE_URL",
    APP: "DATABASE_URL",
    AUDITOR: "AUDITOR_DATABASE_URL",
}


def password_of(process: str) -> str:
    """Return the name of the variable that holds the process's password."""
    return f"{process.upper()}_PASSWORD"


def as_handed_to(process: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with URLs of Postgres and both Redis in which this process logs in as itself."""
    key = FLOWER_BROKER if process == "flower" else process
    handed = dict(env)
    for variable, user in (
        ("DATABASE_URL", f"darkroom_{process}"),
        ("BROKER_URL", process),
        ("HANDOFF_URL", process),
    ):
        scheme, _, rest = env[variable].partition("://")
        handed[variable] = f"{scheme}://{user}:{env[password_of(key)]}@{rest.rpartition('@')[2]}"
    return handed


def read_env(path: Path) -> dict[str, str]:
    """Read the lines of a dotenv file, without interpolation; {} if there is no file."""
    if not path.exists():
        return {}
    return {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}


def write_env(path: Path, env: Mapping[str, str]) -> None:
    """Replace the file atomically, readable by its owner only: it holds the stack's secrets."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(
            "# Written by `darkroom up`. Lines that you add are kept and handed to the processes "
            "that know the name.\n"
        )
        file.writelines(f"{name}={value}\n" for name, value in env.items())
    new.replace(path)


def is_free(port: int) -> bool:
    """Tell whether we could listen on `port` now.

    Connections of a former owner in TIME_WAIT do not count.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Find `count` different ports that nobody listens on."""
    candidates = iter(random.sample(range(_LOWEST_PORT, _HIGHEST_PORT), k=2000))
    found: list[int] = []
    while len(found) < count:
        port = next(candidates)  # a machine with 2,000 taken ports has other problems
        if is_free(port):
            found.append(port)
    return found
