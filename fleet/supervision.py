"""Keep processes alive: a supervisord of the stack's own, controlled over its unix socket.

Knows processes, not what they are for. supervisord restarts what dies (with a back-off), writes one
log per process and, when it is itself told to end, stops everything in the order of
`Program.priority`, the highest first.
"""

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from fleet.errors import StackError

# In the environment of every process of a stack, to find those that outlive a killed supervisord.
MARK = "DARKROOM_STACK"
_INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
_INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "HF_", "OMP_", "MKL_", "HIP_", "ROCR_")
# The kernel allows 107 bytes, and supervisord adds a suffix of its own while it binds.
_LONGEST_SOCKET_PATH = 90


@dataclass(frozen=True, kw_only=True)
class Program:
    """Describe one process to keep alive."""

    name: str
    command: Sequence[str]
    directory: Path
    # All that it gets beside _INHERITED.
    environment: Mapping[str, str] = field(default_factory=dict)
    priority: int  # of stopping, the highest first; starts are in no order of supervisord's
    stop_signal: str = "TERM"
    stop_wait_s: int = 15  # patience between the stop signal and SIGKILL
    # Exit statuses by which it says that another start would not help; others start it again.
    final_statuses: Sequence[int] = ()
    user: str | None = None


@dataclass(frozen=True)
class ProcessStatus:
    """Tell what one process is doing.

    state: running, starting, backoff (died; waits to be started again), stopping, stopped, exited,
    fatal.
    """

    name: str
    state: str
    pid: int | None
    started_at: datetime | None
    log_path: Path
    detail: str
    exit_status: int | None = None  # of one that has exited


