"""Restart every worker once, in order, while others keep working; and keep them all busy."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

from benchmarks.lib.integrity.probe import StackProbe, wait_until
from benchmarks.lib.integrity.records import count_active
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import PlannedJob
from benchmarks.lib.progress import log_progress
from fleet.stack import ProcessStatus

SLOTS = 2  # a worker's; two dozen of them fill what Postgres has of connections
LOADED_AFTER = 12  # times that jobs are asked for before the first signal
BACK_WITHIN_S = 900


class Rollout(threading.Thread):
    """Restarts every worker once, in order.

    `restarted`: how many, when all are back. `error`: what ended it early.
    """

    def __init__(self, probe: StackProbe, *, gap_s: float, away_share: float) -> None:
        super().__init__(name="rollout", daemon=True)
        self.restarted = 0
        self.error: BaseException | None = None
        self._probe = probe
        self._gap_s = gap_s
        self._most_away = max(1, int(away_share * len(probe.workers)))
        self._old_pids: dict[str, int | None] = {}

    def run(self) -> None:
        """Send SIGTERM to one worker after the other; wait for their successors."""
        try:
            for name in self._probe.workers:
                self._wait_for(self._most_away - 1)
                log_progress(f"SIGTERM {name}")
                self._old_pids[name] = self._probe.stack.pid(name)
                self._probe.stack.kill(name, signal.SIGTERM)
                time.sleep(self._gap_s)
            self._wait_for(0)
            self.restarted = len(self._old_pids)
        except BaseException as error:  # noqa: BLE001  told by the main thread
            self.error = error

    def _wait_for(self, most: int) -> None:
        """Return when at most so many are away."""
        if not wait_until(lambda: len(self._away()) <= most, BACK_WITHIN_S, every_s=1):
            raise TimeoutError(f"{', '.join(self._away())} did not come back")

    def _away(self) -> list[str]:
        """List the workers that were told to go and whose successors have not yet signed on."""
        rows = self._probe.sql("SELECT name, seen_at FROM workers")
        seen_at = {row["name"]: row["seen_at"] for row in rows}
        now = {status.name: status for status in self._probe.stack.status()}
        return [
            name
            for name, pid in self._old_pids.items()
            if not _is_back(now[name], pid, seen_at.get(self._probe.worker_name(name)))
        ]


def _is_back(status: ProcessStatus, old_pid: int | None, seen_at: datetime | None) -> bool:
    """Tell whether a new process runs and has signed on.

    supervisord tells its start in whole seconds, rounded down.
    """
    if status.pid in (None, old_pid) or status.started_at is None or seen_at is None:
        return False
    return seen_at > status.started_at + timedelta(seconds=1)


def keep_busy(
    probe: StackProbe,
    submitter: Submitter,
    jobs: Iterator[PlannedJob],
    rollout: Rollout,
    *,
    busy: float,
) -> None:
    """Ask for so many jobs a slot, and for another whenever one has ended, until it is over."""
    enough = int(busy * SLOTS * len(probe.workers))

    def top_up() -> None:
        unanswered = sum(each.heard == "nothing" for each in list(submitter.submissions.values()))
        missing = enough - unanswered - count_active(probe, submitter)
        for planned in itertools.islice(jobs, max(0, missing)):
            submitter.submit(planned)
        time.sleep(0.25)

    for _ in range(LOADED_AFTER):
        top_up()
    rollout.start()
    while rollout.is_alive():
        top_up()
