"""The asking side of the stock Celery setup: starts its worker, sends it tasks, reads when they ended.

Its worker does less than the house for an image: no row, no object store, no PNG. A latency runs from the message's sending to the end
of the task; both instants are of this machine's one clock.
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

from benchmarks.sharing.ledger import Levels
from benchmarks.sharing.plain_worker import FINISHED, QUEUES, TASK, make_app
from settings import REPO

PATIENCE_S = 120
DATABASE = 2  # of the house's broker, which uses 0
POOL = "solo"  # the worker's main thread renders: between the end of a task and the next BRPOP no other thread has to wake up


class PlainCelery:
    """One worker's queues."""

    def __init__(self, app: Celery, store: redis.Redis) -> None:
        self._app, self._store = app, store

    def ask(self, tier: str, request: Mapping[str, Any]) -> None:
        """Send one image's message. request: fields of `ImageRequest`."""
        self._app.send_task(TASK, args=(time.time(), tier, dict(request)), queue=tier)

    def levels(self) -> Levels:
        """What waits and what is rendered."""
        running = Counter(json.loads(message)[2] for message in cast(list[bytes], self._store.hvals("unacked")))
        return Levels({tier: self._store.llen(tier) + running[tier] for tier in QUEUES}, running)

    def take_latencies_s(self, tier: str, count: int) -> list[float]:
        """The latencies of `count` images of the tier, when they are there; what is known of ended tasks is forgotten."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ended = [json.loads(line) for line in cast(list[bytes], self._store.lrange(FINISHED, 0, -1))]
            latencies_s = [one["total_s"] for one in ended if one["tier"] == tier]
            if len(latencies_s) >= count:
                self._store.delete(FINISHED)
                return latencies_s
            if time.monotonic() > deadline:
                raise SystemExit(f"plain Celery rendered {len(latencies_s)} of {count} images")
            time.sleep(0.1)

    def clear(self) -> None:
        """Throw away what waits; return when nothing is rendered."""
        self._store.delete(*QUEUES)
        deadline = time.monotonic() + PATIENCE_S
        while self._store.hlen("unacked"):
            if time.monotonic() > deadline:
                raise SystemExit("plain Celery does not become idle")
            time.sleep(0.05)


@contextmanager
def plain_worker(checkpoint: str, precision: str) -> Iterator[Callable[[str], PlainCelery]]:
    """Start its one worker, which loads; end it. What comes connects it to a house's broker and returns when it takes tasks."""
    command = [sys.executable, "-m", "benchmarks.sharing.plain_worker", checkpoint, precision, POOL]
    with tempfile.TemporaryFile("w+") as log, contextlib.ExitStack() as connections:
        worker = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert worker.stdin is not None
        assert worker.stdout is not None
        orders, said = worker.stdin, worker.stdout

        def connect(broker_url: str) -> PlainCelery:
            url = f"{broker_url.rpartition('/')[0]}/{DATABASE}"
            orders.write(f"{url}\n")
            orders.flush()
            if not any(line.strip() == "ready" for line in said):
                log.seek(0)
                raise SystemExit(f"the plain Celery worker ended early:\n{log.read()[-4000:]}")
            store = connections.enter_context(redis.Redis.from_url(url))
            return PlainCelery(connections.enter_context(make_app(url)), store)

        try:
            yield connect
        finally:
            orders.close()  # it ends then
            worker.wait(timeout=30)
