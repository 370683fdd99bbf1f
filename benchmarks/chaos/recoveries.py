"""What faults cost: added latency, and how soon an interrupted job ran again."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from benchmarks.chaos.faults import FaultDone
from benchmarks.lib.integrity.checks import pairs
from benchmarks.lib.integrity.figures import RETURNED
from benchmarks.lib.integrity.probe import Row
from benchmarks.lib.integrity.records import RunRecords

_LOOKS_BACK_S = 1.0  # a fault is noted just before it is done


@dataclass(frozen=True)
class Recoveries:
    """Seconds until the next attempt of an interrupted job started, sorted."""

    after_kill_s: tuple[float, ...]  # from the fault
    after_notice_s: tuple[float, ...]  # from the return of the lease
    after_loss_s: tuple[float, ...]  # from the sweeper's verdict, whatever the cause
    after_return_s: tuple[float, ...]  # from the return of the lease, whatever the cause


def added_latency_s(run: RunRecords, reference: RunRecords) -> list[float]:
    """Return, job by job, seconds from accepted to stored: here less there."""
    return sorted(_took_s(job) - _took_s(twin) for job, twin in pairs(run, reference))


def recoveries(
    run: RunRecords, faults: Sequence[FaultDone], process_of: Callable[[str], str]
) -> Recoveries:
    """Work out recoveries from the rows of attempts and the instants of the faults.

    process_of: names the process, as faults do, of a worker.
    """
    kills = _hits(faults, "kill")
    notices = _hits(faults, "notice")
    after_kill: list[float] = []
    after_notice: list[float] = []
    after_loss: list[float] = []
    after_return: list[float] = []
    for attempts in run.attempts.values():
        for ended, following in itertools.pairwise(attempts):
            process = process_of(str(ended["worker"]))
            gap_s = _seconds(ended["ended_at"], following["started_at"])
            if ended["outcome"] in RETURNED:
                after_return.append(gap_s)
                if _last_hit(ended, process, notices) is not None:
                    after_notice.append(gap_s)
            if ended["outcome"] == "lease_lost":
                after_loss.append(gap_s)
                if (killed_at := _last_hit(ended, process, kills)) is not None:
                    after_kill.append(_seconds(killed_at, following["started_at"]))
    return Recoveries(
        after_kill_s=tuple(sorted(after_kill)),
        after_notice_s=tuple(sorted(after_notice)),
        after_loss_s=tuple(sorted(after_loss)),
        after_return_s=tuple(sorted(after_return)),
    )


def _hits(faults: Sequence[FaultDone], kind: str) -> list[tuple[datetime, str]]:
    """Return the instants and targets of the faults of one kind."""
    return [(done.at, done.fault.target) for done in faults if done.fault.kind == kind]


def _last_hit(
    attempt: Row, process: str, faults: Sequence[tuple[datetime, str]]
) -> datetime | None:
    """Return when a fault last hit the attempt's process while it ran; None if none did."""
    hits = [
        at
        for at, target in faults
        if target == process
        and _seconds(attempt["started_at"], at) > -_LOOKS_BACK_S
        and _seconds(at, attempt["ended_at"]) > 0
    ]
    return max(hits, default=None)


def _took_s(job: Row) -> float:
    return _seconds(job["accepted_at"], job["finished_at"])


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
