"""What FleetConsumer and TierCycle promise, against a real Redis that is killed, flushed and cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from celery.signals import worker_init

from benchmarks.lib.refusals import REPLIES, RefusingProxy
from fleet import consumer
from fleet.addresses import free_ports
from fleet.consumer import FleetConsumer, run_worker
from settings import REPO
from tests.fleet.consumer_app import make_app

REDIS_SERVER = Path(sys.executable).with_name("redis-server")


@dataclass
class Rig:
    """A broker to torment, a Redis for notes, and workers."""

    folder: Path
    ports: list[int]
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker_url, self.notes_url = (f"redis://127.0.0.1:{port}/0" for port in self.ports[:2])
        self.broker, self.notes = redis.Redis.from_url(self.broker_url), redis.Redis.from_url(self.notes_url)
        self.broker_process = self.start_redis(self.ports[0])
        self.start_redis(self.ports[1])
        self.proxy = RefusingProxy(self.ports[2], self.ports[0])  # the workers' way to the broker; ours leads past it
        self.app = make_app(self.broker_url)

    def start_redis(self, port: int) -> subprocess.Popen:
        arguments = [REDIS_SERVER, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        self.processes.append(process)
        eventually(lambda: _answers(redis.Redis.from_url(f"redis://127.0.0.1:{port}")))
        return process

    def worker(self, *, threads: int = 4, caps: dict[str, int] | None = None, name: str = "w", is_awaited: bool = True) -> subprocess.Popen:
        proxied = f"redis://127.0.0.1:{self.ports[2]}/0"
        facts = {"broker_url": proxied, "notes_url": self.notes_url, "threads": threads, "name": name}
        facts["caps"] = {"fast": threads, "batch": threads} | (caps or {})
        log = (self.folder / f"{name}.log").open("wb")
        environment = os.environ | {"CONSUMER_APP": json.dumps(facts)}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fleet.consumer_app"], cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        self.processes.append(process)
        if is_awaited:
            eventually(lambda: b"ready." in (self.folder / f"{name}.log").read_bytes(), within_s=30)
        return process

    def send(self, name: str, seconds: float, queue: str = "batch", **headers: int) -> None:
        self.app.send_task("sleep", kwargs={"name": name, "seconds": seconds, "queue": queue}, queue=queue, headers=headers)

    def started(self) -> list[str]:
        return [name.decode() for name in self.notes.lrange("started", 0, -1)]

    def ended(self) -> list[str]:
        return [name.decode() for name in self.notes.lrange("ended", 0, -1)]

    def close(self) -> None:
        self.proxy.close()
        for process in reversed(self.processes):
            if process.poll() is None:
                process.kill()
            process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def eventually(is_true: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def rig(tmp_path) -> Iterator[Rig]:
    rig = Rig(tmp_path, free_ports(3))
    yield rig
    rig.close()


def test_a_finished_task_is_acknowledged_while_a_drain_waits_for_another(rig):
    worker = rig.worker()
    rig.send("short", 0.6)
    rig.send("long", 5)
    eventually(lambda: len(rig.started()) == 2)

    worker.send_signal(signal.SIGTERM)
    eventually(lambda: rig.ended() == ["short"])

    eventually(lambda: rig.broker.hlen("unacked") == 1, within_s=1.5)
    assert worker.poll() is None


def test_a_worker_survives_a_broker_outage_with_tasks_in_flight(rig):
    worker = rig.worker()
    for number in range(3):  # one thread is free: a BRPOP is pending when the broker dies, which kills the stock consumer
        rig.send(f"before-{number}", 4)
    eventually(lambda: len(rig.started()) == 3)

    rig.broker_process.kill()
    rig.broker_process.wait()
    time.sleep(2.5)
    rig.broker_process = rig.start_redis(rig.ports[0])
    rig.send("after", 0.1)

    eventually(lambda: "after" in rig.ended(), within_s=20)
    eventually(lambda: len(rig.ended()) == 4)
    assert worker.poll() is None
    assert len(rig.started()) == 4


def test_a_worker_outlives_every_error_the_broker_answers_with_and_goes_on(rig):
    worker = rig.worker()
    for number, (name, reply) in enumerate(REPLIES.items()):
        rig.send(f"running-{number}", 1.0)  # its ack falls into the outage; a thread is free, so a BRPOP is pending
        eventually(lambda: f"running-{number}" in rig.started(), within_s=5)  # noqa: B023 - called at once

        with rig.proxy.refusing(reply):
            eventually(lambda: f"running-{number}" in rig.ended())  # noqa: B023
            rig.send(f"waiting-{number}", 0.0)
        assert worker.poll() is None, name

        eventually(lambda: f"waiting-{number}" in rig.ended(), within_s=5)  # noqa: B023

    assert sorted(rig.started()) == sorted(set(rig.started())), "no task ran twice"
    eventually(lambda: rig.broker.hlen("unacked") == 0)


def test_a_worker_whose_acks_were_all_refused_takes_messages_again(rig):
    worker = rig.worker(threads=2)
    for number in range(2):  # every thread is busy: nothing is asked of the broker while it refuses
        rig.send(f"busy-{number}", 1.0)
    eventually(lambda: len(rig.started()) == 2)

    with rig.proxy.refusing(REPLIES["BUSY"]):
        eventually(lambda: len(rig.ended()) == 2)
    rig.send("after", 0.1)

    eventually(lambda: "after" in rig.ended(), within_s=5)
    assert worker.poll() is None
    eventually(lambda: rig.broker.hlen("unacked") == 0)


def test_a_failover_to_a_replica_and_back_ends_no_worker(rig):
    worker = rig.worker()
    rig.send("before", 3)
    eventually(lambda: rig.started() == ["before"])

    rig.broker.execute_command("REPLICAOF", "127.0.0.1", "1")
    eventually(lambda: rig.ended() == ["before"])
    rig.broker.execute_command("REPLICAOF", "NO", "ONE")
    rig.send("after", 0.1)

    eventually(lambda: rig.ended() == ["before", "after"], within_s=5)
    assert worker.poll() is None


def test_a_worker_whose_broker_answers_with_errors_still_stops_when_it_is_told_to(rig):
    worker = rig.worker()
    rig.proxy.refuse(REPLIES["NOPERM"])

    eventually(lambda: b"Trying to re-establish" in (rig.folder / "w.log").read_bytes())
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=10) == 0


def test_a_worker_that_ends_because_of_an_error_says_so_by_its_exit_status(rig):
    worker = rig.worker(caps={"fast": "many"}, is_awaited=False)  # the gate compares it with a number

    assert worker.wait(timeout=20) == 1
    assert b"Unrecoverable error" in (rig.folder / "w.log").read_bytes()


def test_a_worker_that_starts_while_its_broker_answers_with_errors_waits_for_it(rig):
    rig.proxy.refuse(REPLIES["LOADING"])
    worker = rig.worker(is_awaited=False)
    eventually(lambda: b"Cannot connect" in (rig.folder / "w.log").read_bytes(), within_s=30)

    rig.proxy.relent()
    rig.send("at last", 0.1)

    eventually(lambda: rig.ended() == ["at last"])
    assert worker.poll() is None


def test_waits_for_a_broker_grow_until_it_was_well_for_a_while(monkeypatch):
    now, waits = 1000.0, []
    monkeypatch.setattr(consumer.time, "monotonic", lambda: now)
    monkeypatch.setattr(consumer.time, "sleep", waits.append)
    monkeypatch.setattr(consumer.random, "uniform", lambda least, most: most)
    waiting = FleetConsumer.__new__(FleetConsumer)  # what follows needs neither an app nor a broker
    waiting._failures = 0

    for connected_for_s in [None, None, None, None, None, 1, consumer.HEALTHY_AFTER_S + 1, None]:
        waiting._connected_at = None if connected_for_s is None else now - connected_for_s
        waiting._wait_before_the_next_try()

    assert waits == [0.1, 0.2, 0.5, 1.0, 1.0, 1.0, 0.1, 0.2]


def test_a_worker_s_loop_goes_on_turning_while_its_broker_is_away(rig):
    """Otherwise the health check would end a worker with all its models for an outage that is none of its own."""
    rig.worker()

    rig.proxy.refuse(REPLIES["LOADING"])
    eventually(lambda: b"Trying to re-establish" in (rig.folder / "w.log").read_bytes())
    turns = int(rig.notes.get("turns"))

    eventually(lambda: int(rig.notes.get("turns")) >= turns + 3)


@dataclass(frozen=True)
class Ended:
    """A worker of Celery's as it is when `worker_main` returns."""

    exitcode: int | None


