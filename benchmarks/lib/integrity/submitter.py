"""Tenants who ask over REST while things break, and who know afterwards what they were told.

An answer of 202 is a promise; a refused connection is a no; anything else is neither: then the
tenant's own list is looked through for the prompt before it is asked again, for the row may have
been committed and only the answer lost.
"""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.workload import TENANTS, PlannedJob
from benchmarks.lib.progress import log_progress
from darkroom_client import Client, Job
from darkroom_client.errors import DarkroomError, ProblemError, Unreachable

_PATIENCE_S = 240
_PAUSE_S = 0.5
_SETTLES_IN_S = 1.0  # an unanswered request may be about to commit
_AT_ONCE = 16
_PAGES = 3
_PAGE = 100  # jobs


@dataclass
class Submission:
    """What became of one planned job, as its tenant knows it."""

    planned: PlannedJob
    job_id: str | None = None
    # accepted: 202. found: in the list, after an unknown outcome. refused. nothing: it gave up
    heard: str = "nothing"
    unknown: int = 0  # times that the outcome was unknown
    unavailable: int = 0  # times that the answer was 503
    retries: int = 0
    cancel: str | None = None  # canceled: so it was answered. late: it had ended. unanswered


class Submitter:
    """The tenants of one run. Their jobs are told from those of other runs by the tenants' ids."""

    def __init__(self, probe: StackProbe, label: str) -> None:
        self.label = label
        self.tenant_ids: list[str] = []
        self._clients: list[Client] = []
        for number in range(TENANTS):
            tenant_id, client = probe.new_tenant(f"{label} {number}")
            self.tenant_ids.append(tenant_id)
            self._clients.append(client)
        self.submissions: dict[str, Submission] = {}
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="submitter")
        self._cancels: list[threading.Timer] = []
        self._lock = threading.Lock()
        self._is_given_up = threading.Event()

    def submit(self, planned: PlannedJob) -> None:
        """Ask for a job in the background, until it is known what became of it."""
        submission = Submission(planned)
        self.submissions[planned.marker] = submission
        self._pool.submit(self._submit, submission)

    def submit_in_time(self, jobs: Iterable[PlannedJob]) -> None:
        """Ask for each at its instant, whatever became of those before.

        Returns when every outcome is known.
        """
        started_at = time.monotonic()
        for planned in jobs:
            time.sleep(max(0.0, started_at + planned.at_s - time.monotonic()))
            self.submit(planned)
        self.settle()

    def settle(self) -> None:
        """Wait until nothing that was asked, cancels included, is without an answer."""
        self._pool.shutdown(wait=True)
        for timer in self._cancels:
            timer.join()
        for client in self._clients:
            client.close()

    def give_up(self) -> None:
        """Ask for nothing more: the run is broken off."""
        self._is_given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for timer in self._cancels:
            timer.cancel()

    def _is_patient(self, deadline: float) -> bool:
        return time.monotonic() < deadline and not self._is_given_up.is_set()

    def _submit(self, submission: Submission) -> None:
        planned = submission.planned
        client = self._clients[planned.tenant]
        deadline = time.monotonic() + _PATIENCE_S
        while submission.job_id is None and self._is_patient(deadline):
            try:
                submission.job_id = client.create_job(**planned.parameters).id
                submission.heard = "accepted"
            except DarkroomError as error:
                if _is_refused(error):
                    submission.heard = "refused"
                    log_progress(f"{planned.marker} is refused: {error}")
                    return
                submission.retries += 1
                submission.unavailable += isinstance(error, ProblemError) and error.status == 503
                time.sleep(_PAUSE_S)
                if not _is_not_accepted(error):
                    submission.unknown += 1
                    self._look_up(client, submission, deadline)
        if submission.job_id is not None and planned.cancel_after_s is not None:
            timer = threading.Timer(planned.cancel_after_s, self._cancel, (client, submission))
            with self._lock:
                self._cancels.append(timer)
            timer.start()

    def _look_up(self, client: Client, submission: Submission, deadline: float) -> None:
        """Find the job in its tenant's list, newest first; asks until the list is answered."""
        time.sleep(_SETTLES_IN_S)
        while self._is_patient(deadline):
            try:
                for number, job in enumerate(client.jobs(page_size=_PAGE)):
                    if job.prompt == submission.planned.parameters["prompt"]:
                        submission.job_id = job.id
                        submission.heard = "found"
                        return
                    if number >= _PAGES * _PAGE:
                        return
                return
            except DarkroomError:
                time.sleep(_PAUSE_S)

    def _cancel(self, client: Client, submission: Submission) -> None:
        """Cancel a job, again and again until there is an answer: that is harmless."""
        assert submission.job_id is not None
        submission.cancel = "unanswered"
        deadline = time.monotonic() + _PATIENCE_S
        while self._is_patient(deadline):
            try:
                job: Job = client.cancel(submission.job_id)
                is_canceled = job.state == "canceled"
                submission.cancel = "canceled" if is_canceled else f"answered {job.state}"
                return
            except ProblemError as problem:
                if problem.status == 409:
                    submission.cancel = "late"
                    return
            except DarkroomError:
                pass
            time.sleep(_PAUSE_S)


def _is_refused(error: DarkroomError) -> bool:
    """Tell whether the gateway understood and said no."""
    return isinstance(error, ProblemError) and 400 <= error.status < 500 and error.status != 429


def _is_not_accepted(error: DarkroomError) -> bool:
    """Tell whether there is certainly no row.

    Nobody listened, or the tenant was told to come later. A 503 may have lost its database in the
    commit.
    """
    if isinstance(error, ProblemError):
        return error.status == 429
    return isinstance(error, Unreachable) and isinstance(
        error.__cause__, httpx.ConnectError | httpx.ConnectTimeout
    )
