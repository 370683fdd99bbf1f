"""Run the whole system on one machine: services from wheels, migrations, a first tenant, Darkroom.

Stack.up():  addresses ─▶ Postgres, two Redis, S3 ─▶ database, migrations
             ─▶ tenant `demo` and its key ─▶ gateway, workers, …
Everything listens on the loopback; all data are in the data directory. supervisord keeps the
processes alive (supervision.py). This module only says which, and in what order, and waits until
they are ready.
"""

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy.exc import SQLAlchemyError

from fleet import backup, processes, services
from fleet.addresses import LISTENERS, Addresses, read_env, write_env
from fleet.errors import StackError
from fleet.supervision import ProcessStatus, Program, Supervisor
from models import api_keys, revisions, tenants, workers
from models.database import make_engine, transaction
from policy.fleet import Fleet, FleetInvalid, parse_fleet
from policy.workers import CLASS_MARK, WorkerNow, WorkersInvalid, WorkerState, workers_by_class
from settings import EX_CONFIG, REPO, MigrationSettings

__all__ = ["FIRST_TENANT", "ProcessStatus", "Stack", "StackError"]

FIRST_TENANT = "demo"
WORKER_SILENT_AFTER_S = 15.0
# A process that dies this often before the stack is ready will not get better by waiting.
_DEATHS_BEFORE_GIVING_UP = 3


