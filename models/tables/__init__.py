"""Define the tables.

What must always hold is a constraint or a partial index here, not a habit elsewhere.

tenants ─┬─ api_keys, usage_ledger, budget_alerts, idempotency_keys
         ├─ jobs ─┬─ images ── artifacts          files (pictures that jobs start from)
         │        └─ attempts                     uploads (objects not yet named, or given up)
         ├─ webhook_endpoints ─┬─ webhook_secrets
         │                     └─ webhook_deliveries ── webhook_attempts
         └─ flows ── fair_clocks                  learnt_costs, learnt_etas (what jobs took)
audit_events ── audit_chains (heads)              workers (live ones), capabilities (theirs)
             ── audit_checkpoints (of pruned months)  job_labels (jobs by metadata)
slo_targets, slo_counts (objectives of tiers)
fleet_revisions (fleet.toml as it was applied)   lost_devices (which get no worker),
                                                 device_time (of workers, by the hour)
"""

from models.tables.audit import AuditChain, AuditCheckpoint, AuditEvent
from models.tables.base import NOW, Base
from models.tables.devices import DeviceTime, LostDevice
from models.tables.fairness import FairClock, Flow, LearntCost, LearntEta
from models.tables.files import File, StoredFiles, Upload
from models.tables.fleet import FleetRevision
from models.tables.jobs import Artifact, Attempt, Image, Job, JobLabel
from models.tables.objectives import ObjectiveCount, ObjectiveTarget
from models.tables.tenants import ApiKey, BudgetAlert, IdempotencyKey, Tenant, UsageDay
from models.tables.webhooks import WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookSecret
from models.tables.workers import CheckpointCapabilities, Worker

__all__ = [
    "NOW",
    "ApiKey",
    "Artifact",
    "Attempt",
    "AuditChain",
    "AuditCheckpoint",
    "AuditEvent",
    "Base",
    "BudgetAlert",
    "CheckpointCapabilities",
    "DeviceTime",
    "FairClock",
    "File",
    "FleetRevision",
    "Flow",
    "IdempotencyKey",
    "Image",
    "Job",
    "JobLabel",
    "LearntCost",
    "LearntEta",
    "LostDevice",
    "ObjectiveCount",
    "ObjectiveTarget",
    "StoredFiles",
    "Tenant",
    "Upload",
    "UsageDay",
    "WebhookAttempt",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookSecret",
    "Worker",
]