@pytest.mark.parametrize(("exitcode", "status"), [(0, 0), (None, 1), (1, 1)])
def test_a_worker_that_ends_without_having_been_told_to_says_so_by_its_status(exitcode, status):
    def worker_main(arguments):
        assert arguments == ["worker"]
        worker_init.send(sender=Ended(exitcode))

    assert run_worker(SimpleNamespace(worker_main=worker_main), ["worker"]) == status


def test_running_tasks_are_not_run_twice_when_connections_are_cut(rig):
    rig.worker()
    for number in range(3):
        rig.send(f"task-{number}", 4)
    eventually(lambda: len(rig.started()) == 3)

    rig.broker.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    rig.broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")
    rig.send("later", 0.1)

    eventually(lambda: len(rig.ended()) == 4, within_s=20)
    assert sorted(rig.started()) == ["later", "task-0", "task-1", "task-2"]
    eventually(lambda: rig.broker.hlen("unacked") == 0, within_s=5)


def test_a_flushed_broker_goes_on_serving(rig):
    rig.worker()
    rig.send("before", 1)
    eventually(lambda: rig.started() == ["before"])

    rig.broker.flushall()
    rig.send("after", 0.1)

    eventually(lambda: set(rig.ended()) == {"before", "after"})


def test_a_worker_takes_no_more_than_it_can_run(rig):
    rig.worker(threads=2)
    for number in range(6):
        rig.send(f"task-{number}", 1.5)

    eventually(lambda: len(rig.started()) == 2)
    time.sleep(0.5)

    assert rig.broker.llen("batch") == 4


def test_a_lower_tier_stays_below_its_cap_and_the_higher_one_does_not_wait(rig):
    rig.worker(threads=4, caps={"batch": 2})
    for number in range(8):
        rig.send(f"batch-{number}", 0.7)
    eventually(lambda: len(rig.started()) == 2)

    rig.send("urgent", 0.1, queue="fast")

    eventually(lambda: "urgent" in rig.started(), within_s=0.5)
    eventually(lambda: len(rig.ended()) == 9, within_s=20)
    assert max(int(value) for value in rig.notes.lrange("peak:batch", 0, -1)) <= 2


def test_the_gate_is_told_of_every_task_in_hand_and_what_its_message_says(rig):
    rig.worker(threads=8, caps={"batch": 5})  # open while less than 5 is in hand: a weight of 4, and one more message
    for number in range(4):
        rig.send(f"batch-{number}", 0.7, weight=4)

    eventually(lambda: len(rig.ended()) == 4, within_s=20)

    assert max(int(value) for value in rig.notes.lrange("peak:batch", 0, -1)) == 2


def test_a_misspelt_queue_is_an_error_and_not_a_place_where_jobs_wait_for_ever(rig):
    with pytest.raises(Exception, match="bach"):
        rig.send("lost", 0.1, queue="bach")
