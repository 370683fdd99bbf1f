"""Celery's consumer, as a GPU worker on the Redis transport needs it. Leans on private names of Celery 5.7 and kombu 5.7.

Celery's own consumer holds acks back until the slowest task of a drain ends, hands running tasks out a second time
after any lost connection, and exits when Redis is away for a few seconds with tasks in flight: every model of the fleet
would be loaded again. FleetConsumer does none of that. TierCycle decides, each time the worker asks the broker for one
more message, which queues it asks: so a job of a lower tier is never taken while its tier has no room.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from celery import bootsteps
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks

log = logging.getLogger(__name__)

LATE_ACK_TRIES = 20


@dataclass(frozen=True)
class TakenTask:
    """An unfinished task of this worker: where it came from, what it is called with, and the headers of our own in its message."""

    queue: str
    kwargs: Mapping[str, Any]
    headers: Mapping[str, Any]


MayTake = Callable[[str, Sequence[TakenTask]], bool]  # (queue, this worker's unfinished tasks) -> may another one be taken from it?


class FleetConsumer(Consumer):
    """Acks at once, survives outages, and never gives away what its own threads still run."""

    def call_soon_ack(self, p: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Ack or reject in the calling thread, for in a drain the event loop does not turn; pooled Redis connections allow it."""
        message = getattr(p, "__self__", None)
        try:
            p(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a closed channel after a reconnect raises whatever it likes
            log.warning("ack through the channel failed: %r", error)
        if message is not None and p.__name__ == "ack_log_error" and not message.acknowledged:
            threading.Thread(target=_ack_late, args=(self.app, message), name="late-ack", daemon=True).start()
        if self.hub:
            self.hub.call_soon(_nothing)  # wakes the loop, which asks for the next message

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Reconnect without putting the messages of running tasks back, and without reading from the dead connection."""
        if self.connection is not None:
            for channel in _channels(self.connection):
                channel.do_restore = False
                channel._in_poll = None
        try:
            super().on_connection_error_after_connected(exc)
        except Exception as error:  # noqa: BLE001 - closing what is half closed must not end the worker
            log.error("closing the broker connection failed: %r", error)
            self.connection = None


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
            TakenTask(request.delivery_info.get("routing_key", ""), request.kwargs or {}, request.request_dict)
            for request in list(state.requests.values())
        ]
        return [queue for queue in self._queues if queue in self._active and self._may_take(queue, taken)]

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


def _channels(connection: Any) -> list[Any]:
    found = [*getattr(connection.transport, "channels", []), connection._default_channel]
    return [channel for channel in found if channel is not None]


def _ack_late(app: Any, message: Any) -> None:
    """Remove the message from the broker's unacked ones over a connection of its own, or it would be delivered again."""
    channel, tag = message.channel, message.delivery_tag
    for _ in range(LATE_ACK_TRIES):
        try:
            with redis.Redis.from_url(app.conf.broker_url, socket_timeout=5, socket_connect_timeout=2) as client:
                client.pipeline().zrem(channel.unacked_index_key, tag).hdel(channel.unacked_key, tag).execute()
            return
        except redis.RedisError:
            time.sleep(1)
    log.warning("late ack of %s given up; its redelivery will find nothing to do", tag)


def _nothing() -> None:
    """Something for the event loop to do."""
