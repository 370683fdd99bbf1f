"""A stock Celery worker that renders one image a task with plain diffusers: a common setup.

    python -m benchmarks.tiers.stock_worker CHECKPOINT PRECISION POOL

The broker's URL comes on standard input. Strict priority is the best that Celery on Redis can do
without code of one's own: `queue_order_strategy: priority` names the queues of each BRPOP in rank
order; late acks with a prefetch of one keep a second message from being taken while the first is
rendered, so that a fast one that comes meanwhile is next. One render at a time, for there is one
torch thread as in Darkroom's worker: two at once would each take twice as long, and a fast one
would wait for either. It ends with its standard input.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from celery.signals import worker_ready
from kombu.entity import Queue

from engine.request import ImageRequest

TASK = "render"
FINISHED = "finished"  # the list of ended tasks
WARM_UP = ImageRequest(
    id="warm-up",
    group="warm-up",
    checkpoint="plain",
    prompt="",
    width_px=128,
    height_px=128,
    num_steps=2,
    guidance=1.5,
    sampler="ddim",
    seed=0,
)
QUEUES = ("fast", "quality", "batch")  # in rank order


def make_app(broker_url: str) -> Celery:
    """Make the application that both sides agree on."""
    app = Celery("plain", broker=broker_url)
    app.conf.update(
        task_queues=[Queue(name, routing_key=name) for name in QUEUES],
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        broker_transport_options={"queue_order_strategy": "priority", "visibility_timeout": 3600},
        worker_redirect_stdouts=False,
    )
    return app


def main(checkpoint: str, precision: str, pool: str) -> None:
    """Load the pipeline, read where the broker is, work until the parent is gone.

    Prints "ready" when tasks are taken.
    """
    from benchmarks.lib.pipeline import PlainPipeline

    pipe = PlainPipeline(Path(checkpoint), precision, "cpu")
    pipe.render([WARM_UP])
    broker_url = sys.stdin.readline().strip()  # no argument: it holds a password
    if not broker_url:
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = redis.Redis.from_url(broker_url)
    app = make_app(broker_url)

    @app.task(name=TASK)
    def render(asked_at: float, tier: str, request: dict[str, Any]) -> None:
        pipe.render([ImageRequest(**request)])
        store.rpush(FINISHED, json.dumps({"tier": tier, "total_s": time.time() - asked_at}))

    @worker_ready.connect
    def say_ready(**_: Any) -> None:
        print("ready", flush=True)

    app.worker_main(
        [
            "--quiet",
            "worker",
            f"--pool={pool}",
            "--concurrency=1",
            f"--queues={','.join(QUEUES)}",
            "--hostname=plain@localhost",
            "--without-mingle",
            "--without-gossip",
            "--loglevel=WARNING",
        ]
    )


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
