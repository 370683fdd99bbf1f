"""Start a stack in a temporary folder, and stop it whatever happens.

with temporary_folder() as folder, running_stack(folder) as stack:
    client = Client(stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"])
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.lib.progress import log_progress
from fleet.stack import Stack

GATEWAY_ONLY = ("worker-1", "results", "flower")
"""What to leave out where only the gateway is measured: jobs are accepted, and wait."""


@contextlib.contextmanager
def temporary_folder(keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Make a folder that is gone afterwards. keep: asked in the end, whether it shall stay."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-bench-"))
    folder.chmod(0o711)  # Postgres, of another account when we are root, passes through
    try:
        yield folder
    finally:
        if keep():
            log_progress(f"the data are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, which a stack hands on to its own; put them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def running_stack(
    folder: Path,
    *,
    fleet_file: Path | None = None,
    workers: int | str = 1,
    without: Sequence[str] = (),
    wait_s: float = 120,
    kind: type[Stack] = Stack,
) -> Iterator[Stack]:
    """Start a stack with its data below `folder`; stop it.

    fleet_file: of the repository by default.  without: processes that are stopped again once all
    are ready.  kind: of stack.
    """
    stack = kind(folder / "data", fleet_file=fleet_file, workers=workers)
    with _stopped_by_sigterm(stack.down):
        stack.up(wait_s=wait_s, on_stage=log_progress)
        for name in without:
            stack.stop(name)
        yield stack


@contextlib.contextmanager
def running_services(folder: Path) -> Iterator[dict[str, str]]:
    """Start Postgres, both Redis and the object store of a stack, and nothing of Darkroom itself.

    Yields the stack's variables. The database has been migrated, for the roles.
    """
    stack = Stack(folder / "data")
    with _stopped_by_sigterm(stack.down):
        with stack._lock():
            stack._migrate(stack._up_services(time.monotonic() + 60))
        yield stack.env


@contextlib.contextmanager
def _stopped_by_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the end, and when SIGTERM comes: a time limit still ends the stack.

    `timeout` sends the signal twice, so it is ignored while the stack is being stopped.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop()
        signal.signal(signal.SIGTERM, before)
