"""Publish Celery messages about jobs. The only publisher; no other module here knows Celery.

A message carries the job's id. A message to render also carries the number of images, which a
worker has to know before it asks for the lease. The task id is `<job id>:<verb>`, so that Flower,
the sweeper and a human at redis-cli can all tell which job a message means.
"""

import base64
import json
import uuid
from typing import Any

import redis
from celery import Celery
from celery.exceptions import QueueNotFound
from kombu.entity import Queue
from kombu.exceptions import KombuError

import celeryconfig
from edges.connections import connect
from edges.errors import wrap
from policy import queues
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from settings import BrokerSettings

PROBE = "darkroom:probe"  # the key that `check` writes
VERBS = {queues.RENDER_JOB: "render", queues.STORE_IMAGES: "store", queues.STAGE_INPUTS: "stage"}


class BrokerUnavailable(Exception):
    """The message was not published; the sweeper will find the row."""


class Broker:
    """Publish to the queues, and look at what waits in them."""

    def __init__(self, settings: BrokerSettings, fleet: Fleet | CurrentFleet) -> None:
        self._current = current(fleet)
        # An app of its own, for publishing alone. With retry=False kombu still tries to connect
        # for 6 s; max_retries=0 stops that.
        options = celeryconfig.delivery(settings, self._current.fleet)["broker_transport_options"]
        once = options | {"max_retries": 0}
        self._celery = make_celery(settings, self._current.fleet, broker_transport_options=once)
        self._redis = connect(settings.broker_url, socket_timeout=5)

    def announce(
        self, task_name: str, queue: str, job_id: uuid.UUID, *, num_images: int | None = None
    ) -> None:
        """Publish one message about the job, in one try. Raises BrokerUnavailable.

        num_images: given for a job that is to be rendered.
        """
        headers = {queues.NUM_IMAGES: num_images} if num_images is not None else {}
        self._send(
            task_name,
            queue,
            kwargs={"job_id": str(job_id)},
            task_id=f"{job_id}:{VERBS[task_name]}",
            headers=headers,
        )

    def ask_for(self, task_name: str, queue: str) -> None:
        """Publish one message for a task without a job, in one try. Raises BrokerUnavailable."""
        self._send(task_name, queue)

    def ask_to_deliver(self, delivery_id: uuid.UUID) -> None:
        """Publish one message that a webhook delivery is due. Raises BrokerUnavailable."""
        self._send(
            queues.DELIVER_WEBHOOK,
            queues.WEBHOOKS,
            kwargs={"delivery_id": str(delivery_id)},
            task_id=f"{delivery_id}:deliver",
        )

    def waiting(self, queue: str) -> int:
        """Count the messages in `queue` that no worker has taken. Raises BrokerUnavailable."""
        return int(self._ask("llen", queue))

    def next_job(self, queue: str) -> uuid.UUID | None:
        """Return the job whose message is taken next. Raises BrokerUnavailable.

        None if the queue is empty or the message is not one of ours.
        """
        raw = self._ask("lindex", queue, -1)
        return None if raw is None else job_of_message(raw)

    def check(self) -> None:
        """Raise BrokerUnavailable unless the broker accepts a write.

        A ping would not do: a read-only Redis answers it.
        """
        self._ask("set", PROBE, 1, 60)  # seconds

    def _send(self, task_name: str, queue: str, **options: Any) -> None:
        self._learn(queue)
        theirs = (KombuError, redis.RedisError, OSError, QueueNotFound)
        with wrap(theirs, BrokerUnavailable), self._celery.producer_or_acquire() as producer:
            try:
                self._celery.send_task(
                    task_name, queue=queue, retry=False, producer=producer, **options
                )
            except (KombuError, redis.RedisError):
                # A demoted primary keeps its clients: the next message takes a new connection.
                producer.connection.collect()
                raise

    def _learn(self, queue: str) -> None:
        """Make a queue known to Celery that the fleet has got since this process started."""
        known = self._celery.amqp.queues
        if queue not in known and queue in queues.all_queues(self._current.fleet):
            known.add(Queue(queue, routing_key=queue))

    def _ask(self, command: str, *arguments: Any) -> Any:
        with wrap(redis.RedisError, BrokerUnavailable):
            return getattr(self._redis, command)(*arguments)


def make_celery(settings: BrokerSettings, fleet: Fleet, **extra: Any) -> Celery:
    """Make a Celery app with our delivery settings; `extra` are further Celery settings."""
    celery = Celery("darkroom", set_as_current=False)
    celery.conf.update(celeryconfig.delivery(settings, fleet), **extra)
    return celery


def job_of_message(raw: bytes) -> uuid.UUID | None:
    """Return the job that a raw message of the Redis transport means; None if it is not ours."""
    try:
        message = json.loads(raw)
        task_id = message["headers"].get("id") or message["properties"]["correlation_id"]
        return uuid.UUID(str(task_id).partition(":")[0])
    except (ValueError, KeyError, TypeError, AttributeError):
        try:
            arguments = json.loads(base64.b64decode(json.loads(raw)["body"]))
            return uuid.UUID(arguments[1]["job_id"])
        except (ValueError, KeyError, TypeError, IndexError):
            return None
