"""Keep work waiting, however fast it is served: the load under which something else is measured."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from benchmarks.lib.job_queries import QueueLevels

EVERY_S = 0.25
THREADS = 4


class BackgroundLoad:
    """Tops every tier up to its wanted number of unfinished images, on a thread of its own.

    levels: what is unfinished and running now, asked for several times a second.  ask: adds one
    image to a tier; returns when it is accepted, or when the event is set meanwhile.
    """

    def __init__(
        self,
        levels: Callable[[], QueueLevels],
        ask: Callable[[str, threading.Event], object],
        wanted: Mapping[str, int],
    ) -> None:
        self._levels = levels
        self._ask = ask
        self._wanted = wanted
        self._seen: list[tuple[float, QueueLevels]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background-load")
        self._problem: BaseException | None = None

    def __enter__(self) -> "BackgroundLoad":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None and self._problem is not None:
            raise self._problem

    def wait_running(self, images: int, within_s: float) -> None:
        """Return when so many images run, or after `within_s`: `mean_running` tells."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self._running_now() < images:
            time.sleep(EVERY_S)

    def mean_running(self, since_s: float) -> dict[str, float]:
        """Return the images that ran, by tier.

        The mean of the samples taken since an instant of time.monotonic().
        """
        samples = [levels.running for at_s, levels in self._seen if at_s >= since_s]
        if not samples:
            return dict.fromkeys(self._wanted, 0.0)
        return {
            tier: statistics.fmean(running.get(tier, 0) for running in samples)
            for tier in self._wanted
        }

    def _running_now(self) -> int:
        return sum(self._seen[-1][1].running.values()) if self._seen else -1

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                while not self._stop.is_set():
                    levels = self._levels()
                    self._seen.append((time.monotonic(), levels))
                    missing = [
                        tier
                        for tier, wanted in self._wanted.items()
                        for _ in range(wanted - levels.unfinished.get(tier, 0))
                    ]
                    list(threads.map(lambda tier: self._ask(tier, self._stop), missing))
                    self._stop.wait(EVERY_S)
        except BaseException as problem:  # noqa: BLE001  told to whoever leaves the `with`
            self._problem = problem
