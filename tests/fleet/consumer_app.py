"""A Celery worker with the fleet's consumer and tasks that only sleep, for test_consumer.py to
torment.

Run as a process: `python -m tests.fleet.consumer_app`; CONSUMER_APP holds its addresses as JSON.
Starts and ends of tasks are noted in a Redis that no test disturbs.
"""

import json
import os
import sys
import time
from collections.abc import Sequence

import redis
from celery import Celery
from kombu import Queue

import celeryconfig
from fleet.consumer import TakenTask, on_turn, run_worker, tier_gate
from policy.fleet import parse_fleet
from settings import REPO, BrokerSettings

FACTS = json.loads(os.environ.get("CONSUMER_APP", "{}"))
QUEUES = ["fast", "batch"]


def make_app(broker_url: str) -> Celery:
    """The house's delivery settings with two queues of our own."""
    settings = BrokerSettings(broker_url=broker_url)
    celery = Celery("consumer-app", set_as_current=False)
    celery.conf.update(
        celeryconfig.delivery(settings, parse_fleet((REPO / "fleet.toml").read_text()))
    )
    celery.conf.update(
        task_queues=[Queue(name, routing_key=name) for name in QUEUES], task_default_queue="batch"
    )
    return celery


def main() -> None:
    celery = make_app(FACTS["broker_url"])
    notes = redis.Redis.from_url(FACTS["notes_url"])

    @celery.task(name="sleep")
    def sleep(name: str, seconds: float, queue: str) -> None:
        notes.rpush("started", name)
        notes.hincrby("running", queue)
        notes.rpush(f"peak:{queue}", notes.hget("running", queue))
        time.sleep(seconds)
        notes.hincrby("running", queue, -1)
        notes.rpush("ended", name)

    def may_take(queue: str, taken: Sequence[TakenTask]) -> bool:
        return (
            sum(task.headers.get("weight", 1) for task in taken if task.queue == queue)
            < FACTS["caps"][queue]
        )

    celery.steps["consumer"].add(tier_gate(QUEUES, may_take))
    celery.steps["consumer"].add(on_turn(lambda: notes.incr("turns")))
    threads, queues = FACTS["threads"], ",".join(QUEUES)
    arguments = [
        "worker",
        "--pool=threads",
        f"--concurrency={threads}",
        f"--queues={queues}",
        f"--hostname={FACTS['name']}@test",
    ]
    sys.exit(
        run_worker(celery, [*arguments, "--without-mingle", "--without-gossip", "--loglevel=INFO"])
    )


if __name__ == "__main__":
    main()
