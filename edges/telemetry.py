"""What an operator watches: structured logs on standard error, and Prometheus metrics on a port of their own.

A log event is constant and its data are fields; ids, never whole objects or prompts.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from prometheus_client import Counter, Gauge, Histogram, start_http_server

log = structlog.get_logger(__name__)

HTTP_REQUESTS = Counter("darkroom_http_requests_total", "Answers of the gateway", ["method", "route", "status"])
HTTP_SECONDS = Histogram("darkroom_http_request_seconds", "Time to answer, waiting clients excluded", ["method", "route"])
JOBS_ACCEPTED = Counter("darkroom_jobs_accepted_total", "Jobs written", ["tier", "model"])
JOBS_ERASED = Counter("darkroom_jobs_erased_total", "Requests to delete what a job was about")
REQUESTS_REPLAYED = Counter("darkroom_requests_replayed_total", "Requests that came again under their Idempotency-Key")
IMAGES_RENDERED = Counter("darkroom_images_rendered_total", "Images handed off", ["tier", "model"])
DEVICE_SECONDS = Counter("darkroom_device_seconds_total", "Device time of rendered images", ["tier", "model"])
RENDER_ERRORS = Counter("darkroom_render_errors_total", "Attempts that ended in an error", ["kind"])
LEASES_LOST = Counter("darkroom_leases_lost_total", "Leases that a worker found gone")
PREEMPTED = Counter("darkroom_jobs_preempted_total", "Jobs given up with snapshots because the worker had to go")
NOTICES = Counter("darkroom_notices_total", "Notices that the worker has to go", ["source"])
UNFIT = Counter("darkroom_workers_unfit_total", "Times that this worker left because it could not go on")
CHECKPOINTS = Counter("darkroom_checkpoints_total", "Snapshots kept while rendering")
SNAPSHOTS_REFUSED = Counter("darkroom_snapshots_refused_total", "Snapshots that did not fit, so that an image began again")
STEPS_RESUMED = Counter("darkroom_steps_resumed_total", "Denoise steps that snapshots spared")
STEPS_LOST = Counter("darkroom_steps_lost_total", "Denoise steps done again, by the outcome of the attempt that had done them", ["cause"])
PICTURES_KEPT = Counter("darkroom_pictures_kept_total", "Pictures that tenants brought, encoded again and stored or there already", ["way"])
PICTURES_REFUSED = Counter("darkroom_pictures_refused_total", "Pictures that tenants brought and that cannot be used")
DECODERS_DIED = Counter("darkroom_decoders_died_total", "Pictures that were the end of the process that decoded them")
PICTURE_SECONDS = Histogram("darkroom_picture_seconds", "Time to check a tenant's picture and encode it again, waiting for a turn included")
INPUTS_BROUGHT = Counter("darkroom_inputs_brought_total", "Pictures brought to the hand-off for jobs that start from them")
INPUTS_GONE = Counter("darkroom_inputs_gone_total", "Pictures that a job starts from and that are not in the store")
INPUT_WAIT_SECONDS = Histogram("darkroom_input_wait_seconds", "How long a leased job waited for the pictures it starts from")
IMAGES_STORED = Counter("darkroom_images_stored_total", "Artifacts committed", ["tier", "format"])
STORED_BYTES = Counter("darkroom_stored_bytes_total", "Bytes of committed artifacts")
DUPLICATES = Counter("darkroom_duplicate_messages_total", "Messages that found nothing to do", ["task"])
SWEPT = Counter("darkroom_swept_total", "Rows the sweeper acted on", ["why"])
SHED = Counter("darkroom_shed_total", "Requests refused although they could be rendered", ["reason"])
EVENT_STREAMS = Gauge("darkroom_event_streams", "Followers of jobs in this gateway process")
EVENTS_SENT = Counter("darkroom_events_sent_total", "Events given to followers", ["kind"])
EVENTS_DROPPED = Counter("darkroom_events_dropped_total", "Events that a follower was too slow for", ["kind"])
WEBHOOK_ATTEMPTS = Counter("darkroom_webhook_attempts_total", "Attempts at deliveries: delivered, 3xx, 4xx, 5xx, unreachable", ["outcome"])
WEBHOOK_SECONDS = Histogram("darkroom_webhook_attempt_seconds", "Until a receiver answered, or did not")
WEBHOOKS_PENDING = Gauge("darkroom_webhooks_pending", "Deliveries that are not over")
AUTH_FAILURES = Counter("darkroom_auth_failures_total", "Requests refused for their API key: no_key, bad_key, scope", ["why"])
LIMITS_LOCAL = Counter("darkroom_limits_local_total", "Limits counted in one process or not at all, for Redis was away", ["limit"])
HANDOFF_FILL = Gauge("darkroom_handoff_fill_ratio", "Memory of the hand-off in use / its maxmemory")
QUEUE_JOBS = Gauge("darkroom_queue_jobs", "Unfinished jobs", ["pool", "tier", "state"])
OLDEST_WAIT = Gauge("darkroom_queue_oldest_wait_seconds", "Age of the oldest queued job", ["pool", "tier"])
LIVE_WORKERS = Gauge("darkroom_live_workers", "Workers heard of within a lease", ["pool"])
INFLIGHT = Gauge("darkroom_engine_inflight_images", "Images resident on the device")
FORWARDS = Gauge("darkroom_engine_forwards", "Denoiser forwards since start")
MEAN_ROWS = Gauge("darkroom_engine_mean_rows", "Mean rows of a denoiser forward since start")
PARKED = Gauge("darkroom_engine_parked_images", "Images whose seat a better rank has taken")
ENGINE_SECONDS = Gauge("darkroom_engine_seconds", "Device time since start", ["stage"])
CACHE_LOOKUPS = Gauge("darkroom_engine_cache_lookups", "Lookups since start; hits / (hits + misses) is the hit rate", ["cache", "outcome"])
CACHE_BYTES = Gauge("darkroom_engine_cache_bytes", "What a cache holds", ["cache"])


def _write(line: str) -> None:
    """One write of one line to standard error, under no lock: the system keeps lines apart.

    With a lock, whoever writes waits for the interpreter while all other threads wait for him, and a busy gateway does little else.
    """
    left = memoryview(f"{line}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):  # nobody listens any more
        while left:
            left = left[os.write(2, left) :]


class _OwnLogger:
    """Where our own events end, rendered."""

    def msg(self, line: str) -> None:
        _write(line)

    debug = info = warning = error = critical = msg


class _ForeignHandler(logging.Handler):
    """Where records of the libraries end, and of the engine, which knows no house."""

    def createLock(self) -> None:
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record))


def configure_logs(level: str = "INFO") -> None:
    """One JSON object a line on standard error, for our own events and for the libraries' alike."""
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
    foreign = [*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()]  # `extra` of the engine's own logging
    handler = _ForeignHandler()
    renderer = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=renderer, foreign_pre_chain=foreign))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("botocore", "boto3", "urllib3", "kombu", "celery.redirected", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)


