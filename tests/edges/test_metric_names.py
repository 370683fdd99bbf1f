"""The names, kinds and labels of all metrics: dashboards and alerts of operators rely on them."""

import re

from prometheus_client import Counter, Gauge, Histogram

from edges import telemetry
from tests.documents import PAGES

COUNTERS = {
    "darkroom_auth_failures_total": ("why",),
    "darkroom_checkpoints_total": (),
    "darkroom_decoders_died_total": (),
    "darkroom_device_seconds_total": ("tier", "model"),
    "darkroom_duplicate_messages_total": ("task",),
    "darkroom_events_dropped_total": ("kind",),
    "darkroom_events_sent_total": ("kind",),
    "darkroom_fleet_unreadable_total": (),
    "darkroom_http_requests_total": ("method", "route", "status"),
    "darkroom_images_rendered_total": ("tier", "model"),
    "darkroom_images_stored_total": ("tier", "format"),
    "darkroom_images_suspect_total": ("model", "why"),
    "darkroom_inputs_brought_total": (),
    "darkroom_inputs_gone_total": (),
    "darkroom_jobs_accepted_total": ("tier", "model"),
    "darkroom_jobs_ended_total": ("tier", "model", "state"),
    "darkroom_jobs_erased_total": (),
    "darkroom_jobs_preempted_total": (),
    "darkroom_leases_lost_total": (),
    "darkroom_limits_local_total": ("limit",),
    "darkroom_notices_total": ("source",),
    "darkroom_pictures_kept_total": ("way",),
    "darkroom_pictures_refused_total": (),
    "darkroom_previews_dropped_total": (),
    "darkroom_render_errors_total": ("kind",),
    "darkroom_requests_replayed_total": (),
    "darkroom_shed_total": ("reason",),
    "darkroom_snapshots_refused_total": (),
    "darkroom_steps_lost_total": ("cause",),
    "darkroom_steps_resumed_total": (),
    "darkroom_stored_bytes_total": (),
    "darkroom_swept_total": ("why",),
    "darkroom_texts_unread_total": ("model", "code"),
    "darkroom_transaction_conflicts_total": ("kind",),
    "darkroom_webhook_attempts_total": ("outcome",),
    "darkroom_webhooks_deferred_total": (),
    "darkroom_weights_fetched_bytes_total": ("source",),
    "darkroom_workers_unfit_total": (),
}
HISTOGRAMS = {
    "darkroom_http_request_seconds": ("method", "route"),
    "darkroom_input_wait_seconds": (),
    "darkroom_job_eta_ratio": ("tier",),
    "darkroom_job_first_preview_seconds": ("tier",),
    "darkroom_job_seconds": ("tier",),
    "darkroom_job_wait_seconds": ("tier",),
    "darkroom_model_load_seconds": ("phase",),
    "darkroom_model_wait_seconds": (),
    "darkroom_picture_seconds": (),
    "darkroom_webhook_attempt_seconds": (),
    "darkroom_weights_stage_seconds": ("phase",),
}
GAUGES = {
    "darkroom_audit_months_ahead": (),
    "darkroom_away_seconds": ("part",),
    "darkroom_build_info": ("version",),
    "darkroom_engine_cache_bytes": ("cache",),
    "darkroom_engine_cache_lookups": ("cache", "outcome"),
    "darkroom_engine_forwards": (),
    "darkroom_engine_inflight_images": (),
    "darkroom_engine_mean_rows": (),
    "darkroom_engine_parked_images": (),
    "darkroom_engine_seconds": ("stage",),
    "darkroom_engine_slow_forwards": (),
    "darkroom_event_streams": (),
    "darkroom_failing_workers": ("pool",),
    "darkroom_fleet_revision": (),
    "darkroom_handoff_fill_ratio": (),
    "darkroom_jobs_lacking_inputs": ("pool", "tier"),
    "darkroom_last_turn_timestamp_seconds": ("loop",),
    "darkroom_live_workers": ("pool",),
    "darkroom_models_not_loaded": ("pool", "model"),
    "darkroom_quarantined_devices": ("pool",),
    "darkroom_queue_jobs": ("pool", "tier", "state"),
    "darkroom_queue_oldest_wait_seconds": ("pool", "tier"),
    "darkroom_slo_attainment_ratio": ("tier", "objective", "span"),
    "darkroom_slo_jobs": ("tier", "objective", "span"),
    "darkroom_slo_target_ratio": ("tier", "objective"),
    "darkroom_tenants_over_budget": (),
    "darkroom_upload_spool_reserved_bytes": (),
    "darkroom_uploads_in_progress": (),
    "darkroom_waiting_clients": (),
    "darkroom_webhooks_pending": (),
}
# What several gateway processes say together; the others' gauges are of one process each.
OF_ALL_PROCESSES = {
    "darkroom_build_info": "livemax",
    "darkroom_event_streams": "livesum",
    "darkroom_fleet_revision": "livemin",
    "darkroom_handoff_fill_ratio": "livemax",
    "darkroom_upload_spool_reserved_bytes": "livesum",
    "darkroom_uploads_in_progress": "livesum",
    "darkroom_waiting_clients": "livesum",
}
NO_METRICS = {  # logins, a package, a volume
    "darkroom_app",
    "darkroom_auditor",
    "darkroom_client",
    "darkroom_gateway",
    "darkroom_objects",
    "darkroom_owner",
    "darkroom_results",
    "darkroom_sweeper",
    "darkroom_webhooks",
    "darkroom_worker",
}


def metrics_of(kind: type) -> dict[str, tuple[str, ...]]:
    """The labels of every metric of a kind, by the name that a scrape shows."""
    suffix = "_total" if kind is Counter else ""
    metrics = [each for each in vars(telemetry).values() if type(each) is kind]
    return {f"{each._name}{suffix}": tuple(each._labelnames) for each in metrics}


def test_metrics_have_the_names_and_labels_that_operators_know():
    assert metrics_of(Counter) == COUNTERS
    assert metrics_of(Histogram) == HISTOGRAMS
    assert metrics_of(Gauge) == GAUGES


def test_metrics_of_several_gateway_processes_are_added_up_or_the_largest_one_counts():
    told = {
        each._name: each._multiprocess_mode
        for each in vars(telemetry).values()
        if isinstance(each, Gauge) and each._multiprocess_mode != "all"
    }

    assert told == OF_ALL_PROCESSES


def test_metrics_that_documents_name_exist():
    text = "\n".join(page.read_text() for page in PAGES)

    named = set(re.findall(r"\bdarkroom_[a-z_]+[a-z]\b", text)) - NO_METRICS

    assert named >= {"darkroom_shed_total", "darkroom_swept_total", "darkroom_render_errors_total"}
    assert named - {*COUNTERS, *HISTOGRAMS, *GAUGES} == set()
