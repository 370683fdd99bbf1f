"""gunicorn for the gateway: threads, because requests wait (long polls); one process, so that metrics add up by themselves."""

from settings import ServerSettings, load

_settings = load(ServerSettings)

bind = _settings.gateway_bind
worker_class = "gthread"
workers = _settings.web_concurrency
threads = _settings.gateway_threads
keepalive = 15
timeout = 90  # longer than the longest wait
graceful_timeout = 20
accesslog = None  # the gateway's own metrics and logs say more
control_socket_disable = True
