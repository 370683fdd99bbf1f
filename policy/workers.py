"""Judge workers by what their rows say: who counts as alive, who keeps failing, how long to wait.

A worker's row is there from its start on, before any model is loaded.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from policy.fleet import Pool

# Starts in a row that never got ready, after which they count as a crash loop.
CRASH_LOOP_AFTER = 3
MOST_WORKERS = 64  # processes of one pool on one machine
# Waits before a start, by the number of starts in a row that did not get ready.
START_PAUSES_S = (0.0, 0.0, 2.0, 5.0, 15.0, 30.0, 60.0)
# A device that is lost twice within that time gets no worker until an operator releases it.
LOST_TWICE_WITHIN = timedelta(hours=24)


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


CLASS_MARK = "."  # between the names of a pool and of one of its capacity classes


def class_key(pool: str, capacity_class: str) -> str:
    """Name a capacity class of a pool: "sdxl.spot"; the pool itself for ""."""
    return f"{pool}{CLASS_MARK}{capacity_class}" if capacity_class else pool


@dataclass(frozen=True)
class WorkerTerms:
    """How a worker's device is rented, under the fleet that it goes by.

    gpu_hour_price: None where nobody said.
    """

    capacity_class: str = ""
    market: str | None = None
    gpu_class: str | None = None
    gpu_hour_price: float | None = None


def terms_of(pool: Pool, said: str) -> WorkerTerms:
    """Return the terms of a worker of this pool. said: the class that it was started with."""
    capacity_class = pool.class_of(said)
    own = pool.of_class(capacity_class)
    return WorkerTerms(capacity_class, own.market, own.gpu_class, own.gpu_hour_price)


def is_of_gpu_class(gpu_class: str, device_name: str) -> bool:
    """Tell whether the name of a device has every word of the class.

    "h100 80gb" is a class of "NVIDIA H100 80GB HBM3"; "any" is one of every device.
    """
    if gpu_class == "any":
        return True
    words = re.findall(r"[a-z0-9]+", gpu_class.lower())
    return set(words) <= set(re.findall(r"[a-z0-9]+", device_name.lower()))


def device_label(device_id: str) -> str:
    """Name a device for people, by what CUDA_VISIBLE_DEVICES calls it: an index or a UUID."""
    if device_id.isdigit():
        return f"gpu{device_id}"
    kind, _, uuid = device_id.lower().partition("-")
    is_plain = all(len(part) in (4, 8, 12) for part in uuid.split("-"))
    return f"{kind}-{uuid[:8] if is_plain else uuid.replace('/', '-')}"


def device_key(device_id: str, host: str) -> str:
    """Name a device apart from those of all hosts: by its UUID, or by its index and its host."""
    return f"{device_id}@{host}" if device_id.isdigit() else device_id


def worker_name(pool: str, device: str, host: str) -> str:
    """Name a worker that nobody has named. device: its label."""
    return f"{pool}-{device}@{host}"


def name_on_device(name: str, device: str) -> str:
    """Name the worker on one of several devices of the launcher `name`."""
    prefix, _, host = name.partition("@")
    return f"{prefix}-{device}@{host}"


class WorkersInvalid(ValueError):
    """The wished numbers of workers cannot be understood; the message says what is accepted."""


def workers_by_class(wish: str, pools: Mapping[str, Pool], *, said: str = "") -> dict[str, int]:
    """Read how many workers each pool gets: `2` for each of them, or `edit=2,sdxl.spot=1`.

    A pool that is not named gets one. Returned by `class_key`. said: the class of workers for which
    the wish names none.  Raises WorkersInvalid.
    """
    counts = _numbers(wish, pools)
    found = {}
    for key, number in counts.items():
        pool, _, named = key.partition(CLASS_MARK)
        if number and (problem := class_problem(pools[pool], named or said)):
            raise WorkersInvalid(f"pool {pool!r}: {problem}; {_classes_told(pool, pools[pool])}")
        found[class_key(pool, pools[pool].class_of(named or said))] = number
    return found


def class_problem(pool: Pool, said: str) -> str:
    """Say why a worker of this pool cannot be of the class that it says; "" if it can."""
    if said and said not in pool.classes:
        return f"{said!r} is not one of its capacity classes"
    if not said and len(pool.classes) > 1:
        return "a worker must say of which of its capacity classes it is"
    return ""


def _classes_told(pool: str, shape: Pool) -> str:
    accepted = ", ".join(f"{class_key(pool, name)}=NUMBER" for name in shape.classes)
    return f"accepted: {accepted or f'{pool}=NUMBER'}"


def _numbers(wish: str, pools: Collection[str]) -> dict[str, int]:
    """Read the numbers by pool or POOL.CLASS; a class that is named takes its pool's place."""
    counts = dict.fromkeys(pools, 1)
    for part in (part.strip() for part in wish.split(",")):
        pool, separator, number = part.rpartition("=")
        if not number.isdigit() or int(number) > MOST_WORKERS:
            raise WorkersInvalid(
                f"{part!r} is no number of workers; accepted: 0 to {MOST_WORKERS} for every pool,"
                " or POOL=NUMBER or POOL.CLASS=NUMBER, several with commas"
            )
        if not separator:
            counts = dict.fromkeys(pools, int(number))
        elif (of := pool.partition(CLASS_MARK)[0]) in pools:
            if pool != of:
                counts.pop(of, None)
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
