"""The door that gunicorn opens: `gunicorn -c deploy/gunicorn.conf.py app.wsgi:application`."""

from app import create_app
from edges import telemetry
from settings import GatewaySettings, load, load_fleet_or_exit

settings = load(GatewaySettings)
telemetry.configure_logs(settings.log_level)
application = create_app(settings, load_fleet_or_exit(settings))  # its metrics are served by deploy/gunicorn.conf.py, for all processes
