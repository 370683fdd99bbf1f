"""End workers one after the other, in one way or another, while others keep working."""

import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial

from benchmarks.lib.integrity.notices import announce, take_away
from benchmarks.lib.integrity.probe import StackProbe, wait_until
from benchmarks.lib.integrity.underload import Disturbance
from benchmarks.lib.progress import log_progress
from policy.workers import WorkerState

BACK_WITHIN_S = 900
AT_WORK_WITHIN_S = 3.0  # a worker that holds no job by then is ended all the same
NOTICE_S = 5.0


class Ending(StrEnum):
    """How a worker is ended."""

    KILL = "SIGKILL"
    TERMINATE = "SIGTERM"
    NOTICE = "preemption"  # it is told, and killed when the time is over


@dataclass(frozen=True)
class Turn:
    """One worker's turn. process: its name in the stack."""

    process: str
    ending: Ending = Ending.TERMINATE


@dataclass(frozen=True)
class EndedWorker:
    """A worker that was told to end, or killed, at some moment."""

    worker: str
    ending: Ending
    at: datetime


class Rollout(Disturbance):
    """Gives every worker its turn, in order, and waits for its successor.

    `ended`: who was. `restarted`: how many, when all are back.
    """

    def __init__(
        self, probe: StackProbe, turns: Sequence[Turn], *, gap_s: float, most_away: int
    ) -> None:
        """Know the turns. gap_s: between two.  most_away: workers that are away at a time."""
        super().__init__("rollout")
        self.ended: list[EndedWorker] = []
        self.restarted = 0
        self._probe = probe
        self._turns = turns
        self._gap_s = gap_s
        self._most_away = most_away
        self._old: dict[str, uuid.UUID] = {}  # instances that were ended, by the worker's name

    def act(self) -> None:
        """Give every worker its turn."""
        for turn in self._turns:
            self._wait_for(self._most_away - 1)
            log_progress(f"{turn.ending} {turn.process}")
            worker = self._probe.worker_name(turn.process)
            self._old[worker] = self._instances()[worker]
            wait_until(partial(self._is_at_work, worker), AT_WORK_WITHIN_S, every_s=0.1)
            self.ended.append(EndedWorker(worker, turn.ending, datetime.now(UTC)))
            self._end(turn)
            time.sleep(self._gap_s)
        self._wait_for(0)
        self.restarted = len(self.ended)

    def _end(self, turn: Turn) -> None:
        if turn.ending is not Ending.NOTICE:
            number = signal.SIGKILL if turn.ending is Ending.KILL else signal.SIGTERM
            self._probe.stack.kill(turn.process, number)
            return
        pid = self._probe.stack.pid(turn.process)
        announce(self._probe, turn.process, NOTICE_S)
        wait_until(lambda: self._probe.stack.pid(turn.process) != pid, NOTICE_S)
        take_away(self._probe, turn.process, pid)

    def _wait_for(self, most: int) -> None:
        """Return when at most so many are away."""
        if not wait_until(lambda: len(self._away()) <= most, BACK_WITHIN_S, every_s=0.5):
            raise TimeoutError(f"{', '.join(self._away())} did not come back")

    def _away(self) -> list[str]:
        """List the workers that were ended and whose successors take no jobs yet."""
        ready = self._instances()
        return [name for name, old in self._old.items() if ready.get(name, old) == old]

    def _is_at_work(self, worker: str) -> bool:
        query = "SELECT 1 FROM jobs WHERE worker = :worker AND state = 'running' LIMIT 1"
        return bool(self._probe.sql(query, worker=worker))

    def _instances(self) -> dict[str, uuid.UUID]:
        """Return the process that each worker is, of those that take jobs."""
        query = "SELECT name, instance FROM workers WHERE state = :state"
        rows = self._probe.sql(query, state=WorkerState.READY)
        return {row["name"]: row["instance"] for row in rows}
