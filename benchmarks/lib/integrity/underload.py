"""Work under load: jobs keep coming while a thread does things to the stack."""

import itertools
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator

from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.records import RunRecords, count_active, records_at_the_end
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import PlannedJob
from benchmarks.lib.progress import log_progress

EVERY_S = 0.25


class Disturbance(threading.Thread):
    """Does things to a stack in a thread of its own. error: what ended it early."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do all of it."""
        try:
            self.act()
        except BaseException as error:  # noqa: BLE001  told by the thread that makes the load
            self.error = error

    @abstractmethod
    def act(self) -> None:
        """Do all of it. What is raised ends it."""


def run_under_load(
    probe: StackProbe,
    submitter: Submitter,
    jobs: Iterable[PlannedJob],
    disturbance: Disturbance,
    *,
    in_hand: int,
    lead_s: float = 0.0,
) -> RunRecords:
    """Have so many jobs in hand until the disturbance is over; return what became of them.

    lead_s: how long jobs come before it begins.
    """
    endless = iter(jobs)
    try:
        begins_at = time.monotonic() + lead_s
        while time.monotonic() < begins_at:
            _top_up(probe, submitter, endless, in_hand)
        disturbance.start()
        while disturbance.is_alive():
            _top_up(probe, submitter, endless, in_hand)
        submitter.settle()
    except BaseException:
        submitter.give_up()
        raise
    if disturbance.error is not None:
        log_progress(f"{disturbance.name} ended early: {disturbance.error!r}")
    return records_at_the_end(probe, submitter)


def _top_up(
    probe: StackProbe, submitter: Submitter, jobs: Iterator[PlannedJob], in_hand: int
) -> None:
    unanswered = sum(each.heard == "nothing" for each in list(submitter.submissions.values()))
    missing = in_hand - unanswered - count_active(probe, submitter)
    for planned in itertools.islice(jobs, max(0, missing)):
        submitter.submit(planned)
    time.sleep(EVERY_S)