def watch_engine(stats: Callable[[], Mapping[str, Any]]) -> None:
    """Let a scrape read the engine's own numbers."""

    def read(gauge: Gauge, key: str, **labels: str) -> None:
        (gauge.labels(**labels) if labels else gauge).set_function(lambda: stats()[key])

    read(INFLIGHT, "inflight")
    read(PARKED, "parked")
    read(FORWARDS, "steps")
    read(MEAN_ROWS, "mean_rows_per_forward")
    for stage, key in (("encode", "encode_s"), ("denoise", "forward_s"), ("decode", "decode_s")):
        read(ENGINE_SECONDS, key, stage=stage)
    for cache, key in (("conditioning", "cache"), ("latents", "latent_cache"), ("adapters", "adapter")):
        read(CACHE_LOOKUPS, f"{key}_hits", cache=cache, outcome="hit")
        read(CACHE_LOOKUPS, f"{key}_misses", cache=cache, outcome="miss")
        read(CACHE_BYTES, f"{key}_bytes", cache=cache)
    read(CACHE_LOOKUPS, "block_cache_rows_skipped", cache="blocks", outcome="hit")
    read(CACHE_LOOKUPS, "block_cache_rows_computed", cache="blocks", outcome="miss")


def serve_metrics(port: int, host: str = "127.0.0.1") -> None:
    """Serve /metrics from a thread; nothing for port 0, a warning for a port that is taken."""
    if port:
        try:
            start_http_server(port, addr=host)
        except OSError as error:
            log.warning("metrics_port_taken", port=port, reason=str(error))
