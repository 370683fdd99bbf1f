"""The asking side of the stock Celery setup: start its worker, send tasks, read when they ended.

Its worker does less than Darkroom for an image: no row, no object store, no PNG. A latency runs
from the message's sending to the end of the task; both instants are of this machine's one clock.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import redis
from celery import Celery

from benchmarks.lib.job_queries import QueueLevels
from benchmarks.tiers.stock_worker import FINISHED, QUEUES, TASK, make_app
from settings import REPO

PATIENCE_S = 120
DATABASE = 2  # of the stack's broker, which uses 0
# The worker's main thread renders: between the end of a task and the next BRPOP no other thread has
# to wake up.
POOL = "solo"


class CeleryQueues:
    """One worker's queues."""

    def __init__(self, app: Celery, store: redis.Redis) -> None:
        self._app = app
        self._store = store

    def ask(self, tier: str, request: Mapping[str, Any]) -> None:
        """Send one image's message. request: fields of `ImageRequest`."""
        self._app.send_task(TASK, args=(time.time(), tier, dict(request)), queue=tier)

    def levels(self) -> QueueLevels:
        """Count what waits and what is rendered."""
        unacked = cast(list[bytes], self._store.hvals("unacked"))
        running = Counter(json.loads(message)[2] for message in unacked)
        unfinished = {tier: self._store.llen(tier) + running[tier] for tier in QUEUES}
        return QueueLevels(unfinished, running)

    def take_latencies_s(self, tier: str, count: int) -> list[float]:
        """Wait for `count` images of the tier; return their latencies.

        What is known of ended tasks is forgotten.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            lines = cast(list[bytes], self._store.lrange(FINISHED, 0, -1))
            ended = [json.loads(line) for line in lines]
            latencies_s = [one["total_s"] for one in ended if one["tier"] == tier]
            if len(latencies_s) >= count:
                self._store.delete(FINISHED)
                return latencies_s
            if time.monotonic() > deadline:
                raise SystemExit(f"stock Celery rendered {len(latencies_s)} of {count} images")
            time.sleep(0.1)

    def clear(self) -> None:
        """Throw away what waits; return when nothing is rendered."""
        self._store.delete(*QUEUES)
        deadline = time.monotonic() + PATIENCE_S
        while self._store.hlen("unacked"):
            if time.monotonic() > deadline:
                raise SystemExit("stock Celery does not become idle")
            time.sleep(0.05)


@contextmanager
def stock_worker(checkpoint: str, precision: str) -> Iterator[Callable[[str], CeleryQueues]]:
    """Start the one worker, which loads; end it.

    What is yielded connects it to a broker, and returns when the worker takes tasks.
    """
    module = "benchmarks.tiers.stock_worker"
    command = [sys.executable, "-m", module, checkpoint, precision, POOL]
    with tempfile.TemporaryFile("w+") as log, contextlib.ExitStack() as connections:
        worker = subprocess.Popen(
            command,
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        orders = worker.stdin
        said = worker.stdout

        def connect(broker_url: str) -> CeleryQueues:
            url = f"{broker_url.rpartition('/')[0]}/{DATABASE}"
            orders.write(f"{url}\n")
            orders.flush()
            if not any(line.strip() == "ready" for line in said):
                log.seek(0)
                raise SystemExit(f"the stock Celery worker ended early:\n{log.read()[-4000:]}")
            store = connections.enter_context(redis.Redis.from_url(url))
            return CeleryQueues(connections.enter_context(make_app(url)), store)

        try:
            yield connect
        finally:
            orders.close()  # it ends then
            worker.wait(timeout=30)
