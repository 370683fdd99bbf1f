"""Tell processes of this machine apart, also over time: is the one that had a name really gone?

A process id alone does not do, for the kernel gives it to another process later, and in another
container to another one at the same time. Reads Linux's /proc; elsewhere nothing is known.
"""

import os
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19  # of /proc/PID/stat, counted behind the name, which may hold blanks
_STATE = 0


def process_key(pid: int) -> str:
    """Return what tells this process from all others; "" if it does not run, or nobody knows."""
    space = _space()
    started = _started(pid) if space else ""
    return f"{space}:{pid}:{started}" if started else ""


def is_gone(key: str) -> bool:
    """Tell whether the process with this key is known not to run any more.

    False for one of another machine, boot or container: it may run.
    """
    space, _, rest = key.partition(":")
    pid, _, started = rest.partition(":")
    if not space or space != _space() or not pid.isdigit():
        return False
    return _started(int(pid)) != started and not _is_hidden(int(pid))


def is_running(key: str) -> bool:
    """Tell whether the process with this key is known to run."""
    space, _, rest = key.partition(":")
    pid = rest.partition(":")[0]
    return bool(space) and pid.isdigit() and process_key(int(pid)) == key


def age_s() -> float:
    """Return the seconds since this process started; 0 where nobody knows."""
    try:
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, up_s - int(_started(os.getpid())) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError):
        return 0.0


def _is_hidden(pid: int) -> bool:
    """Tell whether a process runs of which /proc shows nothing to us."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except OSError:
        return False
    return False


@cache
def _space() -> str:
    """Name the boot and the space of process ids that this process lives in."""
    try:
        boot = _BOOT_ID.read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when the process started, in the kernel's ticks; "" if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    is_over = fields[_STATE] in ("Z", "X")
    return "" if is_over else fields[_START_TIME]