class Supervisor:
    """Control the supervisord of one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log_dir = data_dir / "logs"
        self._config = data_dir / "supervisord.conf"
        self._pid_file = data_dir / "supervisord.pid"
        self._socket = _socket_path(data_dir)
        self._child: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        """Tell whether supervisord answers."""
        with self._rpc() as rpc:
            try:
                return bool(rpc.getState()["statename"] == "RUNNING")
            except (OSError, HTTPException, xmlrpc.client.Error):
                return False

    def run(self, programs: Sequence[Program]) -> list[str]:
        """Give supervisord exactly these `programs`; start supervisord if need be.

        New and changed programs are left stopped. Returns the names of the changed ones.
        """
        self._write_config(programs)
        if not self.is_alive():
            self._launch()
            return []
        with self._rpc() as rpc:
            added, changed, removed = rpc.reloadConfig()[0]
            # All at once: each may take its time to finish what it has.
            self.stop([*changed, *removed])
            for name in [*changed, *removed]:
                rpc.removeProcessGroup(name)
            for name in [*added, *changed]:
                rpc.addProcessGroup(name)
            return list(changed)

    def start(self, name: str) -> None:
        """Start one process if it does not run; do not wait until it is ready."""
        with self._rpc() as rpc:
            try:
                rpc.startProcess(name, False)
            except xmlrpc.client.Fault as fault:
                why = fault.faultString
                if not why.startswith("ALREADY_STARTED"):
                    raise StackError(f"{name} does not start: {why}{self.tail(name)}") from None

    def stop(self, names: Iterable[str]) -> None:
        """Stop these processes, all at once, and wait until the last is gone."""
        waiting = set(names)
        with self._rpc() as rpc:
            for name in waiting:
                _forgive(rpc.stopProcess, name, False)
            while waiting & {
                status.name
                for status in self.status()
                if status.state in ("running", "starting", "backoff", "stopping")
            }:
                time.sleep(0.05)

    def status(self) -> list[ProcessStatus]:
        """List every process supervisord knows; empty when there is no supervisord."""
        with self._rpc() as rpc:
            try:
                return [self._to_status(info) for info in rpc.getAllProcessInfo()]
            except (OSError, HTTPException, xmlrpc.client.Error):  # not there, or on its way out
                return []

    def shut_down(self) -> None:
        """End supervisord and all that it runs; then end what outlived a killed supervisord."""
        supervisord = self._process()
        if supervisord:
            with contextlib.suppress(psutil.NoSuchProcess):
                supervisord.send_signal(signal.SIGTERM)
                _wait_gone(supervisord)
        if self._child:
            self._child.wait()
            self._child = None
        for path in (self._pid_file, self._socket):
            path.unlink(missing_ok=True)
        if self._socket.parent != self.data_dir and self._socket.parent.exists():
            self._socket.parent.rmdir()
        self.end_strays()

    def end_strays(self) -> None:
        """End processes that have our mark and no supervisord: SIGTERM first, then SIGKILL."""
        strays = list(_marked(str(self.data_dir)))
        for stray in strays:
            _forgive(stray.terminate)
        _, stubborn = psutil.wait_procs(strays, timeout=10)
        for stray in stubborn:
            _forgive(stray.kill)
        psutil.wait_procs(stubborn, timeout=10)

    def log_path(self, name: str) -> Path:
        """Return the path of a process's log."""
        return self.log_dir / f"{name}.log"

    def tail(self, name: str, num_lines: int = 15) -> str:
        """Return the end of a process's log, ready to be appended to an error message."""
        path = self.log_path(name)
        lines = path.read_text(errors="replace").splitlines()[-num_lines:] if path.exists() else []
        return "".join(f"\n  {name} | {line}" for line in lines)

    def last_words(self, name: str) -> str:
        """Return the last plain lines of a process's log, those that are no log events.

        By these a process says why it cannot start. Ready to be appended to an error message.
        """
        path = self.log_path(name)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        words: list[str] = []
        for line in reversed(lines[-50:]):
            if line.startswith("{"):
                break
            words.insert(0, line)
        return "".join(f"\n  {name} | {line}" for line in words) or self.tail(name)

    def _launch(self) -> None:
        """Start supervisord in a session of its own, so that no Ctrl-C meant for us reaches it."""
        _make_private(self._socket.parent)
        module = [sys.executable, "-m", "supervisor.supervisord"]
        with open(self.log_path("supervisord"), "ab") as log:
            self._child = subprocess.Popen(
                [*module, "--nodaemon", "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_dir,
                env={**_inherited(), MARK: str(self.data_dir)},
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while not self.is_alive():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise StackError(f"supervisord does not start{self.tail('supervisord')}")
            time.sleep(0.05)

    def _process(self) -> psutil.Process | None:
        """Find the supervisord of our pid file; None unless that process is really ours."""
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            return process if str(self._config) in process.cmdline() else None
        except (OSError, ValueError, psutil.Error):
            return None

    @contextlib.contextmanager
    def _rpc(self) -> Iterator[Any]:
        transport = SupervisorTransport(serverurl=f"unix://{self._socket}")
        try:
            yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
        finally:
            transport.close()

    def _to_status(self, info: dict[str, Any]) -> ProcessStatus:
        state = str(info["statename"]).lower()
        return ProcessStatus(
            name=info["name"],
            state=state,
            pid=info["pid"] or None,
            started_at=datetime.fromtimestamp(info["start"], UTC) if info["start"] else None,
            log_path=self.log_path(info["name"]),
            detail=info["spawnerr"] or info["description"],
            exit_status=info["exitstatus"] if state == "exited" else None,
        )

    def _write_config(self, programs: Sequence[Program]) -> None:
        self.log_dir.mkdir(mode=0o700, exist_ok=True)
        sections = self._own_sections()
        sections |= {f"program:{program.name}": self._section(program) for program in programs}
        text = _ini(sections)
        self._config.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(self._config, flags, 0o600), "w") as file:  # it holds passwords
            file.write(text)

    def _own_sections(self) -> dict[str, dict[str, object]]:
        return {
            "unix_http_server": {"file": self._socket, "chmod": "0700"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
            "supervisord": {
                "logfile": "/dev/null",  # logs/supervisord.log is its standard output
                "logfile_maxbytes": "0",
                "pidfile": self._pid_file,
                "childlogdir": self.log_dir,
                **({"user": "root"} if os.geteuid() == 0 else {}),  # or it warns of running as root
            },
        }

    def _section(self, program: Program) -> dict[str, object]:
        return {
            "command": shlex.join(program.command),
            "directory": program.directory,
            "environment": _environment(program),
            "priority": program.priority,
            "autostart": "false",  # the stack starts services first, and waits until they answer
            "autorestart": "unexpected" if program.final_statuses else "true",
            "exitcodes": ",".join(map(str, program.final_statuses)) or "0",
            "startsecs": 1,
            "startretries": 100,  # after 1 s, 2 s, 3 s … so it gives up after an hour and a half
            "stopsignal": program.stop_signal,
            "stopwaitsecs": program.stop_wait_s,
            # Only SIGKILL goes to the whole group: the leader itself passes a stop signal on.
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": self.log_path(program.name),
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": 1,
            **({"user": program.user} if program.user else {}),
        }


def _environment(program: Program) -> str:
    """List the program's variables. Raises StackError for a value with a double quote."""
    for value in program.environment.values():
        if '"' in value:
            raise StackError(
                f"{program.name}: a variable with a double quote in it cannot be handed on "
                f'("{value[:3]}…")'
            )
    return ",".join(f'{name}="{value}"' for name, value in program.environment.items())


def _ini(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Write the sections in supervisord's ini dialect, with a blank line between them."""
    texts = []
    for title, options in sections.items():
        lines = [f"[{title}]", *(f"{key}={_quoted(str(value))}" for key, value in options.items())]
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def _quoted(value: str) -> str:
    """Quote for supervisord's ini dialect, where % expands and " ;" or " #" opens a comment."""
    if "\n" in value or " ;" in value or " #" in value:
        raise StackError(
            f"supervisord's configuration cannot hold {value!r}; "
            "move the data directory to a plainer path"
        )
    return value.replace("%", "%%")


def _socket_path(data_dir: Path) -> Path:
    """Choose the socket's path: in the data directory, or in the temporary one if that is too deep.

    A unix socket's path must be short.
    """
    inside = data_dir / "supervisord.sock"
    if len(str(inside)) <= _LONGEST_SOCKET_PATH:
        return inside
    digest = hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"darkroom-{os.geteuid()}-{digest}" / "supervisord.sock"


def _make_private(folder: Path) -> None:
    """Make the socket's folder private: whoever can enter it controls supervisord.

    Raises StackError if the folder belongs to somebody else.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise StackError(f"{folder} belongs to somebody else; remove it or set TMPDIR")


def _inherited() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }


def _marked(data_dir: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == data_dir and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _wait_gone(process: psutil.Process, timeout_s: float = 150) -> None:
    """Wait until a process, our child or not, has ended (or is a zombie).

    Kills it after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.05)


def _forgive(action: Any, *arguments: object) -> None:
    """Call `action`; ignore that the process does not run any more."""
    with contextlib.suppress(xmlrpc.client.Fault, psutil.NoSuchProcess):
        action(*arguments)
