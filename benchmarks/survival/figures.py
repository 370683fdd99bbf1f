"""What survival cost: added latency, steps done again, images rendered twice, and how soon an interrupted job ran again."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from benchmarks.survival.checks import pairs
from benchmarks.survival.ledger import Ledger
from benchmarks.survival.rig import Row

RETURNED = ("preempted", "returned")  # outcomes of attempts that gave the job back in good order
_LOOKS_BACK_S = 1.0  # a fault is noted just before it is done


@dataclass(frozen=True)
class Recoveries:
    """Seconds until an interrupted job ran again."""

    after_kill_s: tuple[float, ...]  # from the fault to the start of the next attempt
    after_notice_s: tuple[float, ...]  # from the return of the lease to the start of the next attempt
    after_loss_s: tuple[float, ...]  # from the sweeper's verdict, whatever the cause, to the start of the next attempt
    after_return_s: tuple[float, ...]  # from the return of the lease, whatever the cause, to the start of the next attempt


def added_latency_s(run: Ledger, reference: Ledger) -> list[float]:
    """Job by job, from accepted to stored: here less there."""
    return sorted(_took_s(job) - _took_s(twin) for job, twin in pairs(run, reference))


def recoveries(run: Ledger) -> Recoveries:
    """From the rows of attempts, and the instants of the faults."""
    kills, notices = ([(done.at, done.fault.target) for done in run.faults if done.fault.kind == kind] for kind in ("kill", "notice"))
    after_kill, after_notice, after_loss, after_return = [], [], [], []
    for attempts in run.attempts.values():
        for ended, following in itertools.pairwise(attempts):
            if ended["outcome"] in RETURNED:
                after_return.append(_seconds(ended["ended_at"], following["started_at"]))
                if _struck(ended, notices) is not None:
                    after_notice.append(after_return[-1])
            if ended["outcome"] == "lease_lost":
                after_loss.append(_seconds(ended["ended_at"], following["started_at"]))
                if (killed_at := _struck(ended, kills)) is not None:
                    after_kill.append(_seconds(killed_at, following["started_at"]))
    return Recoveries(*(tuple(sorted(found)) for found in (after_kill, after_notice, after_loss, after_return)))


def work(run: Ledger) -> dict[str, Any]:
    """Attempts by outcome, steps, and what was done twice. A message that found nothing to do leaves no row and is not counted.

    steps_lost is None where the house does not record it.
    """
    attempts = [attempt for rows in run.attempts.values() for attempt in rows]
    handed_off = [count for counts in run.hand_offs.values() for count in counts.values()]
    figures: dict[str, Any] = {
        "attempts": dict(Counter(str(attempt["outcome"]) for attempt in attempts)),
        "images_rendered": sum(handed_off),
        "images_rendered_twice": sum(handed_off) - len(handed_off),
        "steps_of_rendered_images": sum(attempt["steps"] for attempt in attempts),
        "device_s_wasted": _sums(attempts, "waste_class", "device_seconds"),
        "steps_lost": None,
        "steps_resumed": None,
    }
    if attempts and "lost_steps" in attempts[0]:
        figures["steps_lost"] = _sums(attempts, "lost_cause", "lost_steps")
        figures["steps_resumed"] = sum(attempt["resumed_steps"] for attempt in attempts)
        figures["snapshot_mib"] = {
            store: round(size / 2**20, 2) for store, size in _sums(attempts, "snapshot_store", "snapshot_bytes").items()
        }
    return figures


def _sums(attempts: Iterable[Row], by: str, column: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for attempt in attempts:
        if attempt[by] and attempt[column]:
            key = str(attempt[by])
            sums[key] = sums.get(key, 0) + attempt[column]
    return {key: round(value, 2) for key, value in sorted(sums.items())}


def _struck(attempt: Row, faults: Sequence[tuple[datetime, str]]) -> datetime | None:
    """The fault that hit the attempt's worker while it ran, if one did: the last before the attempt was over."""
    process = str(attempt["worker"]).partition("@")[0]
    hits = [
        at
        for at, target in faults
        if target == process and _seconds(attempt["started_at"], at) > -_LOOKS_BACK_S and _seconds(at, attempt["ended_at"]) > 0
    ]
    return max(hits, default=None)


def _took_s(job: Row) -> float:
    return _seconds(job["accepted_at"], job["finished_at"])


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
