"""Adapt Celery's consumer to GPU workers on the Redis transport.

Uses private names of Celery 5.7 and kombu 5.7. Celery's own consumer holds acks back during a warm
shutdown until the slowest task ends, delivers running tasks again after any lost connection, and
exits when Redis is away for a few seconds with tasks in flight, or answers one command with an
error: then every model of the fleet would be loaded again. FleetConsumer does none of that.
TierCycle decides, each time the worker asks the broker for one more message, which queues it asks:
so a job of a lower tier is never taken while its tier has no room.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis
from celery import Celery, bootsteps
from celery.platforms import EX_FAILURE
from celery.signals import worker_init
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.consumer import CONNECTION_ERROR
from celery.worker.consumer.tasks import Tasks
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.exceptions import KombuError

from edges.connections import connect

log = logging.getLogger(__name__)

LATE_ACK_TRIES = 60
RECONNECT_S = (0.1, 0.2, 0.5, 1.0)  # waits between tries; the last one is repeated
SAID_EVERY = 30  # tries, between two log lines
HEALTHY_AFTER_S = 5.0  # of consuming, after which the next outage begins with the shortest wait


@dataclass(frozen=True)
class TakenTask:
    """Describe an unfinished task of this worker: its queue, its arguments, our own headers."""

    queue: str
    kwargs: Mapping[str, Any]
    headers: Mapping[str, Any]


# (queue, this worker's unfinished tasks) -> whether another one may be taken from it
MayTake = Callable[[str, Sequence[TakenTask]], bool]


class FleetConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Ack at once, survive outages, and never put back tasks that its own threads still run.

    An outage is any error reply of the broker: read-only after a failover, still loading, out of
    memory or disk, too few replicas, an unknown password. The worker cannot tell which of these end
    by themselves, and exiting would help against none. So the consumer reconnects until the broker
    works, and running tasks go on meanwhile.
    """

    connection: Connection | None
    connection_errors: tuple[type[Exception], ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Called at every turn of this loop, also while it waits for the broker.
        self.on_turn: Callable[[], None] = _nothing
        super().__init__(*args, **kwargs)
        # Celery treats error replies as channel errors, and ends. Errors in setting a connection
        # up come as KombuError.
        self.connection_errors = (
            *self.connection_errors,
            *self.channel_errors,
            redis.RedisError,
            KombuError,
        )
        self._failures = 0  # in a row
        self._connected_at: float | None = None
        # The event loop's callbacks of each turn, before we connected.
        self._ticks_before: set[Any] = set()

    def connect(self) -> Any:
        """Open a connection and register it with the event loop; close it if that fails."""
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
        """Try to connect once; `start` tries again.

        Celery's own back-off reaches half a minute, which jobs with a deadline do not have.
        """
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
        """Ack or reject in the calling thread, which pooled Redis connections allow.

        Not in the event loop, because that does not turn during a warm shutdown.
        """
        message = getattr(p, "__self__", None)
        try:
            p(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a channel closed by a reconnect raises anything
            log.warning("ack through the channel failed: %r", error)
        if message is not None and p.__name__ == "ack_log_error" and not message.acknowledged:
            _give_credit_back(message)
            late = (self.app, message)
            threading.Thread(target=_ack_late, args=late, name="late-ack", daemon=True).start()
        if self.hub:
            self.hub.call_soon(_nothing)  # wakes the loop, which asks for the next message

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait a moment before the next try."""
        if self._failures % SAID_EVERY == 0:
            log.error(CONNECTION_ERROR, self.conninfo.as_uri(), exc, "Trying again and again ...")
        self._wait_before_the_next_try()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Reconnect, but put no message of a running task back and read no dead connection."""
        if self._failures % SAID_EVERY == 0:
            log.warning("the broker answers: %s", exc)  # Celery says the error's kind alone
        if self.connection is not None:
            for channel in _channels(self.connection):
                channel.do_restore = False
                channel._in_poll = None
        try:
            super().on_connection_error_after_connected(exc)
        except Exception as error:  # noqa: BLE001 - an error in closing must not end the worker
            log.error("closing the broker connection failed: %r", error)
            self.connection = None
        if self.hub:
            # kombu leaves the callbacks of the dead connection there, one more with each try.
            self.hub.on_tick &= self._ticks_before
        self._wait_before_the_next_try()

    def _wait_before_the_next_try(self) -> None:
        connected_at = self._connected_at
        if connected_at is not None and time.monotonic() - connected_at > HEALTHY_AFTER_S:
            self._failures = 0
        self._connected_at = None
        wait_s = RECONNECT_S[min(self._failures, len(RECONNECT_S) - 1)]
        self._failures += 1
        time.sleep(wait_s * random.uniform(0.7, 1.0))  # so that not all workers reconnect at once


class TierCycle:
    """List the queues that the next BRPOP names, in order; replaces kombu's own cycle on a channel.

    One BRPOP returns at most one message, and its keys are listed just before it is sent, in the
    consuming thread. So no queue is asked that has no room.
    """

    def __init__(
        self,
        queues: Callable[[], Sequence[str]],
        may_take: MayTake,
        begin: Callable[[str], None],
    ) -> None:
        """Know what to ask. queues: lists them; the fleet may get more while the worker runs.

        begin: consumes a queue that the channel does not consume yet.
        """
        self._queues = queues
        self._may_take = may_take
        self._begin = begin
        self._active: set[str] = set(queues())

    def consume(self, n: int) -> list[str]:
        """List the queues to ask, highest rank first; [] = ask for nothing now."""
        del n
        taken = [
            TakenTask(
                request.delivery_info.get("routing_key", ""),
                request.kwargs or {},
                request.request_dict,
            )
            for request in list(state.requests.values())
        ]
        queues = self._queues()
        for queue in queues:
            if queue not in self._active:
                self._begin(queue)
        return [queue for queue in queues if self._may_take(queue, taken)]

    def update(self, queues: Sequence[str]) -> None:
        """Note which queues the channel consumes; kombu calls this."""
        self._active = set(queues)

    def rotate(self, last_used: str) -> None:
        """Do nothing: the order is by rank, whatever queue was used last."""


def tier_gate(
    queues: Callable[[], Sequence[str]], may_take: MayTake
) -> type[bootsteps.StartStopStep]:
    """Make a consumer bootstep that puts a TierCycle on the channel after each connect.

    queues: lists those that the worker consumes now.
    """

    class TierGate(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
        requires = (Tasks,)

        def start(self, c: Any) -> None:
            channel = c.task_consumer.channel
            channel._queue_cycle = TierCycle(queues, may_take, partial(_consume_too, c))
            channel._update_queue_cycle()

    return TierGate


def _consume_too(consumer: Any, name: str) -> None:
    """Consume one more queue from now on, also after a reconnect."""
    queue = consumer.app.amqp.queues.select_add(Queue(name, routing_key=name))
    consumer.task_consumer.add_queue(queue)
    consumer.task_consumer.consume()


def run_worker(celery: Celery, arguments: Sequence[str]) -> int:
    """Run Celery's `worker` command until it is told to end, and return its exit status.

    `worker_main` drops the status. It is 0 only if the worker was told to end.
    """
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
    """Make a consumer bootstep that calls `act` at every turn of the worker's loop.

    The loop also turns while the broker is away.
    """

    class Turns(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
        def __init__(self, c: Any, **kwargs: Any) -> None:
            c.on_turn = act
            super().__init__(c, **kwargs)

        def register_with_event_loop(self, c: Any, hub: Any) -> None:
            hub.on_tick.add(act)  # a set: adding it again after a reconnect changes nothing

    return Turns


def _close(connection: Any) -> None:
    try:
        connection.close()
    except Exception as error:  # noqa: BLE001 - a half-open connection may fail in any way
        log.info("closing a connection to the broker failed: %r", error)


def _channels(connection: Any) -> list[Any]:
    found = [*getattr(connection.transport, "channels", []), connection._default_channel]
    return [channel for channel in found if channel is not None]


def _give_credit_back(message: Any) -> None:
    """Let the channel ask for another message in place of this one, whose ack failed.

    Otherwise a worker whose threads were all busy when the broker refused their acks would never
    ask again, and only by asking does it notice that a broker is away.
    """
    qos = getattr(message.channel, "_qos", None)
    if qos is not None:
        qos._quick_ack(message.delivery_tag)


def _ack_late(app: Any, message: Any) -> None:
    """Remove the message from the broker's unacked ones, over a connection of its own.

    Otherwise it would be delivered again.
    """
    channel, tag = message.channel, message.delivery_tag
    for _ in range(LATE_ACK_TRIES):
        try:
            with connect(app.conf.broker_url, socket_timeout=5) as client:
                pipe = client.pipeline().zrem(channel.unacked_index_key, tag)
                pipe.hdel(channel.unacked_key, tag).execute()
            return
        except redis.RedisError:
            time.sleep(1)
    log.warning("late ack of %s given up; its redelivery will find nothing to do", tag)


def _nothing() -> None:
    """Do nothing; the event loop wakes to call it."""
