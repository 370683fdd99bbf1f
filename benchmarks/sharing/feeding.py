"""Keep work waiting, however fast it is served: the load that a benchmark measures something else under."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from benchmarks.sharing.ledger import Levels

EVERY_S = 0.25
THREADS = 4


class Feeder:
    """Tops every tier up to its wanted number of unfinished images, several times a second, on a thread of its own.

    levels: what is unfinished and running now.  ask: adds one image to a tier; returns when it is accepted, or when
    the event is set meanwhile.
    """

    def __init__(self, levels: Callable[[], Levels], ask: Callable[[str, threading.Event], None], wanted: Mapping[str, int]) -> None:
        self._levels, self._ask, self._wanted = levels, ask, wanted
        self._seen: list[tuple[float, Levels]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, name="feeder")
        self._problem: BaseException | None = None

    def __enter__(self) -> "Feeder":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is None and self._problem is not None:
            raise self._problem

    def wait_running(self, images: int, within_s: float) -> None:
        """Return when so many of them run, or after `within_s`: then it shows in `mean_running`."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and not (self._seen and sum(self._seen[-1][1].running.values()) >= images):
            time.sleep(EVERY_S)

    def mean_running(self, since_s: float) -> dict[str, float]:
        """Images that ran, by tier: the mean of the samples taken since an instant of time.monotonic()."""
        samples = [levels.running for at_s, levels in self._seen if at_s >= since_s]
        return {tier: statistics.fmean(running.get(tier, 0) for running in samples) if samples else 0.0 for tier in self._wanted}

    def _feed(self) -> None:
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                while not self._stop.is_set():
                    levels = self._levels()
                    self._seen.append((time.monotonic(), levels))
                    missing = [tier for tier, wanted in self._wanted.items() for _ in range(wanted - levels.unfinished.get(tier, 0))]
                    list(threads.map(lambda tier: self._ask(tier, self._stop), missing))
                    self._stop.wait(EVERY_S)
        except BaseException as problem:  # noqa: BLE001  told to whoever leaves the `with`
            self._problem = problem
