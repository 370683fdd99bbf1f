"""Who asks for what, and when: seeded, so that every round and every system is given the same.

It waits for the instants, but knows nobody who serves.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pocket.world import caption, random_scene

THREADS = 16
JobParameters = dict[str, Any]
"""The body of POST /v1/jobs."""


def spaced(count: int, gap_s: tuple[float, float], *, seed: int) -> list[float]:
    """Draw instants of requests that come one at a time.

    Each gap is drawn evenly between the two bounds.
    """
    rng = random.Random(seed)
    instants: list[float] = []
    at = 0.0
    for _ in range(count):
        at += rng.uniform(*gap_s)
        instants.append(at)
    return instants


def poisson(
    sources: Sequence[str], each: int, rate: float, *, seed: int
) -> list[tuple[float, str]]:
    """Draw instants and sources, in order: `each` requests of every source, `rate` of all a second.

    A Poisson process that is known to have had so many arrivals of each source: even draws, sorted.
    So the load is the nominal one in every trace, and no tenant is better off because it happened
    to ask for less.
    """
    rng = random.Random(seed)
    duration_s = len(sources) * each / rate
    return sorted((rng.uniform(0, duration_s), source) for source in sources for _ in range(each))


def equal_jobs(tier: str, steps: int, *, seed: int) -> Callable[[], JobParameters]:
    """Return an endless supply of jobs that are equal in cost.

    Prompts and seeds differ, everything else is the model's default.
    """
    rng = random.Random(seed)

    def next_job() -> JobParameters:
        return {
            "prompt": caption(random_scene(rng), rng),
            "tier": tier,
            "steps": steps,
            "seed": rng.getrandbits(31),
        }

    return next_job


def play(instants: Sequence[float], ask: Callable[[int], None]) -> float:
    """Ask at every instant, counted from now, whatever became of the earlier requests.

    ask: is given the number of the request, on a thread of its own. Returns when all have been
    accepted, with how late the latest was, in seconds.
    """
    late_s = 0.0
    started_at = time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        asked = []
        for number, at in enumerate(instants):
            time.sleep(max(0.0, started_at + at - time.monotonic()))
            late_s = max(late_s, time.monotonic() - started_at - at)
            asked.append(threads.submit(ask, number))
        for one in asked:
            one.result()
    return late_s
