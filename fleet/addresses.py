"""Where the one-machine stack listens and what opens it: ports and secrets, chosen once, kept in `<data>/env`.

That file is the only memory: ports and passwords are read back from its URLs. It does not start anything.
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
PROCESSES = (
    "gateway",
    "worker",
    "results",
    "sweeper",
    "webhooks",
)  # each with a password of its own, for Postgres and both Redis
FLOWER_BROKER = "flower_broker"  # what Flower tells the broker; people tell Flower another one
BUCKET, FLOWER_USER = "darkroom", "darkroom"

_LOWEST_PORT, _HIGHEST_PORT = (
    20_000,
    32_000,
)  # below the ephemeral range: no outgoing connection takes a port while its owner restarts


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Everything that is decided at the first start. `env()` is what the rest of the world reads."""

    ports: Mapping[str, int]
    passwords: Mapping[
        str, str
    ]  # of OWNER, APP, AUDITOR, broker, handoff, flower, FLOWER_BROKER and PROCESSES
    s3_access_key_id: str
    s3_secret_access_key: str
    api_key_pepper: str
    api_key: str | None = None
    extra: Mapping[str, str] = field(
        default_factory=dict
    )  # what an operator wrote into the file beside ours; handed on untouched

    @classmethod
    def fresh(cls) -> "Addresses":
        """Free ports and random secrets."""
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
        return replace(
            addresses, extra={name: value for name, value in env.items() if name not in ours}
        )

    def env(self) -> dict[str, str]:
        """The lines of `<data>/env`."""
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
        """The same, with another port for each listener of `names` whose port somebody else took meanwhile."""
        taken = [name for name in names if not is_free(self.ports[name])]
        return (
            replace(
                self, ports={**self.ports, **dict(zip(taken, free_ports(len(taken)), strict=True))}
            )
            if taken
            else self
        )


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
    """The variable that holds its password."""
    return f"{process.upper()}_PASSWORD"


def as_handed_to(process: str, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with URLs that open Postgres and both Redis to this process by its own name and password alone."""
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
    """The lines of a dotenv file, without interpolation; empty if there is no file."""
    return (
        {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}
        if path.exists()
        else {}
    )


def write_env(path: Path, env: Mapping[str, str]) -> None:
    """Replace the file at once, readable by its owner only: it holds every secret of the stack."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(
            "# Written by `darkroom up`. Lines that you add are kept and handed to the processes that know the name.\n"
        )
        file.writelines(f"{name}={value}\n" for name, value in env.items())
    new.replace(path)


def is_free(port: int) -> bool:
    """Whether we could listen on `port` now. Connections of a former owner that still fade out (TIME_WAIT) do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """`count` different ports that nobody listens on."""
    candidates = iter(random.sample(range(_LOWEST_PORT, _HIGHEST_PORT), k=2000))
    found: list[int] = []
    while len(found) < count:
        port = next(candidates)  # 2,000 taken ports would be a machine in other trouble
        if is_free(port):
            found.append(port)
    return found
