"""Find the Darkroom that the command talks to.

Environment variables such as DARKROOM_URL and DARKROOM_API_KEY name it; otherwise it is the stack
of the data directory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from dotenv import dotenv_values

from darkroom_client import AsyncClient, Client

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from fleet.stack import Stack
    from policy.fleet import Fleet


class NoInstallation(Exception):
    """Say that no installation is configured; the message tells how to do it."""


@dataclass(frozen=True)
class Installation:
    """Give every command access to one installation."""

    data_dir: Path
    fleet_file: Path | None = None  # None = the repository's

    def look_up(self, name: str) -> str:
        """Return a variable of the environment, or of `<data>/env`. Raises NoInstallation."""
        value = os.environ.get(name) or dotenv_values(self.data_dir / "env", interpolate=False).get(
            name
        )
        if not value and (path := os.environ.get(f"{name}_FILE")):
            try:
                value = Path(path).read_text().strip()
            except OSError as error:
                raise NoInstallation(f"{name}_FILE: {path}: {error.strerror}") from None
        if not value and name == "DARKROOM_URL" and (listens := os.environ.get("GATEWAY_BIND")):
            # This is the gateway's own container.
            value = f"http://127.0.0.1:{listens.rpartition(':')[2]}"
        if not value:
            with_containers = "with containers: docker compose run --rm cli COMMAND"
            raise NoInstallation(
                f"No {name}: set it, or start a stack here with `darkroom up --detach`; "
                f"{with_containers}."
            )
        return _as_sqlalchemy_reads_it(name, value) if name.endswith("DATABASE_URL") else value

    def client(self) -> Client:
        """Return a client of the gateway, as the tenant of the configured key."""
        return Client(self.look_up("DARKROOM_URL"), self.look_up("DARKROOM_API_KEY"))

    def async_client(self) -> AsyncClient:
        """Return a client of the gateway for asyncio."""
        return AsyncClient(self.look_up("DARKROOM_URL"), self.look_up("DARKROOM_API_KEY"))

    @contextmanager
    def transaction(self) -> Iterator["Session"]:
        """Open a database session of the application role; commit when the block ends well."""
        from models.database import make_engine, transaction

        engine = make_engine(self.look_up("DATABASE_URL"), pool_size=1)
        try:
            with transaction(engine) as session:
                yield session
        finally:
            engine.dispose()

    def load_fleet(self) -> "Fleet":
        """Read the installation's fleet file.

        Ends the process with one line per wrong key.
        """
        from settings import FleetSettings, load, load_fleet_or_exit

        settings = load(FleetSettings)
        return load_fleet_or_exit(settings.model_copy(update=self.remembered()))

    def remembered(self) -> dict[str, Path]:
        """Return the settings `fleet_file` and `checkpoint_root` as this installation has them.

        What the caller says wins over what `up` has kept in `<data>/env`; without both it is left
        out.
        """
        kept = dotenv_values(self.data_dir / "env", interpolate=False)
        told: dict[str, Path] = {}
        fleet_file = self.fleet_file or kept.get("FLEET_FILE")
        if fleet_file:
            told["fleet_file"] = Path(fleet_file)
        root = os.environ.get("CHECKPOINT_ROOT") or kept.get("CHECKPOINT_ROOT")
        if root:
            told["checkpoint_root"] = Path(root)
        return told

    def stack(self, *, workers: int | str = 1) -> "Stack":
        """Return the stack of the data directory."""
        from fleet.stack import Stack

        return Stack(self.data_dir, fleet_file=self.fleet_file, workers=workers)


def _as_sqlalchemy_reads_it(name: str, url: str) -> str:
    from settings import as_postgres_url

    try:
        return as_postgres_url(url)
    except ValueError as error:
        raise NoInstallation(f"{name}: {error}.") from None


pass_installation = click.make_pass_decorator(Installation)
