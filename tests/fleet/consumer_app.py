"""A Celery worker with the fleet's consumer and tasks that only wait, for test_consumer.py to
torment.

Starts and ends of tasks are noted in a Redis that no test disturbs.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import redis
from celery import Celery
from kombu import Queue

import celeryconfig
from fleet import consumer
from fleet.consumer import TakenTask, on_turn, run_worker, tier_gate
from policy.fleet import parse_fleet
from settings import REPO, BrokerSettings

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


def main(facts: Mapping[str, Any], log: str) -> None:
    """Be such a worker until it is told to end; the whole of a process."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # its waits have a test of their own
    consumer.RECONNECT_S = (0.05,)
    celery = make_app(facts["broker_url"])
    notes = redis.Redis.from_url(facts["notes_url"])

    @celery.task(name="wait")
    def wait(name: str, seconds: float | None, queue: str) -> None:
        notes.rpush("started", name)
        notes.hincrby("running", queue)
        notes.rpush(f"peak:{queue}", notes.hget("running", queue))
        if seconds is None:
            notes.blpop(f"end:{name}")
        else:
            time.sleep(seconds)
        notes.hincrby("running", queue, -1)
        notes.rpush("ended", name)

    def may_take(queue: str, taken: Sequence[TakenTask]) -> bool:
        return (
            sum(task.headers.get("weight", 1) for task in taken if task.queue == queue)
            < facts["caps"][queue]
        )

    celery.steps["consumer"].add(tier_gate(lambda: QUEUES, may_take))
    celery.steps["consumer"].add(on_turn(lambda: notes.incr("turns")))
    threads, queues = facts["threads"], ",".join(QUEUES)
    arguments = [
        "worker",
        "--pool=threads",
        f"--concurrency={threads}",
        f"--queues={queues}",
        f"--hostname={facts['name']}@test",
    ]
    sys.exit(
        run_worker(celery, [*arguments, "--without-mingle", "--without-gossip", "--loglevel=INFO"])
    )
