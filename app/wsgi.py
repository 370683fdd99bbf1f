"""Expose the WSGI application: `gunicorn -c deploy/gunicorn.conf.py app.wsgi:application`."""

import structlog

from app import create_app
from app.starting import load_gateway
from edges import telemetry
from policy import connections

log = structlog.get_logger(__name__)
settings, fleet = load_gateway()
telemetry.configure_logs(settings.log_level)
for hint in settings.hints():
    log.warning("settings_hint", hint=hint)
at_most = connections.at_most(
    "gateway",
    gateway_pool_size=settings.database_pool_size,
    web_concurrency=settings.web_concurrency,
)
log.info("database_connections", at_most=at_most)
# Its metrics are served by deploy/gunicorn.conf.py, for all processes.
application = create_app(settings, fleet)
if settings.follow_revisions:
    application.extensions["darkroom"].following.start()
