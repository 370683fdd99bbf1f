"""Preemption, as a worker hears of it: a file says when its machine goes, and then it goes."""

import contextlib
import os
import signal

from benchmarks.lib.integrity.probe import StackProbe


def announce(probe: StackProbe, process: str, within_s: float) -> None:
    """Tell a worker that its machine goes in so many seconds."""
    path = probe.notice_path(process)
    assert path is not None, "workers hear no notices"
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(f"{within_s:g}")
    aside.replace(path)


def take_away(probe: StackProbe, process: str, pid: int | None) -> None:
    """Take the machine away: kill what still runs there.

    The worker that comes next has heard nothing.
    """
    path = probe.notice_path(process)
    assert path is not None
    path.unlink(missing_ok=True)
    if pid is not None and probe.stack.pid(process) == pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
