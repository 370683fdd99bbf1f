"""Celery's consumer, as a GPU worker on the Redis transport needs it. Leans on private names of Celery 5.7 and kombu 5.7.

Celery's own consumer holds acks back until the slowest task of a drain ends, hands running tasks out a second time
after any lost connection, and exits when Redis is away for a few seconds with tasks in flight, or answers one command with
an error: every model of the fleet would be loaded again. FleetConsumer does none of that. TierCycle decides, each time the
worker asks the broker for one more message, which queues it asks: so a job of a lower tier is never taken while its tier
has no room.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, bootsteps
from celery.platforms import EX_FAILURE
from celery.signals import worker_init
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.consumer import CONNECTION_ERROR
from celery.worker.consumer.tasks import Tasks
from kombu.exceptions import KombuError

from edges.connections import connect

log = logging.getLogger(__name__)

LATE_ACK_TRIES = 60
RECONNECT_S = (
    0.1,
    0.2,
    0.5,
    1.0,
)  # waits between tries; the last one until the broker is itself again
SAID_EVERY = 30  # tries
HEALTHY_AFTER_S = 5.0  # of consuming, after which the next outage begins with the shortest wait


@dataclass(frozen=True)
class TakenTask:
    """An unfinished task of this worker: where it came from, what it is called with, and the headers of our own in its message."""

    queue: str
    kwargs: Mapping[str, Any]
    headers: Mapping[str, Any]


MayTake = Callable[
    [str, Sequence[TakenTask]], bool
]  # (queue, this worker's unfinished tasks) -> may another one be taken from it?


class FleetConsumer(Consumer):
    """Acks at once, survives outages, and never gives away what its own threads still run.

    An outage is whatever the broker says instead of doing what it was asked: that it is read-only after a failover, still
    loading, out of memory or of disk, that it lacks replicas, does not know our password, for the moment. Which of these end
    by themselves nobody can tell from here, and to leave would help against none: so the consumer connects anew until all is
    well, and tasks that run go on meanwhile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.on_turn: Callable[[], None] = (
            _nothing  # told whenever this loop moves, also while it waits for the broker
        )
        super().__init__(*args, **kwargs)
        # Celery takes error replies for channel errors, and ends. Errors in setting a connection up come as KombuError.
        self.connection_errors = (
            *self.connection_errors,
            *self.channel_errors,
            redis.RedisError,
            KombuError,
        )
        self._failures = 0  # in a row
        self._connected_at: float | None = None
        self._ticks_before: set[Any] = (
            set()
        )  # what the event loop did at each turn before we connected

    def connect(self) -> Any:
        """A connection whose messages the event loop hears of. What fails half way is closed: outages may be long."""
        connection = self.connection_for_read(heartbeat=self.amqheartbeat)
        try:
            if self.hub:
                self._ticks_before = set(self.hub.on_tick)
                connection.transport.register_with_event_loop(connection.connection, self.hub)
        except Exception:
            _close(connection)
            raise
        self._connected_at = time.monotonic()
        return connection

    def ensure_connected(self, conn: Any) -> Any:
        """Try once; `start` tries again. Celery's own back-off reaches half a minute: jobs with a deadline have less."""
        self.on_turn()
        try:
            conn.ensure_connection(
                max_retries=1, interval_start=0.1, interval_step=0, reraise_as_library_errors=False
            )
        except Exception:
            _close(conn)
            raise
        self.first_connection_attempt = False
        return conn

    def call_soon_ack(self, p: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Ack or reject in the calling thread, for in a drain the event loop does not turn; pooled Redis connections allow it."""
        message = getattr(p, "__self__", None)
        try:
            p(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a closed channel after a reconnect raises whatever it likes
            log.warning("ack through the channel failed: %r", error)
        if message is not None and p.__name__ == "ack_log_error" and not message.acknowledged:
            _give_credit_back(message)
            threading.Thread(
                target=_ack_late, args=(self.app, message), name="late-ack", daemon=True
            ).start()
        if self.hub:
            self.hub.call_soon(_nothing)  # wakes the loop, which asks for the next message

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait a moment before the next try."""
        if self._failures % SAID_EVERY == 0:
            log.error(CONNECTION_ERROR, self.conninfo.as_uri(), exc, "Trying again and again ...")
        self._wait_before_the_next_try()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Reconnect without putting the messages of running tasks back, and without reading from the dead connection."""
        if self._failures % SAID_EVERY == 0:
            log.warning("the broker answers: %s", exc)  # Celery says the error's kind alone
        if self.connection is not None:
            for channel in _channels(self.connection):
                channel.do_restore = False
                channel._in_poll = None
        try:
            super().on_connection_error_after_connected(exc)
        except Exception as error:  # noqa: BLE001 - closing what is half closed must not end the worker
            log.error("closing the broker connection failed: %r", error)
            self.connection = None
        if self.hub:
            self.hub.on_tick &= (
                self._ticks_before
            )  # kombu leaves those of the dead connection there: one more a try
        self._wait_before_the_next_try()

    def _wait_before_the_next_try(self) -> None:
        if (
            self._connected_at is not None
            and time.monotonic() - self._connected_at > HEALTHY_AFTER_S
        ):
            self._failures = 0
        self._connected_at = None
        wait_s = RECONNECT_S[min(self._failures, len(RECONNECT_S) - 1)]
        self._failures += 1
        self.on_turn()
        time.sleep(
            wait_s * random.uniform(0.7, 1.0)
        )  # or all workers come back in the same instant


class TierCycle:
    """Which queues the next BRPOP names, in order; takes the place of kombu's own cycle on a channel.

    One BRPOP returns at most one message and its keys are listed just before it is sent, in the consuming thread: that
    is what makes the gate exact.
    """

    def __init__(self, queues: Sequence[str], may_take: MayTake) -> None:
        self._queues, self._may_take = queues, may_take
        self._active: set[str] = set(queues)

    def consume(self, n: int) -> list[str]:
        """The queues to ask, highest rank first; [] = ask for nothing now."""
        del n
        taken = [
            TakenTask(
                request.delivery_info.get("routing_key", ""),
                request.kwargs or {},
                request.request_dict,
            )
            for request in list(state.requests.values())
        ]
        return [
            queue
            for queue in self._queues
            if queue in self._active and self._may_take(queue, taken)
        ]

    def update(self, queues: Sequence[str]) -> None:
        """kombu tells which queues the channel consumes."""
        self._active = set(queues)

    def rotate(self, last_used: str) -> None:
        """The order is by rank, whatever was used last."""


def tier_gate(queues: Sequence[str], may_take: MayTake) -> type[bootsteps.StartStopStep]:
    """A consumer bootstep that puts a TierCycle on the channel, again after each reconnect."""

    class TierGate(bootsteps.StartStopStep):
        requires = (Tasks,)

        def start(self, c: Any) -> None:
            channel = c.task_consumer.channel
            channel._queue_cycle = TierCycle(queues, may_take)
            channel._update_queue_cycle()

    return TierGate


def run_worker(celery: Celery, arguments: Sequence[str]) -> int:
    """Run Celery's `worker` command until it is told to end; its exit status, which `worker_main` drops: 0 only if it was told to."""
    started: list[Any] = []

    def note(sender: Any, **_: Any) -> None:
        started.append(sender)

    worker_init.connect(note, weak=False)
    try:
        celery.worker_main(list(arguments))
    finally:
        worker_init.disconnect(note)
    status = started[0].exitcode if started else None
    return EX_FAILURE if status is None else int(status)


def on_turn(act: Callable[[], None]) -> type[bootsteps.StartStopStep]:
    """A consumer bootstep that calls `act` at every turn of the worker's loop; it moves while the broker is away, too."""

    class Turns(bootsteps.StartStopStep):
        def __init__(self, c: Any, **kwargs: Any) -> None:
            c.on_turn = act
            super().__init__(c, **kwargs)

        def register_with_event_loop(self, c: Any, hub: Any) -> None:
            hub.on_tick.add(act)  # a set: again after each reconnect is once

    return Turns


def _close(connection: Any) -> None:
    try:
        connection.close()
    except Exception as error:  # noqa: BLE001 - what is half open may fail in any way
        log.info("closing a connection to the broker failed: %r", error)


def _channels(connection: Any) -> list[Any]:
    found = [*getattr(connection.transport, "channels", []), connection._default_channel]
    return [channel for channel in found if channel is not None]


def _give_credit_back(message: Any) -> None:
    """Let the channel ask for another message in place of this one, whose ack failed. Else a worker all of whose threads were busy
    when the broker refused their acks would never ask again: it finds out that a broker is away by asking."""
    qos = getattr(message.channel, "_qos", None)
    if qos is not None:
        qos._quick_ack(message.delivery_tag)


def _ack_late(app: Any, message: Any) -> None:
    """Remove the message from the broker's unacked ones over a connection of its own, or it would be delivered again."""
    channel, tag = message.channel, message.delivery_tag
    for _ in range(LATE_ACK_TRIES):
        try:
            with connect(app.conf.broker_url, socket_timeout=5) as client:
                client.pipeline().zrem(channel.unacked_index_key, tag).hdel(
                    channel.unacked_key, tag
                ).execute()
            return
        except redis.RedisError:
            time.sleep(1)
    log.warning("late ack of %s given up; its redelivery will find nothing to do", tag)


def _nothing() -> None:
    """Something for the event loop to do."""
