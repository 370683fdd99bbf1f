"""One tenant's many jobs, submitted as fast as the gateway accepts them."""

import threading
import time
from collections.abc import Callable

from benchmarks.lib.load import JobParameters
from benchmarks.lib.tenant_client import THREADS, TenantClient

LANDS_WITHIN_S = 900


class Dump:
    """Submits jobs on threads of its own until all are accepted, or the `with` is left."""

    def __init__(
        self, client: TenantClient, next_job: Callable[[], JobParameters], count: int
    ) -> None:
        self._client = client
        self._jobs = iter([next_job() for _ in range(count)])
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._submit, name=f"dump-{number}")
            for number in range(THREADS)
        ]
        self._problem: BaseException | None = None
        self.accepted = 0

    def __enter__(self) -> "Dump":
        self._client.was_refused.clear()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_landed(self) -> None:
        """Return when all is accepted, or when a job is refused for the first time."""
        deadline = time.monotonic() + LANDS_WITHIN_S
        while self._is_going_on() and not self._client.was_refused.is_set():
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"only {self.accepted} jobs of the dump are accepted after {LANDS_WITHIN_S} s"
                )
            time.sleep(0.05)
        if self._problem is not None:
            raise self._problem

    def _is_going_on(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _submit(self) -> None:
        try:
            while not self._stop.is_set() and (job := self._next()) is not None:
                if self._client.submit(job, self._stop) is not None:
                    with self._lock:
                        self.accepted += 1
        except BaseException as problem:  # noqa: BLE001  told by `wait_landed`
            self._problem = problem

    def _next(self) -> JobParameters | None:
        with self._lock:
            return next(self._jobs, None)
