"""gunicorn for the gateway: threads, because requests wait (long polls, streams); one process, so that metrics add up by themselves."""

import gc
import resource
import signal
import threading
from types import FrameType
from typing import Any

from settings import load_gateway

# Here, in the master, what is wrong ends the gateway. If only a worker noticed, gunicorn would start the next one, for ever.
load_gateway.cache_clear()  # on SIGHUP this file is read anew
_settings, _ = load_gateway()

bind = _settings.gateway_bind
worker_class = "gthread"
workers = _settings.web_concurrency
threads = _settings.gateway_threads + _settings.gateway_max_streams  # made when they are needed; open streams leave POST all of its own
worker_connections = threads + 1024  # those that wait for their client's next request
keepalive = 15
timeout = 90  # longer than the longest wait
graceful_timeout = 20
accesslog = None  # the gateway's own metrics and logs say more
control_socket_disable = True


def post_worker_init(worker: Any) -> None:
    """Room for a file per connection, and streams that end at once on SIGTERM: their clients go on elsewhere."""
    gc.collect()
    gc.freeze()  # what is there now lives as long as the process: no collection has to walk through it again
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65_536), hard))
    stop = signal.getsignal(signal.SIGTERM)

    def end(signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=worker.wsgi.extensions["darkroom"].events.close).start()  # a handler must not wait for a lock
        stop(signum, frame)

    signal.signal(signal.SIGTERM, end)
