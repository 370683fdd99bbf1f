"""Queues and delivery promises, derived from settings and fleet.toml.

Postgres holds the truth; a message only says "look at job X". So a lost message costs seconds (the
sweeper announces again) and a doubled one costs a refused claim. Every choice below serves speed
and availability, not exactly-once delivery.
"""

from typing import Any

from kombu.entity import Queue

from policy import queues
from policy.fleet import Fleet
from settings import BrokerSettings

# What holds of every role, whatever the settings.
PROMISES: dict[str, Any] = {
    "result_backend": None,  # results live in Postgres and the object store
    "task_ignore_result": True,
    # Every message of ours names its queue; Celery wants a default all the same.
    "task_default_queue": queues.WEBHOOKS,
    # A misspelt queue is an error, not a place where jobs wait for ever.
    "task_create_missing_queues": False,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    # The API must not wait for a broker that is down; the sweeper publishes.
    "task_publish_retry": False,
    "task_serializer": "json",
    "accept_content": ["json"],
    # One CUDA context and one copy of the weights; prefork hangs after torch was used.
    "worker_pool": "threads",
    "worker_consumer": "fleet.consumer:FleetConsumer",  # the stock one dies in a Redis outage
    "worker_prefetch_multiplier": 1,
    # Never take more than the free threads can run, also after a reconnect.
    "worker_disable_prefetch": True,
    "worker_soft_shutdown_timeout": 0,  # broken with threads in 5.7, as are time limits
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
    "worker_send_task_events": True,  # Flower lists the tasks
    "task_send_sent_event": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,  # 100 by default, then the worker gives up
}
TRANSPORT: dict[str, Any] = {
    # The lease does the recovery; a late redelivery is a duplicate that take() refuses.
    "visibility_timeout": 3600,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,  # the default cadence is 100 s
    # By default a worker killed in a restore blocks the next one for 300 s.
    "unacked_mutex_expire": 15,
    "queue_order_strategy": "priority",  # until TierCycle takes over
    "socket_timeout": 5,  # a frozen broker is an error after 5 s, not a hang
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 15,
    "polling_interval": 0.2,  # the wait of one BRPOP: how soon a freed slot is noticed
}


def delivery(settings: BrokerSettings, fleet: Fleet) -> dict[str, Any]:
    """Return Celery's configuration for every role: Celery 5.7 and kombu 5.7, Redis transport."""
    return PROMISES | {
        "broker_url": settings.broker_url,
        "broker_transport_options": dict(TRANSPORT),
        # Each queue has its own routing key. Otherwise Celery gives all of them the default queue's
        # key, and every queue gets every message.
        "task_queues": [Queue(name, routing_key=name) for name in queues.all_queues(fleet)],
    }
