"""Write structured logs to standard error, and serve Prometheus metrics on a port of their own.

A log event is constant and its data are fields; ids, never whole objects or prompts.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import structlog
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext

from models.database import CONFLICTS
from models.tables import Job
from policy import tracecontext
from policy.version import VERSION

log = structlog.get_logger(__name__)

BUILD_INFO = Gauge(
    "darkroom_build_info",
    "1, with the version that this process runs",
    ["version"],
    multiprocess_mode="livemax",
)
BUILD_INFO.labels(VERSION).set(1)
FLEET_REVISION = Gauge(
    "darkroom_fleet_revision",
    "Number of the revision of the fleet that this process goes by; 0: of its file",
    multiprocess_mode="livemin",
)
FLEET_UNREADABLE = Counter(
    "darkroom_fleet_unreadable_total", "Revisions of the fleet that this release cannot read"
)
HTTP_REQUESTS = Counter(
    "darkroom_http_requests_total", "Answers of the gateway", ["method", "route", "status"]
)
HTTP_SECONDS = Histogram(
    "darkroom_http_request_seconds",
    "Time to answer a request, without the wait for a job's end",
    ["method", "route"],
)
JOBS_ACCEPTED = Counter("darkroom_jobs_accepted_total", "Jobs written", ["tier", "model"])
JOBS_ERASED = Counter("darkroom_jobs_erased_total", "Jobs whose content was erased")
REQUESTS_REPLAYED = Counter(
    "darkroom_requests_replayed_total", "Requests repeated with the same Idempotency-Key"
)
IMAGES_RENDERED = Counter("darkroom_images_rendered_total", "Images handed off", ["tier", "model"])
IMAGES_SUSPECT = Counter(
    "darkroom_images_suspect_total",
    "Images that probably show nothing: black, white, flat, noise",
    ["model", "why"],
)
DEVICE_SECONDS = Counter(
    "darkroom_device_seconds_total", "Device time of rendered images", ["tier", "model"]
)
JOBS_ENDED = Counter(
    "darkroom_jobs_ended_total", "Jobs that came to a final state", ["tier", "model", "state"]
)
JOB_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 900, 3600, 14400, 86400)
JOB_SECONDS = Histogram(
    "darkroom_job_seconds",
    "From accepting a job that succeeded until its images were stored",
    ["tier"],
    buckets=JOB_BUCKETS_S,
)
JOB_WAIT_SECONDS = Histogram(
    "darkroom_job_wait_seconds",
    "From accepting a job that succeeded until a worker began with it",
    ["tier"],
    buckets=JOB_BUCKETS_S,
)
JOB_PREVIEW_SECONDS = Histogram(
    "darkroom_job_first_preview_seconds",
    "From accepting a job that succeeded until its first preview, if it had one",
    ["tier"],
    buckets=JOB_BUCKETS_S,
)
JOB_ETA_RATIO = Histogram(
    "darkroom_job_eta_ratio",
    "Time of a job that succeeded / the 90 % estimate at accept; 9 of 10 should be up to 1",
    ["tier"],
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10),
)
# A load from a disk takes up to minutes.
LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
LOAD_SECONDS = Histogram(
    "darkroom_model_load_seconds",
    "Time of each phase in which a model comes into a device's memory or leaves it",
    ["phase"],
    buckets=LOAD_BUCKETS_S,
)
LOAD_WAIT_SECONDS = Histogram(
    "darkroom_model_wait_seconds",
    "Time that jobs held by a worker waited for their model to be loaded",
    buckets=LOAD_BUCKETS_S,
)
TEXTS_UNREAD = Counter(
    "darkroom_texts_unread_total",
    "Jobs with a text of which the model did not read all",
    ["model", "code"],
)
RENDER_ERRORS = Counter("darkroom_render_errors_total", "Attempts that ended in an error", ["kind"])
LEASES_LOST = Counter("darkroom_leases_lost_total", "Leases that a worker has lost")
PREEMPTED = Counter(
    "darkroom_jobs_preempted_total", "Jobs handed to other workers because the worker had to stop"
)
NOTICES = Counter(
    "darkroom_notices_total", "Notices that the worker's machine will be taken away", ["source"]
)
UNFIT = Counter(
    "darkroom_workers_unfit_total", "Times that this worker stopped because it could not go on"
)
CHECKPOINTS = Counter("darkroom_checkpoints_total", "Snapshots kept while rendering")
SNAPSHOTS_REFUSED = Counter(
    "darkroom_snapshots_refused_total",
    "Snapshots that could not be used, so that an image began again",
)
STEPS_RESUMED = Counter("darkroom_steps_resumed_total", "Denoise steps that snapshots saved")
STEPS_LOST = Counter(
    "darkroom_steps_lost_total",
    "Denoise steps done again, by the outcome of the attempt that had done them",
    ["cause"],
)
PICTURES_KEPT = Counter(
    "darkroom_pictures_kept_total",
    "Pictures that tenants sent and that were stored, or were stored already",
    ["way"],
)
PICTURES_REFUSED = Counter(
    "darkroom_pictures_refused_total", "Pictures that tenants sent and that cannot be used"
)
DECODERS_DIED = Counter(
    "darkroom_decoders_died_total", "Pictures that killed the process that decoded them"
)
PICTURE_SECONDS = Histogram(
    "darkroom_picture_seconds",
    "Time to check and encode a picture of a tenant, including the wait for a decoder",
)
INPUTS_BROUGHT = Counter(
    "darkroom_inputs_brought_total",
    "Pictures copied to the hand-off for jobs that start from them",
)
INPUTS_GONE = Counter(
    "darkroom_inputs_gone_total", "Pictures that a job starts from and that are not in the store"
)
INPUT_WAIT_SECONDS = Histogram(
    "darkroom_input_wait_seconds",
    "From requesting the pictures of a job until they are in the hand-off",
)
JOBS_LACKING_INPUTS = Gauge(
    "darkroom_jobs_lacking_inputs",
    "Jobs whose pictures were requested and have not arrived",
    ["pool", "tier"],
)
PREVIEWS_DROPPED = Counter(
    "darkroom_previews_dropped_total", "Previews dropped because the hand-off was half full"
)
IMAGES_STORED = Counter("darkroom_images_stored_total", "Artifacts committed", ["tier", "format"])
STORED_BYTES = Counter("darkroom_stored_bytes_total", "Bytes of committed artifacts")
LAST_TURN = Gauge(
    "darkroom_last_turn_timestamp_seconds",
    "When a loop of this process last ran, in Unix time",
    ["loop"],
)
AWAY_SECONDS = Gauge(
    "darkroom_away_seconds",
    "How long the sweeper could not write to a part",
    ["part"],
)
DUPLICATES = Counter(
    "darkroom_duplicate_messages_total", "Messages for which there was nothing to do", ["task"]
)
SWEPT = Counter("darkroom_swept_total", "Rows the sweeper acted on", ["why"])
SHED = Counter(
    "darkroom_shed_total", "Requests refused although they could be rendered", ["reason"]
)
EVENT_STREAMS = Gauge("darkroom_event_streams", "Open event streams", multiprocess_mode="livesum")
WAITS = Gauge(
    "darkroom_waiting_clients",
    "Clients whose request waits for a job's end",
    multiprocess_mode="livesum",
)
UPLOADS = Gauge(
    "darkroom_uploads_in_progress",
    "Request bodies over 64 KiB that are being received or used",
    multiprocess_mode="livesum",
)
SPOOLED_BYTES = Gauge(
    "darkroom_upload_spool_reserved_bytes",
    "Bytes of the temporary folder that are reserved for uploads",
    multiprocess_mode="livesum",
)
EVENTS_SENT = Counter("darkroom_events_sent_total", "Events sent to event streams", ["kind"])
EVENTS_DROPPED = Counter(
    "darkroom_events_dropped_total", "Events dropped because a client read too slowly", ["kind"]
)
WEBHOOK_ATTEMPTS = Counter(
    "darkroom_webhook_attempts_total",
    "Attempts at deliveries: delivered, 3xx, 4xx, 5xx, unreachable",
    ["outcome"],
)
WEBHOOK_SECONDS = Histogram(
    "darkroom_webhook_attempt_seconds",
    "Time until a receiver answered, or the attempt was given up",
)
WEBHOOKS_DEFERRED = Counter(
    "darkroom_webhooks_deferred_total",
    "Deliveries deferred because of the limits for an endpoint, a tenant or slow endpoints",
)
WEBHOOKS_PENDING = Gauge(
    "darkroom_webhooks_pending", "Deliveries that have not ended; 10,000 means 10,000 or more"
)
SLO_TARGET = Gauge(
    "darkroom_slo_target_ratio",
    "Part of a tier's jobs that is to meet an objective",
    ["tier", "objective"],
)
SLO_ATTAINMENT = Gauge(
    "darkroom_slo_attainment_ratio",
    "Part of the jobs that ended within a span and met an objective; 1 without a job",
    ["tier", "objective", "span"],
)
SLO_JOBS = Gauge(
    "darkroom_slo_jobs",
    "Jobs that ended within a span and count for an objective",
    ["tier", "objective", "span"],
)
TENANTS_OVER_BUDGET = Gauge(
    "darkroom_tenants_over_budget", "Tenants that have spent their budget of this month"
)
AUDIT_MONTHS_AHEAD = Gauge(
    "darkroom_audit_months_ahead",
    "Coming months for which the audit log has a partition; normally 12",
)
AUTH_FAILURES = Counter(
    "darkroom_auth_failures_total",
    "Requests refused for their API key: no_key, bad_key, scope",
    ["why"],
)
CONFLICTED = Counter(
    "darkroom_transaction_conflicts_total",
    "Transactions repeated after a conflict with another one",
    ["kind"],
)
LIMITS_LOCAL = Counter(
    "darkroom_limits_local_total",
    "Limits counted in one process only, or not at all, because Redis could not be reached",
    ["limit"],
)
HANDOFF_FILL = Gauge(
    "darkroom_handoff_fill_ratio",
    "Memory of the hand-off in use / its maxmemory",
    multiprocess_mode="livemax",
)
QUEUE_JOBS = Gauge("darkroom_queue_jobs", "Unfinished jobs", ["pool", "tier", "state"])
OLDEST_WAIT = Gauge(
    "darkroom_queue_oldest_wait_seconds", "Age of the oldest queued job", ["pool", "tier"]
)
LIVE_WORKERS = Gauge(
    "darkroom_live_workers", "Workers that sent a heartbeat within a lease", ["pool"]
)
FAILING_WORKERS = Gauge(
    "darkroom_failing_workers", "Workers that do not get ready, however often started", ["pool"]
)
QUARANTINED_DEVICES = Gauge(
    "darkroom_quarantined_devices",
    "Devices that were lost twice, and on which no worker is started",
    ["pool"],
)
MODELS_NOT_LOADED = Gauge(
    "darkroom_models_not_loaded",
    "Live workers that cannot load a version of a model",
    ["pool", "model"],
)
WEIGHTS_STAGE_SECONDS = Histogram(
    "darkroom_weights_stage_seconds",
    "Time to bring a file of weights to this machine: wait, download, verify",
    ["phase"],
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
)
WEIGHTS_FETCHED_BYTES = Counter(
    "darkroom_weights_fetched_bytes_total", "Bytes of weights fetched: s3, hub", ["source"]
)
INFLIGHT = Gauge("darkroom_engine_inflight_images", "Images resident on the device")
FORWARDS = Gauge("darkroom_engine_forwards", "Denoiser forwards since start")
SLOW_FORWARDS = Gauge(
    "darkroom_engine_slow_forwards", "Forwards of over three times the usual seconds, since start"
)
MEAN_ROWS = Gauge("darkroom_engine_mean_rows", "Mean rows of a denoiser forward since start")
PARKED = Gauge(
    "darkroom_engine_parked_images", "Images that are parked for images of a better rank"
)
ENGINE_SECONDS = Gauge(
    "darkroom_engine_seconds",
    "Device time since start; padding is part of denoise; loads and idle are time without images",
    ["stage"],
)
CACHE_LOOKUPS = Gauge(
    "darkroom_engine_cache_lookups",
    "Lookups since start; hits / (hits + misses) is the hit rate",
    ["cache", "outcome"],
)
CACHE_BYTES = Gauge("darkroom_engine_cache_bytes", "Bytes that a cache holds", ["cache"])

# Libraries that say too much below a warning.
_TALKATIVE = (
    "botocore",
    "boto3",
    "urllib3",
    "kombu",
    "celery.redirected",
    "celery.worker.strategy",
    "celery.app.trace",
)


@event.listens_for(Engine, "handle_error")
def _note_conflict(failed: ExceptionContext) -> None:
    kind = CONFLICTS.get(getattr(failed.original_exception, "pgcode", None) or "")
    if kind is not None:
        CONFLICTED.labels(kind).inc()


def _write(line: str) -> None:
    """Write one line to standard error by one system call, without a lock.

    The kernel keeps the lines apart. A lock would be held while its thread waits for the
    interpreter, all other threads would wait for the lock, and a busy gateway would do little else.
    """
    left = memoryview(f"{line}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):  # nobody listens any more
        while left:
            left = left[os.write(2, left) :]


class _OwnLogger:
    """Write our own events, rendered already."""

    def msg(self, line: str) -> None:
        _write(line)

    debug = info = warning = error = critical = msg


class _ForeignHandler(logging.Handler):
    """Write the log records of the libraries, and of the engine, which uses plain `logging`."""

    def createLock(self) -> None:
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record))


def configure_logs(level: str = "INFO") -> None:
    """Write one JSON object a line to standard error, for our own events and the libraries'."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=lambda *names: _OwnLogger(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_foreign_handler(shared)]
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def _foreign_handler(shared: Sequence[structlog.typing.Processor]) -> logging.Handler:
    """Return a handler that writes what libraries log as our own events are written."""
    # ExtraAdder: the engine passes its fields as `extra`.
    foreign: list[structlog.typing.Processor] = [
        *shared,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
    ]
    renderer: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.JSONRenderer(),
    ]
    handler = _ForeignHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=renderer, foreign_pre_chain=foreign)
    )
    return handler


