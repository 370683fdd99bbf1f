"""What FleetConsumer and TierCycle promise, against a real Redis that is killed, flushed and cut
off.
"""

import multiprocessing
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
from tests.fleet import consumer_app

REDIS_SERVER = Path(sys.executable).with_name("redis-server")
# Workers are forked from a process that has imported already what they need.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["pytest", "tests.fleet.consumer_app"])


class Worker:
    """A worker in a process of its own."""

    def __init__(self, facts: dict, log: Path) -> None:
        self._log = log
        self._process = FORKED.Process(target=consumer_app.main, args=(facts, str(log)))
        self._process.start()

    def says(self, *words: bytes) -> int:
        """How often it has logged any of these."""
        logged = self._log.read_bytes() if self._log.exists() else b""
        return sum(logged.count(each) for each in words)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


@dataclass
class Rig:
    """A broker to torment, a Redis for notes, and workers."""

    folder: Path
    ports: list[int]
    processes: list[subprocess.Popen | Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker_url, self.notes_url = (f"redis://127.0.0.1:{port}/0" for port in self.ports[:2])
        self.broker, self.notes = (
            redis.Redis.from_url(self.broker_url),
            redis.Redis.from_url(self.notes_url),
        )
        self.broker_process = self.start_redis(self.ports[0])
        self.start_redis(self.ports[1])
        # the workers' way to the broker; ours leads past it
        self.proxy = RefusingProxy(self.ports[2], self.ports[0])
        self.app = consumer_app.make_app(self.broker_url)

    def start_redis(self, port: int) -> subprocess.Popen:
        arguments = [
            REDIS_SERVER,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            self.folder,
        ]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        self.processes.append(process)
        eventually(lambda: _answers(redis.Redis.from_url(f"redis://127.0.0.1:{port}")))
        return process

    def worker(
        self,
        *,
        threads: int = 4,
        caps: dict[str, int] | None = None,
        name: str = "w",
        is_awaited: bool = True,
    ) -> Worker:
        proxied = f"redis://127.0.0.1:{self.ports[2]}/0"
        facts = {
            "broker_url": proxied,
            "notes_url": self.notes_url,
            "threads": threads,
            "name": name,
        }
        facts["caps"] = {"fast": threads, "batch": threads} | (caps or {})
        worker = Worker(facts, self.folder / f"{name}.log")
        self.processes.append(worker)
        if is_awaited:
            eventually(lambda: worker.says(b"ready."))
        return worker

    def send(
        self, name: str, seconds: float | None = None, queue: str = "batch", **headers: int
    ) -> None:
        """Send a task that lasts so long; None: until it is let go."""
        self.app.send_task(
            "wait",
            kwargs={"name": name, "seconds": seconds, "queue": queue},
            queue=queue,
            headers=headers,
        )

    def let_go(self, *names: str) -> None:
        """Have these tasks end."""
        for name in names:
            self.notes.rpush(f"end:{name}", 1)

    def started(self) -> list[str]:
        return [name.decode() for name in self.notes.lrange("started", 0, -1)]

    def ended(self) -> list[str]:
        return [name.decode() for name in self.notes.lrange("ended", 0, -1)]

    def peak(self, queue: str) -> int:
        """How many tasks of the queue have run at once."""
        return max(int(value) for value in self.notes.lrange(f"peak:{queue}", 0, -1))

    def turns(self) -> int:
        """How often the workers' loops have turned."""
        return int(self.notes.get("turns"))

    def is_served(self, name: str) -> bool:
        """Whether the task has ended, or one that is sent now in its place, as the sweeper would.

        Its message is lost if a connection ended with it on the way.
        """
        given_up_at = time.monotonic() + 5
        while time.monotonic() < given_up_at:
            if any(ended.startswith(name) for ended in self.ended()):
                return True
            time.sleep(0.02)
        self.send(f"{name}-again-{given_up_at}", 0.0)
        return False

    def is_empty(self) -> bool:
        """Whether the broker has no message any more, taken or not."""
        return not self.broker.hlen("unacked") and not self.broker.llen("batch")

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


def eventually(is_true: Callable[[], object], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def after_some_turns(rig: Rig) -> None:
    """Return when the worker's loop has turned a few times more."""
    turns = rig.turns()
    eventually(lambda: rig.turns() >= turns + 3)


@pytest.fixture
def rig(tmp_path) -> Iterator[Rig]:
    rig = Rig(tmp_path, free_ports(3))
    yield rig
    rig.close()


LOST = b"Trying to re-establish"
UNACKED = (b"Couldn't ack", b"ack through the channel failed")


def test_a_finished_task_is_acknowledged_while_a_drain_waits_for_another(rig):
    worker = rig.worker()
    rig.send("short")
    rig.send("long")
    eventually(lambda: len(rig.started()) == 2)

    worker.send_signal(signal.SIGTERM)
    eventually(lambda: worker.says(b"Warm shutdown"))
    rig.let_go("short")
    eventually(lambda: rig.ended() == ["short"])

    eventually(lambda: rig.broker.hlen("unacked") == 1)
    assert worker.poll() is None


def test_a_worker_survives_a_broker_outage_with_tasks_in_flight(rig):
    worker = rig.worker()
    # one thread is free: a BRPOP is pending when the broker dies, which kills the stock consumer
    before = [f"before-{number}" for number in range(3)]
    for name in before:
        rig.send(name)
    eventually(lambda: len(rig.started()) == 3)

    rig.broker_process.kill()
    rig.broker_process.wait()
    eventually(lambda: worker.says(LOST))
    after_some_turns(rig)
    rig.broker_process = rig.start_redis(rig.ports[0])
    rig.send("after", 0.0)

    eventually(lambda: "after" in rig.ended())
    rig.let_go(*before)
    eventually(lambda: len(rig.ended()) == 4)
    assert worker.poll() is None
    assert len(rig.started()) == 4


def test_a_worker_outlives_every_error_the_broker_answers_with_and_goes_on(rig):
    worker = rig.worker()
    for name, reply in REPLIES.items():
        running, waiting = f"running-{name}", f"waiting-{name}"
        rig.send(running)  # a thread is free, so a BRPOP is pending
        eventually(lambda: running in rig.started())  # noqa: B023 - called at once
        unacked, refused = worker.says(*UNACKED), rig.proxy.refused

        with rig.proxy.refusing(reply):
            eventually(lambda: rig.proxy.refused >= refused + 3)  # noqa: B023
            rig.let_go(running)
            eventually(lambda: worker.says(*UNACKED) > unacked)  # noqa: B023
            rig.send(waiting, 0.0)
        assert worker.poll() is None, name

        eventually(lambda: rig.is_served(waiting))  # noqa: B023

    eventually(rig.is_empty)
    assert sorted(rig.started()) == sorted(set(rig.started())), "no task ran twice"


def test_a_worker_whose_acks_were_all_refused_takes_messages_again(rig):
    worker = rig.worker(threads=2)
    for number in range(2):  # every thread is busy: nothing is asked of the broker while it refuses
        rig.send(f"busy-{number}")
    eventually(lambda: len(rig.started()) == 2)

    with rig.proxy.refusing(REPLIES["BUSY"]):
        rig.let_go("busy-0", "busy-1")
        eventually(lambda: worker.says(*UNACKED) == 2)
    rig.send("after", 0.0)

    eventually(lambda: "after" in rig.ended())
    assert worker.poll() is None
    eventually(lambda: rig.broker.hlen("unacked") == 0)


def test_a_failover_to_a_replica_and_back_ends_no_worker(rig):
    worker = rig.worker()
    rig.send("before")
    eventually(lambda: rig.started() == ["before"])

    rig.broker.execute_command("REPLICAOF", "127.0.0.1", "1")
    eventually(lambda: worker.says(LOST))
    rig.let_go("before")
    eventually(lambda: rig.ended() == ["before"])
    rig.broker.execute_command("REPLICAOF", "NO", "ONE")
    rig.send("after", 0.0)

    eventually(lambda: rig.ended() == ["before", "after"])
    assert worker.poll() is None


def test_a_worker_whose_broker_answers_with_errors_still_stops_when_it_is_told_to(rig):
    worker = rig.worker()
    rig.proxy.refuse(REPLIES["NOPERM"])

    eventually(lambda: worker.says(LOST))
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=60) == 0


def test_a_worker_that_ends_because_of_an_error_says_so_by_its_exit_status(rig):
    # the gate compares it with a number
    worker = rig.worker(caps={"fast": "many"}, is_awaited=False)

    assert worker.wait(timeout=60) == 1
    assert worker.says(b"Unrecoverable error")


def test_a_worker_that_starts_while_its_broker_answers_with_errors_waits_for_it(rig):
    rig.proxy.refuse(REPLIES["LOADING"])
    worker = rig.worker(is_awaited=False)
    eventually(lambda: worker.says(b"Cannot connect"))

    rig.proxy.relent()
    rig.send("at last", 0.0)

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
    """Otherwise the health check would end a worker with all its models for an outage that is none
    of its own.
    """
    worker = rig.worker()

    rig.proxy.refuse(REPLIES["LOADING"])
    eventually(lambda: worker.says(LOST))

    after_some_turns(rig)


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
    worker = rig.worker()
    tasks = [f"task-{number}" for number in range(3)]
    for name in tasks:
        rig.send(name)
    eventually(lambda: len(rig.started()) == 3)

    rig.broker.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    rig.broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")
    eventually(lambda: worker.says(LOST))
    rig.send("later", 0.0)

    eventually(lambda: "later" in rig.ended())
    rig.let_go(*tasks)
    eventually(rig.is_empty)
    assert sorted(rig.started()) == ["later", "task-0", "task-1", "task-2"]
    assert sorted(rig.ended()) == ["later", "task-0", "task-1", "task-2"]


def test_a_flushed_broker_goes_on_serving(rig):
    rig.worker()
    rig.send("before")
    eventually(lambda: rig.started() == ["before"])

    rig.broker.flushall()
    rig.send("after", 0.0)

    eventually(lambda: rig.ended() == ["after"])
    rig.let_go("before")
    eventually(lambda: set(rig.ended()) == {"before", "after"})


def test_a_worker_takes_no_more_than_it_can_run(rig):
    rig.worker(threads=2)
    for number in range(6):
        rig.send(f"task-{number}")

    eventually(lambda: len(rig.started()) == 2)
    after_some_turns(rig)

    assert rig.broker.llen("batch") == 4


def test_a_lower_tier_stays_below_its_cap_and_the_higher_one_does_not_wait(rig):
    rig.worker(threads=4, caps={"batch": 2})
    for number in range(8):
        rig.send(f"batch-{number}")
    eventually(lambda: len(rig.started()) == 2)

    rig.send("urgent", 0.0, queue="fast")

    eventually(lambda: "urgent" in rig.ended())
    after_some_turns(rig)
    rig.let_go(*(f"batch-{number}" for number in range(8)))
    eventually(lambda: len(rig.ended()) == 9)
    assert rig.peak("batch") <= 2


def test_the_gate_is_told_of_every_task_in_hand_and_what_its_message_says(rig):
    # open while less than 5 is in hand: a weight of 4, and one more message
    rig.worker(threads=8, caps={"batch": 5})
    for number in range(4):
        rig.send(f"batch-{number}", weight=4)

    eventually(lambda: len(rig.started()) == 2)
    after_some_turns(rig)
    rig.let_go(*(f"batch-{number}" for number in range(4)))
    eventually(lambda: len(rig.ended()) == 4)

    assert rig.peak("batch") == 2


def test_a_misspelt_queue_is_an_error_and_not_a_place_where_jobs_wait_for_ever(rig):
    with pytest.raises(Exception, match="bach"):
        rig.send("lost", 0.1, queue="bach")
