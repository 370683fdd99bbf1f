"""Back up the one-machine stack into a folder, and make a stack of such a folder again.

manifest.json   what it was made of; written last, so a folder without it is no backup
database.dump   pg_dump's custom format: everything that Postgres knew at one instant
objects/        the bucket, copied after the dump, so whatever the dump names is there
env             every secret of the stack. The dump's API keys are digests under the pepper in
                it: without it no key is valid
fleet.toml      what was served; kept to be read, not restored

Not in it: the two Redis (messages and pixels: what is missing is announced and rendered again),
weights, measured curves, logs.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
from psycopg2 import sql

from fleet.addresses import BUCKET, DATABASE, HOST, OWNER, Addresses
from fleet.errors import StackError
from fleet.services import connect, postgres_binaries

MANIFEST = "manifest.json"
DUMP = "database.dump"
OBJECTS = "objects"
ENV = "env"
FLEET = "fleet.toml"
_DIGEST_IN_KEY = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Manifest:
    """Describe a backup. roles: those that the dump grants rights to; a dump does not hold them."""

    made_at: str
    revision: str
    postgres_version: str
    roles: list[str]
    dump_sha256: str
    objects: int
    object_bytes: int

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a backup's manifest. Raises StackError if there is none."""
        try:
            return cls(**json.loads((folder / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError):
            raise StackError(
                f"{folder} is not a whole backup: it has no readable {MANIFEST}"
            ) from None


def write(folder: Path, *, data_dir: Path, addresses: Addresses, fleet_file: Path) -> Manifest:
    """Back up a stack, while it runs, into `folder`, which must be new or empty.

    Raises StackError.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StackError(f"{folder} is not empty; a backup goes into a folder of its own")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # it holds every secret
    _run("pg_dump", addresses, "--format=custom", f"--file={folder / DUMP}")
    revision, version, roles = _facts(addresses)
    copied = list(_copy_objects(data_dir / "s3" / BUCKET, folder / OBJECTS, is_whole=False))
    shutil.copyfile(data_dir / ENV, folder / ENV)
    (folder / ENV).chmod(0o600)
    shutil.copyfile(fleet_file, folder / FLEET)
    manifest = Manifest(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=revision,
        postgres_version=version,
        roles=roles,
        dump_sha256=_sha256(folder / DUMP),
        objects=len(copied),
        object_bytes=sum(copied),
    )
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    unfinished.replace(folder / MANIFEST)
    return manifest


def check(folder: Path) -> Manifest:
    """Check that a backup is complete, and return its manifest. Raises StackError."""
    manifest = Manifest.read(folder)
    for name in (DUMP, ENV, OBJECTS):
        if not (folder / name).exists():
            raise StackError(f"{folder} is not a whole backup: {name} is missing")
    if _sha256(folder / DUMP) != manifest.dump_sha256:
        raise StackError(
            f"{folder / DUMP} is not what was written there: its digest is another one"
        )
    return manifest


def read(folder: Path, *, data_dir: Path, addresses: Addresses) -> Manifest:
    """Fill a stack's empty database and its empty bucket from a backup. Raises StackError."""
    manifest = check(folder)
    _make_roles(addresses, manifest.roles)
    _run(
        "pg_restore",
        addresses,
        "--exit-on-error",
        "--single-transaction",
        f"--dbname={DATABASE}",
        str(folder / DUMP),
    )
    copied = list(_copy_objects(folder / OBJECTS, data_dir / "s3" / BUCKET, is_whole=True))
    if len(copied) != manifest.objects:
        raise StackError(
            f"{folder} is not a whole backup: it has {len(copied)} of {manifest.objects} objects"
        )
    return manifest


def _run(program: str, addresses: Addresses, *arguments: str) -> None:
    access = {
        "PGHOST": HOST,
        "PGPORT": str(addresses.ports["postgres"]),
        "PGUSER": OWNER,
        "PGPASSWORD": addresses.passwords[OWNER],
        "PGDATABASE": DATABASE,
    }
    command = [str(postgres_binaries() / program), "--no-password", *arguments]
    done = subprocess.run(
        command, env={"PATH": os.environ.get("PATH", ""), **access}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise StackError(f"{program} fails: {done.stderr.strip()}")


def _facts(addresses: Addresses) -> tuple[str, str, list[str]]:
    """Return the tables' revision, the version of Postgres, and the roles with rights."""
    connection = connect(addresses, DATABASE)
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT version_num, current_setting('server_version') FROM alembic_version"
            )
            revision, version = cursor.fetchone()
            cursor.execute(
                "SELECT rolname FROM pg_roles "
                "WHERE rolname LIKE 'darkroom\\_%' AND NOT rolsuper ORDER BY 1"
            )
            return revision, version, [role for (role,) in cursor.fetchall()]
    except psycopg2.Error as error:
        raise StackError(f"Postgres: {' '.join(str(error).split())}") from None
    finally:
        connection.close()


def _make_roles(addresses: Addresses, roles: list[str]) -> None:
    """Make the roles that are missing; the migrations give them passwords at the next start."""
    connection = connect(addresses, DATABASE)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT rolname FROM pg_roles")
            known = {role for (role,) in cursor.fetchall()}
            for role in sorted(set(roles) - known):
                cursor.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role)))
    finally:
        connection.close()


def _copy_objects(source: Path, target: Path, *, is_whole: bool) -> Iterator[int]:
    """Copy every object and yield its size.

    An object's name tells its digest; an object with another digest is not copied.
    is_whole: such an object is an error. Otherwise it is being stored just now, and no row names it
    yet.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # deleted since we looked
            continue
        digest = path.name.partition(".")[0]
        if _DIGEST_IN_KEY.match(digest) and hashlib.sha256(content).hexdigest() != digest:
            if is_whole:
                raise StackError(f"{path} is not what was written there: its digest is another one")
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy.write_bytes(content)
        yield len(content)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
