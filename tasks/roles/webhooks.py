"""Run the process that delivers webhooks."""

import structlog

from edges import telemetry
from edges.broker import Broker, make_celery
from edges.outbound import Outbound
from edges.progress import ENDINGS, Listener
from models.database import make_engine
from policy import connections, queues
from policy.current import CurrentFleet
from policy.fleet import Fleet
from settings import WebhookSettings
from tasks.deliver import WebhookSender
from tasks.roles.consuming import consume, process_name, register

log = structlog.get_logger(__name__)

THREADS = 16  # most wait for a receiver, with no connection to the database


def build(settings: WebhookSettings, fleet: Fleet | CurrentFleet, *, name: str) -> WebhookSender:
    """Make the sender. name: whose deliveries they are, in the audit log."""
    return WebhookSender(
        database=make_engine(settings.database_url, pool_size=connections.WEBHOOKS),
        broker=Broker(settings, fleet),
        outbound=Outbound(settings.outbound_allowed_networks),
        name=name,
        public_url=settings.public_url,
    )


def serve(settings: WebhookSettings, fleet: CurrentFleet) -> int:
    """Deliver webhooks until told to end."""
    name = process_name("webhooks")
    sender = build(settings, fleet, name=name)
    celery = make_celery(settings, fleet.fleet)
    register(celery, queues.DELIVER_WEBHOOK, sender.deliver_webhook)
    listener = Listener(settings.handoff_url, ENDINGS, sender.hear)
    telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
    log.info("database_connections", at_most=connections.at_most("webhooks"))
    try:
        return consume(celery, [queues.WEBHOOKS], name=name, threads=THREADS)
    finally:
        listener.close()
