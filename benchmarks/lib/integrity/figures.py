"""What a run cost: attempts, denoise steps, and what was done twice."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.lib.integrity.checks import Check
from benchmarks.lib.integrity.probe import Row
from benchmarks.lib.integrity.records import RunRecords

RETURNED = ("preempted", "returned")  # outcomes of attempts that gave the job back in good order


def loss_figures(run: RunRecords, checks: Sequence[Check]) -> dict[str, int]:
    """Count the jobs, and what came to harm."""
    return {
        "jobs": len(run.jobs),
        "lost": len(run.jobs) - len(run.succeeded()) + run.lost(),
        "doubled": run.doubled(),
        "wrong": sum(len(check.violations) for check in checks),
    }


def work_figures(run: RunRecords) -> dict[str, Any]:
    """Count attempts by outcome, steps, and what was done twice.

    A message that found nothing to do leaves no row and is not counted. steps_lost is None where
    it is not recorded.
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
            store: round(size / 2**20, 2)
            for store, size in _sums(attempts, "snapshot_store", "snapshot_bytes").items()
        }
    return figures


def _sums(attempts: Iterable[Row], by: str, column: str) -> dict[str, float]:
    """Sum up a column by the value of another; empty values are left out."""
    sums: dict[str, float] = {}
    for attempt in attempts:
        if attempt[by] and attempt[column]:
            key = str(attempt[by])
            sums[key] = sums.get(key, 0) + attempt[column]
    return {key: round(value, 2) for key, value in sorted(sums.items())}