def bind_request_of(job: Job) -> None:
    """Have what this thread logs name the request that made the job, and its trace."""
    if job.request_id is not None:
        structlog.contextvars.bind_contextvars(request_id=job.request_id)
    if job.traceparent is not None:
        structlog.contextvars.bind_contextvars(trace_id=tracecontext.trace_id(job.traceparent))


def loop(name: str) -> Callable[[], None]:
    """Return a function to call at every turn of the named loop; `deploy.health` expects turns.

    A loop also turns while it waits for a part that is away: a restart would not help then.
    """
    last_turn = LAST_TURN.labels(name)
    last_turn.set_to_current_time()
    return last_turn.set_to_current_time


def end_loop(name: str) -> None:
    """Say that the named loop ended on purpose: no more turns are expected of it."""
    with contextlib.suppress(KeyError):
        LAST_TURN.remove(name)


def watch_engine(stats: Callable[[], Mapping[str, Any]]) -> None:
    """Have a scrape read the engine's own numbers."""

    def read(gauge: Gauge, key: str, **labels: str) -> None:
        (gauge.labels(**labels) if labels else gauge).set_function(lambda: stats()[key])

    read(INFLIGHT, "inflight")
    read(PARKED, "parked")
    read(FORWARDS, "steps")
    read(SLOW_FORWARDS, "slow_forwards")
    read(MEAN_ROWS, "mean_rows_per_forward")
    for stage, key in (
        ("encode", "encode_s"),
        ("denoise", "forward_s"),
        ("padding", "padding_s"),
        ("decode", "decode_s"),
        ("loads", "loads_s"),
        ("idle", "idle_s"),
    ):
        read(ENGINE_SECONDS, key, stage=stage)
    for cache, key in (
        ("conditioning", "cache"),
        ("latents", "latent_cache"),
        ("adapters", "adapter"),
    ):
        read(CACHE_LOOKUPS, f"{key}_hits", cache=cache, outcome="hit")
        read(CACHE_LOOKUPS, f"{key}_misses", cache=cache, outcome="miss")
        read(CACHE_BYTES, f"{key}_bytes", cache=cache)
    read(CACHE_LOOKUPS, "block_cache_rows_skipped", cache="blocks", outcome="hit")
    read(CACHE_LOOKUPS, "block_cache_rows_computed", cache="blocks", outcome="miss")


def serve_metrics(port: int, host: str = "127.0.0.1", *, tries: int = 1) -> int:
    """Serve /metrics from a thread; return the port, 0 if it is none or taken.

    tries: ports to try, the following ones included. Logs a warning if all are taken.
    """
    for candidate in range(port, port + tries) if port else ():
        try:
            start_http_server(candidate, addr=host)
        except OSError as error:
            reason = str(error)
            continue
        if candidate != port:
            log.info("metrics_port_moved", port=candidate, wanted=port)
        return candidate
    if port:
        log.warning("metrics_port_taken", port=port, reason=reason)
    return 0


def serve_metrics_on(listener: socket.socket, *, of_all_processes: bool) -> None:
    """Serve /metrics on a socket that several processes may share.

    Any of them may answer, with its own numbers or with those of all processes.
    """
    registry = REGISTRY
    if of_all_processes:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    listener.setblocking(False)  # another process may be faster
    server = ThreadingWSGIServer(
        listener.getsockname()[:2], _SilentHandler, bind_and_activate=False
    )
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()[:2]
    server.setup_environ()
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
