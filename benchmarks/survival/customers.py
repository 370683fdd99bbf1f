"""Tenants who ask over REST while things break, and who know afterwards what they were told.

An answer of 202 is a promise; a refused connection is a no; anything else is neither: then the tenant's own list is looked
through for the prompt before it is asked again, for the row may have been committed and only the answer lost.
"""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.survival.rig import Rig, say
from benchmarks.survival.workload import TENANTS, Wish
from darkroom_client import Client, Job
from darkroom_client.errors import DarkroomError, ProblemError, Unreachable

_PATIENCE_S = 240
_PAUSE_S = 0.5
_SETTLES_IN_S = 1.0  # an unanswered request may be about to commit
_AT_ONCE = 16
_PAGES, _PAGE = 3, 100


@dataclass
class Asked:
    """What became of one wish, as its tenant knows it."""

    wish: Wish
    job_id: str | None = None
    heard: str = "nothing"  # accepted: 202. found: in the list, after an unknown outcome. refused. nothing: the tenant gave up
    unknown: int = 0  # times that the outcome was unknown
    retries: int = 0
    cancel: str | None = None  # canceled: so it was answered. late: it had ended. unanswered


class Customers:
    """The tenants of one run. Their jobs are told from those of other runs by the tenants' ids."""

    def __init__(self, rig: Rig, label: str) -> None:
        self.label = label
        self.tenant_ids: list[str] = []
        self._clients: list[Client] = []
        for number in range(TENANTS):
            tenant_id, client = rig.new_tenant(f"{label} {number}")
            self.tenant_ids.append(tenant_id)
            self._clients.append(client)
        self.asked: dict[str, Asked] = {}
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="customer")
        self._cancels: list[threading.Timer] = []
        self._lock, self._is_given_up = threading.Lock(), threading.Event()

    def ask(self, wish: Wish) -> None:
        """Ask in the background, until it is known what became of it."""
        self.asked[wish.marker] = asked = Asked(wish)
        self._pool.submit(self._ask, asked)

    def ask_in_time(self, wishes: Iterable[Wish]) -> None:
        """Ask for each at its instant, whatever became of those before; returns when every outcome is known."""
        started_at = time.monotonic()
        for wish in wishes:
            time.sleep(max(0.0, started_at + wish.at_s - time.monotonic()))
            self.ask(wish)
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

    def _ask(self, asked: Asked) -> None:
        client, deadline = self._clients[asked.wish.tenant], time.monotonic() + _PATIENCE_S
        while asked.job_id is None and self._is_patient(deadline):
            try:
                asked.job_id, asked.heard = client.create_job(**asked.wish.parameters).id, "accepted"
            except DarkroomError as error:
                if _is_refused(error):
                    asked.heard = "refused"
                    say(f"{asked.wish.marker} is refused: {error}")
                    return
                asked.retries += 1
                time.sleep(_PAUSE_S)
                if not _is_not_accepted(error):
                    asked.unknown += 1
                    self._look_up(client, asked, deadline)
        if asked.job_id is not None and asked.wish.cancel_after_s is not None:
            timer = threading.Timer(asked.wish.cancel_after_s, self._cancel, (client, asked))
            with self._lock:
                self._cancels.append(timer)
            timer.start()

    def _look_up(self, client: Client, asked: Asked, deadline: float) -> None:
        """Find the job in its tenant's list, newest first; asks until the list is answered."""
        time.sleep(_SETTLES_IN_S)
        while self._is_patient(deadline):
            try:
                for number, job in enumerate(client.jobs(page_size=_PAGE)):
                    if job.prompt == asked.wish.parameters["prompt"]:
                        asked.job_id, asked.heard = job.id, "found"
                        return
                    if number >= _PAGES * _PAGE:
                        return
                return
            except DarkroomError:
                time.sleep(_PAUSE_S)

    def _cancel(self, client: Client, asked: Asked) -> None:
        """Harmless when repeated, so it is repeated until there is an answer."""
        assert asked.job_id is not None
        asked.cancel, deadline = "unanswered", time.monotonic() + _PATIENCE_S
        while self._is_patient(deadline):
            try:
                job: Job = client.cancel(asked.job_id)
                asked.cancel = "canceled" if job.state == "canceled" else f"answered {job.state}"
                return
            except ProblemError as problem:
                if problem.status == 409:
                    asked.cancel = "late"
                    return
            except DarkroomError:
                pass
            time.sleep(_PAUSE_S)


def _is_refused(error: DarkroomError) -> bool:
    """The gateway understood and said no."""
    return isinstance(error, ProblemError) and 400 <= error.status < 500 and error.status != 429


def _is_not_accepted(error: DarkroomError) -> bool:
    """Certainly no row: nobody listened, or the tenant was told to come later. A 503 may have lost its database in the commit."""
    if isinstance(error, ProblemError):
        return error.status == 429
    return isinstance(error, Unreachable) and isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