class Stack:
    """Control one installation, by its data directory. Cheap to make: it starts nothing."""

    def __init__(
        self, data_dir: Path, *, fleet_file: Path | None = None, workers: int | str = 1
    ) -> None:
        """Know where it is.

        fleet_file: None: the one that it was started with before, or the repository's.  workers:
        of each pool, or as `policy.workers.workers_by_class` reads it.
        """
        self.data_dir = data_dir.absolute()
        self.workers = workers
        self._fleet_file = fleet_file.absolute() if fleet_file else None
        # Processes that the last `up` stopped because they have to start anew.
        self.restarted: list[str] = []
        self._supervisor = Supervisor(self.data_dir)

    @property
    def env(self) -> dict[str, str]:
        """Read `<data>/env`; empty before the first start."""
        return read_env(self.env_path)

    @property
    def env_path(self) -> Path:
        """Return the path of the dotenv file that holds every address and secret."""
        return self.data_dir / "env"

    @property
    def fleet_file(self) -> Path:
        """Return the path of the fleet file: the given one, the remembered, or the repository's."""
        if self._fleet_file is not None:
            return self._fleet_file
        return Path(self.env.get("FLEET_FILE") or REPO / "fleet.toml")

    def is_up(self) -> bool:
        """Tell whether this stack was started and not stopped, whatever its processes do."""
        return self._supervisor.is_alive()

    def up(
        self, wait_s: float = 120, *, on_stage: Callable[[str], None] = lambda stage: None
    ) -> None:
        """Start what does not run; return when the gateway reports all parts and workers ready.

        Harmless on a running stack. on_stage: called with what is being done. Raises StackError;
        what was started then stays up, for its logs and for another try.
        """
        deadline = time.monotonic() + wait_s
        with self._lock():
            on_stage("starting Postgres, Redis and the object store")
            addresses = self._up_services(deadline)
            on_stage("migrating the database")
            self._migrate(addresses)
            number = self._apply_fleet(addresses)
            addresses = self._ensure_first_key(addresses)
            on_stage("starting gateway, workers and the other processes")
            env = self._process_env(addresses)
            fleet = self._fleet()
            counts = self._worker_counts(fleet)
            programs = processes.programs(env, fleet, workers=counts)
            self._stop_workers_that_lack_models(programs)
            for program in programs:
                self._supervisor.start(program.name)
            on_stage("loading the models")
            self._wait_ready(deadline, counts, number)

    def down(self) -> None:
        """Stop Darkroom's processes, then the services. Data stay; no process does."""
        if not self.data_dir.exists():
            return
        with self._lock():
            by_name = {status.name: status for status in self._supervisor.status()}
            for wave in _waves(by_name):
                self._supervisor.stop(wave)
            self._supervisor.shut_down()

    def back_up(self, folder: Path) -> backup.Manifest:
        """Back up all that a restore needs into a new folder, while the stack runs.

        Raises StackError.
        """
        if self.pid("postgres") is None:
            raise StackError("Postgres does not run; a backup is made of a running stack")
        return backup.write(
            folder,
            data_dir=self.data_dir,
            addresses=Addresses.from_env(self.env),
            fleet_file=self.fleet_file,
        )

    def restore(self, folder: Path, wait_s: float = 120) -> backup.Manifest:
        """Restore the backup in `folder` into the data directory, which must be new.

        The stack is down afterwards. Secrets are those of the backup; ports, too, where they are
        free. Raises StackError.
        """
        if self.env or (self.data_dir / "postgres").exists():
            raise StackError(
                f"{self.data_dir} has data; a backup is restored into a new data directory "
                "(--data-dir)"
            )
        backup.check(folder)
        with self._lock():
            write_env(self.env_path, read_env(folder / backup.ENV))
            try:
                addresses = self._up_services(time.monotonic() + wait_s)
                return backup.read(folder, data_dir=self.data_dir, addresses=addresses)
            except StackError as error:
                raise StackError(
                    f"{error}\n{self.data_dir} is restored in part: remove it before you try again"
                ) from None
            finally:
                self._supervisor.shut_down()

    def status(self) -> list[ProcessStatus]:
        """List every process of the stack; empty when it is down."""
        return self._supervisor.status()

    def pid(self, name: str) -> int | None:
        """Return the process id of `name` ("worker": the first); None while it does not run.

        Raises StackError if there is no such process.
        """
        return self._find(name).pid

    def start(self, name: str) -> None:
        """Start one process; do not wait until it is ready."""
        self._supervisor.start(self._find(name).name)

    def stop(self, name: str) -> None:
        """Stop one process, SIGTERM first, and wait until it is gone.

        It stays down until `start` or `up`.
        """
        self._supervisor.stop([self._find(name).name])

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """Send one process a signal; if it dies of it, it is started again."""
        pid = self.pid(name)
        if pid is None:
            raise StackError(f"{name} does not run")
        os.kill(pid, signal_number)

    def load_problems(self) -> list[str]:
        """Say of each model that a live worker cannot load why; a sentence of several is one."""
        told = [dict(one.failed or {}).values() for one in self._known_workers() if one.is_live]
        return list(dict.fromkeys(sentence for sentences in told for sentence in sentences))

    def _known_workers(self) -> list[WorkerNow]:
        """List the workers by their rows; none while Postgres does not answer."""
        engine = make_engine(self.env["DATABASE_URL"], pool_size=1)
        try:
            with transaction(engine) as session:
                return workers.now(session, silent_for_s=WORKER_SILENT_AFTER_S)
        except SQLAlchemyError:
            return []
        finally:
            engine.dispose()

    def _stop_workers_that_lack_models(self, programs: Iterable[Program]) -> None:
        """Stop them, so that they start anew: what kept a model from being loaded may be mended."""
        lacking = [one.name for one in self._known_workers() if one.is_live and one.failed]
        names = [
            program.name
            for program in programs
            if (own := program.environment.get("WORKER_NAME"))
            and any(_is_worker_of(own, name) for name in lacking)
        ]
        self._supervisor.stop(names)
        self.restarted += [name for name in names if name not in self.restarted]

    def log_path(self, name: str) -> Path:
        """Return the path of the log of `name`, standard output and error together."""
        return self._supervisor.log_path(self._first_worker() if name == "worker" else name)

    def _up_services(self, deadline: float) -> Addresses:
        """Give supervisord all programs, start the four services and wait until each answers."""
        fleet = self._fleet()
        counts = self._worker_counts(fleet)
        if not self.is_up():
            # Stray processes of a killed supervisord would still hold our ports.
            self._supervisor.shut_down()
        addresses = self._addresses(keep={status.name for status in self.status() if status.pid})
        prepared = services.prepare(self.data_dir, addresses)
        programs = processes.programs(self._process_env(addresses), fleet, workers=counts)
        if problems := processes.problems(programs):
            raise StackError("\n".join(f"settings: {problem}" for problem in problems))
        self.restarted = self._supervisor.run(
            [*(service.program for service in prepared), *programs]
        )
        for service in prepared:
            self._supervisor.start(service.program.name)
        for service in prepared:
            self._wait_until(service.probe, service.program.name, deadline)
        services.create_database(addresses)
        return addresses

    def process_env(self) -> dict[str, str]:
        """Return the variables of all Darkroom processes; each is handed its part of them."""
        return self._process_env(Addresses.from_env(self.env))

    def _process_env(self, addresses: Addresses) -> dict[str, str]:
        own = {"CURVES_FOLDER": str(self.data_dir / "curves"), "FLEET_FILE": str(self.fleet_file)}
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(self.fleet_file.read_bytes()).hexdigest()
            own[processes.FLEET_DIGEST] = digest[:16]
        cache = {"MODEL_CACHE_DIR": str(self.data_dir / "weights")}
        return {**cache, **addresses.env(), **own}

    def _worker_counts(self, fleet: Fleet) -> dict[str, int]:
        """Return how many workers each pool or capacity class gets. Raises StackError."""
        served = processes.pools_served(fleet, self.env)
        pools = {name: fleet.pool_or_retired(name) for name in served}
        said = os.environ.get("WORKER_CLASS") or self.env.get("WORKER_CLASS") or ""
        try:
            return workers_by_class(str(self.workers), pools, said=said)
        except WorkersInvalid as error:
            raise StackError(f"workers: {error}") from None

    def _remembered(self) -> dict[str, str]:
        """Return what the caller says that later calls shall go by, too."""
        told = {}
        if self._fleet_file is not None:
            told["FLEET_FILE"] = str(self._fleet_file)
        for name in ("CHECKPOINT_ROOT", "MODEL_CACHE_DIR"):
            if folder := os.environ.get(name):
                told[name] = str(Path(folder).absolute())
        return told

    def _addresses(self, keep: set[str]) -> Addresses:
        """Return the addresses of the first start, with new ports for those that others use.

        keep: our own running processes, whose ports stay.
        """
        env = self.env
        try:
            addresses = Addresses.from_env(env) if env else Addresses.fresh()
        except KeyError as error:
            raise StackError(
                f"{self.env_path} lacks the line {error.args[0]}; put it back, "
                "or move the file away together with the data"
            ) from None
        addresses = addresses.with_free_ports([name for name in LISTENERS if name not in keep])
        addresses = replace(addresses, extra={**addresses.extra, **self._remembered()})
        write_env(self.env_path, addresses.env())
        return addresses

    def _migrate(self, addresses: Addresses) -> None:
        """Bring the tables and the roles up to date."""
        names = {name.upper() for name in MigrationSettings.model_fields}
        variables = {name: value for name, value in addresses.env().items() if name in names}
        done = subprocess.run(
            [sys.executable, "-m", "migrations"],
            cwd=REPO,
            env={"PATH": os.environ.get("PATH", ""), **variables},
            capture_output=True,
            text=True,
        )
        self.log_path("migrations").write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            raise StackError(f"the migrations fail{self._supervisor.tail('migrations')}")

    def _apply_fleet(self, addresses: Addresses) -> int:
        """Put the fleet file in force; return the number of its revision."""
        content = self._fleet_text()
        engine = make_engine(addresses.env()["DATABASE_URL"], pool_size=1)
        try:
            with transaction(engine) as session:
                revision, _ = revisions.apply(session, content, actor="darkroom up")
                return revision.number
        except SQLAlchemyError as error:
            raise StackError(f"the fleet cannot be put in force: {error}") from None
        finally:
            engine.dispose()

    def _ensure_first_key(self, addresses: Addresses) -> Addresses:
        """Make the first tenant and its key; the key's plaintext is kept in `<data>/env` alone."""
        if addresses.api_key:
            return addresses
        engine = make_engine(addresses.env()["DATABASE_URL"], pool_size=1)
        try:
            with transaction(engine) as session:
                tenant = tenants.by_name(session, FIRST_TENANT)
                tenant = tenant or tenants.create(session, name=FIRST_TENANT)
                pepper = addresses.api_key_pepper
                _, key = api_keys.issue(
                    session, tenant_id=tenant.id, name=FIRST_TENANT, pepper=pepper
                )
        except SQLAlchemyError as error:
            raise StackError(f"the first tenant cannot be made: {error}") from None
        finally:
            engine.dispose()
        addresses = replace(addresses, api_key=key)
        write_env(self.env_path, addresses.env())
        return addresses

    def _wait_ready(self, deadline: float, counts: Mapping[str, int], number: int) -> None:
        """Wait for `/readyz`, and for every worker that we started.

        counts: these, by pool or capacity class. number: of the revision that they must go by.
        """
        by_pool: Counter[str] = Counter()
        for group, count in counts.items():
            by_pool[group.partition(CLASS_MARK)[0]] += count
        last = "the gateway does not answer"

        def probe() -> None:
            nonlocal last
            parts = gateway.get("/readyz").json()["parts"]
            waiting = _unready_parts(parts, by_pool)
            waiting = waiting or _missing_workers(self._known_workers(), by_pool, number)
            if waiting:
                last = "not ready: " + ", ".join(waiting)
                raise ConnectionError(last)

        with httpx.Client(base_url=self.env["DARKROOM_URL"], timeout=5, trust_env=False) as gateway:
            self._wait_until(probe, None, deadline, lambda: last, every_s=0.5)

    def _wait_until(
        self,
        probe: Callable[[], None],
        name: str | None,
        deadline: float,
        reason: Callable[[], str] = lambda: "",
        every_s: float = 0.1,
    ) -> None:
        """Call `probe` until it raises nothing.

        Raises StackError at the deadline, or as soon as a process keeps dying.
        name: the process that matters; None = all of them.
        """
        deaths: dict[str, set[object]] = {}
        while True:
            try:
                return probe()
            except Exception as error:  # noqa: BLE001  a probe may raise any error of its library
                failure = error
            self._count_deaths(deaths, name)
            if time.monotonic() > deadline:
                why = reason() or str(failure)
                tail = self._supervisor.tail(
                    name or (self._first_worker() if "workers" in why else "gateway")
                )
                raise StackError(f"{name or 'the stack'} is not ready in time: {why}{tail}")
            time.sleep(every_s)  # not more often: what we wait for needs the processor

    def _count_deaths(self, deaths: dict[str, set[object]], name: str | None) -> None:
        """Add to `deaths` the starts that are seen of each process, the present one included.

        Raises StackError when one has died too often, or has said that another start would not
        help. name: as for `_wait_until`.
        """
        for status in self.status():
            if name not in (None, status.name):
                continue
            if status.state == "exited" and status.exit_status == EX_CONFIG:
                raise StackError(
                    f"{status.name} cannot start{self._supervisor.last_words(status.name)}"
                )
            starts = deaths.setdefault(status.name, set())
            if status.state in ("running", "starting", "backoff", "fatal"):
                starts.add(status.started_at)
            is_dead = status.state in ("backoff", "fatal")
            num_deaths = len(starts) - (0 if is_dead else 1)
            if num_deaths >= _DEATHS_BEFORE_GIVING_UP or status.state == "fatal":
                raise StackError(f"{status.name} keeps dying{self._supervisor.tail(status.name)}")

    def _find(self, name: str) -> ProcessStatus:
        wanted = self._first_worker() if name == "worker" else name
        by_name = {status.name: status for status in self.status()}
        if wanted not in by_name:
            if not by_name:
                raise StackError("the stack is not running")
            raise StackError(f"no process {name!r}; there are: {', '.join(by_name)}")
        return by_name[wanted]

    def _first_worker(self) -> str:
        """Name the process that "worker" stands for."""
        names = [status.name for status in self.status() if status.name.startswith("worker-")]
        logs = sorted(path.stem for path in self._supervisor.log_dir.glob("worker-*.log"))
        return next(iter([*names, *logs]), "worker-1")

    def _fleet_text(self) -> str:
        path = self.fleet_file
        try:
            return path.read_text()
        except OSError as error:
            raise StackError(f"{path} cannot be read: {error.strerror}") from None

    def _fleet(self) -> Fleet:
        path = self.fleet_file
        try:
            return parse_fleet(self._fleet_text())
        except FleetInvalid as error:
            raise StackError(
                "\n".join(f"{path.name}: {problem}" for problem in error.problems)
            ) from None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock of the data directory: one `up` or `down` at a time."""
        mode = 0o711 if os.geteuid() == 0 else 0o700  # 711: Postgres's account must traverse it
        self.data_dir.mkdir(mode=mode, parents=True, exist_ok=True)
        (self.data_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        with open(self.data_dir / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StackError(
                    f"another command is starting or stopping {self.data_dir}; "
                    "try again when it is done"
                ) from None
            yield


def _is_worker_of(launcher: str, name: str) -> bool:
    """Tell whether the launcher of that name runs the worker, on one of several devices or not."""
    own, _, host = launcher.partition("@")
    prefix, _, other_host = name.partition("@")
    return host == other_host and (prefix == own or prefix.startswith(f"{own}-"))


def _waves(by_name: dict[str, ProcessStatus]) -> list[list[str]]:
    """Group the processes by the order of their stop.

    First those that take in work, then those that finish it, then the services.
    """
    finishing = {"results", "webhooks", "sweeper"}
    written_to = {"postgres", "broker", "handoff", "s3"}
    taking = [name for name in by_name if name not in finishing | written_to]
    return [
        taking,
        [name for name in by_name if name in finishing],
        [name for name in by_name if name in written_to],
    ]


def _unready_parts(parts: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> list[str]:
    """List the parts of an answer of `/readyz` that are not ready, with their details.

    counts: the workers that there should be, by pool.
    """
    waiting = [
        f"{name} ({part.get('detail', 'not ready')})"
        for name, part in parts.items()
        if not part["ready"] and "pools" not in part
    ]
    # Of the workers only the live ones count. What else may be amiss with them, waiting does not
    # mend: a model that cannot be loaded, a warm floor that was not started.
    live: Mapping[str, int] = parts["workers"].get("pools", {})
    short = [
        f"workers of pool {pool} ({live.get(pool, 0)} of {count})"
        for pool, count in counts.items()
        if live.get(pool, 0) < count
    ]
    return waiting or short


def _missing_workers(
    known: Iterable[WorkerNow], counts: Mapping[str, int], number: int
) -> list[str]:
    """List the pools that lack workers; if none does, those that go by another revision.

    By the rows as they are now: what /readyz says may be three seconds old, and a worker that was
    stopped since would still count. counts: the workers that there should be, by pool.
    """
    ready = [one for one in known if one.is_live and one.state != WorkerState.LEAVING]
    by_pool = Counter(one.pool for one in ready)
    short = [
        f"workers of pool {pool} ({by_pool[pool]} of {count})"
        for pool, count in counts.items()
        if by_pool[pool] < count
    ]
    return short or [
        f"{one.name} (goes by revision {one.revision} of the fleet, not by {number})"
        for one in ready
        if one.revision not in (None, number)
    ]
