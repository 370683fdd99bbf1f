"""The door that gunicorn opens: `gunicorn -c deploy/gunicorn.conf.py app.wsgi:application`."""

import structlog

from app import create_app
from edges import telemetry
from settings import load_gateway

log = structlog.get_logger(__name__)
settings, fleet = load_gateway()
telemetry.configure_logs(settings.log_level)
for hint in settings.hints():
    log.warning("settings_hint", hint=hint)
application = create_app(settings, fleet)
telemetry.serve_metrics(settings.metrics_port, settings.metrics_host)
