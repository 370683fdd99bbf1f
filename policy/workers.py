"""Judge workers by what their rows say: who counts as alive, who keeps failing, how long to wait.

A worker's row is there from its start on, before any model is loaded.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

# Starts in a row that never got ready, after which they count as a crash loop.
CRASH_LOOP_AFTER = 3
MOST_WORKERS = 64  # processes of one pool on one machine
# Waits before a start, by the number of starts in a row that did not get ready.
START_PAUSES_S = (0.0, 0.0, 2.0, 5.0, 15.0, 30.0, 60.0)


class WorkerState(StrEnum):
    """The values of `workers.state`."""

    LOADING = "loading"  # it has its name, and loads its models
    READY = "ready"  # it takes jobs
    LEAVING = "leaving"  # it takes no more jobs and ends soon
    FAILED = "failed"  # it can load nothing, and has ended


LIVE = (WorkerState.READY, WorkerState.LEAVING)


@dataclass(frozen=True)
class WorkerNow:
    """A worker as its row tells.

    held: the checkpoints that it serves; None: a worker of an older version, which serves all of
    its pool.  failed: why it does not serve others, by checkpoint.  failed_starts: starts in a row
    before this one that did not get ready.  revision: of the fleet that it goes by; None: of a
    file.
    """

    name: str
    pool: str
    state: str
    is_silent: bool
    failed_starts: int = 0
    held: Collection[str] | None = None
    failed: Mapping[str, str] | None = None
    revision: int | None = None

    @property
    def is_live(self) -> bool:
        """Tell whether it has loaded its models and renews its leases."""
        return self.state in LIVE and not self.is_silent


def keeps_failing(worker: WorkerNow) -> bool:
    """Tell whether this worker does not get ready, however often it is started."""
    if worker.state == WorkerState.FAILED:
        return True
    return worker.state == WorkerState.LOADING and worker.failed_starts >= CRASH_LOOP_AFTER


def pause_before_start_s(failed_starts: int) -> float:
    """Return the wait before a start after so many in a row that did not get ready."""
    return START_PAUSES_S[min(failed_starts, len(START_PAUSES_S) - 1)]


def device_label(device_id: str) -> str:
    """Name a device for people, by what CUDA_VISIBLE_DEVICES calls it: an index or a UUID."""
    if device_id.isdigit():
        return f"gpu{device_id}"
    kind, _, uuid = device_id.lower().partition("-")
    is_plain = all(len(part) in (4, 8, 12) for part in uuid.split("-"))
    return f"{kind}-{uuid[:8] if is_plain else uuid.replace('/', '-')}"


def worker_name(pool: str, device: str, host: str) -> str:
    """Name a worker that nobody has named. device: its label."""
    return f"{pool}-{device}@{host}"


def name_on_device(name: str, device: str) -> str:
    """Name the worker on one of several devices of the launcher `name`."""
    prefix, _, host = name.partition("@")
    return f"{prefix}-{device}@{host}"


class WorkersInvalid(ValueError):
    """The wished numbers of workers cannot be understood; the message says what is accepted."""


def workers_by_pool(wish: str, pools: Collection[str]) -> dict[str, int]:
    """Read how many workers each pool gets: `2` for each of them, or `edit=2,local=0`.

    A pool that is not named gets one. Raises WorkersInvalid.
    """
    counts = dict.fromkeys(pools, 1)
    for part in (part.strip() for part in wish.split(",")):
        pool, separator, number = part.rpartition("=")
        if not number.isdigit() or int(number) > MOST_WORKERS:
            raise WorkersInvalid(
                f"{part!r} is no number of workers; accepted: 0 to {MOST_WORKERS} for every pool,"
                " or POOL=NUMBER, several with commas"
            )
        if not separator:
            counts = dict.fromkeys(pools, int(number))
        elif pool in counts:
            counts[pool] = int(number)
        else:
            raise WorkersInvalid(f"{pool!r} is not a pool; accepted: {', '.join(pools)}")
    return counts


def unheld(workers: Iterable[WorkerNow]) -> dict[str, list[str]]:
    """List by pool the checkpoints that a live worker cannot load and no live one holds."""
    failed: dict[str, set[str]] = {}
    held: dict[str, set[str]] = {}
    for worker in workers:
        if worker.is_live:
            failed.setdefault(worker.pool, set()).update(worker.failed or ())
            held.setdefault(worker.pool, set()).update(worker.held or ())
    return {pool: sorted(names - held[pool]) for pool, names in failed.items()}
