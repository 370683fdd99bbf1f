"""Configure gunicorn for the gateway.

It uses threads, because requests wait (long polls, streams), and one process unless WEB_CONCURRENCY
asks for more.
"""

import gc
import importlib
import os
import resource
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from deploy.connections import BoundedWorker, Pace
from settings import GatewayProcessSettings, load

_settings = load(GatewayProcessSettings)


class GatewayWorker(BoundedWorker):
    """Run the worker with the time limits of the settings."""

    pace = Pace(
        header_timeout_s=_settings.header_timeout_s,
        body_timeout_s=_settings.body_timeout_s,
        min_bytes_per_s=_settings.gateway_min_bytes_per_s,
        max_held_bytes=_settings.gateway_buffer_bytes,
    )


worker_class = GatewayWorker
bind = _settings.gateway_bind
workers = _settings.web_concurrency
# gunicorn makes threads when they are needed. Open streams leave POST all of its own.
threads = _settings.gateway_threads + _settings.gateway_max_streams
worker_connections = _settings.gateway_max_connections
backlog = 2048
keepalive = _settings.keepalive_s
timeout = 90  # of the loop, which waits for nobody
graceful_timeout = 20
sendfile = False  # what a client does not take at once is left to the loop, which has it in memory
accesslog = None  # the gateway's own metrics and logs say more
control_socket_disable = True

# One listener for all processes: whichever answers a scrape reports all of them.
_metrics: socket.socket | None = None
if workers > 1:  # before anybody imports prometheus_client, which looks once
    # Keep the metrics apart from uploads: a process that writes to a mapped file is killed when the
    # file system is full.
    _apart = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(
        prefix="darkroom-metrics-", dir=_apart
    )

# A wrong setting or fleet must end the gateway here, in the master. If only a worker noticed it,
# gunicorn would start the next worker, for ever. After the folder of metrics: this imports them.
starting = importlib.import_module("app.starting")
starting.load_gateway.cache_clear()  # on SIGHUP this file is read anew
starting.load_gateway()


def on_starting(server: Any) -> None:
    """Bind the metrics port once, for all processes that will be started."""
    global _metrics
    if _settings.metrics_port:
        try:
            family = socket.AF_INET6 if ":" in _settings.metrics_host else socket.AF_INET
            _metrics = socket.create_server(
                (_settings.metrics_host, _settings.metrics_port), family=family
            )
        except OSError as error:
            server.log.warning("metrics_port_taken: %s: %s", _settings.metrics_port, error)


def post_worker_init(worker: Any) -> None:
    """Allow a file descriptor per connection, and end streams at once on SIGTERM.

    The clients of those streams reconnect to another process.
    """
    from edges import telemetry

    parts = worker.wsgi.extensions["darkroom"]
    gc.collect()
    # What exists now lives as long as the process: no garbage collection has to scan it again.
    gc.freeze()
    _allow_descriptors()
    if _metrics is not None:
        telemetry.serve_metrics_on(_metrics, of_all_processes=workers > 1)
    parts.readiness.start()
    _at_once_on_sigterm(parts.events.close)


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _at_once_on_sigterm(act: Callable[[], None]) -> None:
    """Have `act` called on SIGTERM before what gunicorn does then."""
    stop = signal.getsignal(signal.SIGTERM)
    assert callable(stop)  # gunicorn has set its own

    def end(signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=act).start()  # a handler must not wait for a lock
        stop(signum, frame)

    signal.signal(signal.SIGTERM, end)


def child_exit(server: Any, worker: Any) -> None:
    """Drop the gauges of a process that ended; its counters stay."""
    if workers > 1:
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(worker.pid)


def on_exit(server: Any) -> None:
    """Remove the metrics' temporary folder."""
    if workers > 1:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
