"""Name all audit events: `subject:aspect:past-tense`.

The subject is the thing that changed, the aspect the side of it. The names are part of the record:
one that was ever appended keeps its meaning.
"""

from enum import StrEnum


class EventName(StrEnum):
    """Every event that is ever appended; those marked "by" are appended by the database itself."""

    JOB_REQUEST_ACCEPTED = "job:request:accepted"  # by accept_jobs
    JOB_POOL_CHANGED = "job:pool:changed"  # it waited too long, and another pool had room
    JOB_LEASE_TAKEN = "job:lease:taken"  # a worker begins an attempt
    JOB_LEASE_EXPIRED = "job:lease:expired"  # its worker fell silent
    JOB_LEASE_RETURNED = "job:lease:returned"  # given back unharmed
    JOB_LEASE_PREEMPTED = "job:lease:preempted"  # its worker has to go, and leaves snapshots
    JOB_ATTEMPT_FAILED = "job:attempt:failed"  # an error, and the job is tried again
    JOB_HAND_OFF_LOST = "job:hand-off:lost"  # pixels are gone before they were stored
    JOB_IMAGE_HANDED_OFF = "job:image:handed-off"  # rendered; its pixels wait to be stored
    JOB_IMAGE_STORED = "job:image:stored"  # with the digests of what is stored
    JOB_TEXT_LEFT_UNREAD = "job:text:left-unread"  # a prompt has more than its model reads
    JOB_STATE_SUCCEEDED = "job:state:succeeded"
    JOB_STATE_FAILED = "job:state:failed"
    JOB_STATE_CANCELED = "job:state:canceled"
    JOB_STATE_EXPIRED = "job:state:expired"
    JOB_WORK_ABANDONED = "job:work:abandoned"  # steps of a canceled job that became known after it
    JOB_CONTENT_ERASED = "job:content:erased"  # prompt, metadata and images; the digests stay
    FILE_CONTENT_STORED = "file:content:stored"
    FILE_CONTENT_ERASED = "file:content:erased"
    API_KEY_SECRET_ISSUED = "api-key:secret:issued"
    API_KEY_SECRET_ROTATED = "api-key:secret:rotated"
    API_KEY_SECRET_REVOKED = "api-key:secret:revoked"
    TENANT_RECORD_CREATED = "tenant:record:created"
    TENANT_WEIGHT_CHANGED = "tenant:weight:changed"
    TENANT_LIMITS_CHANGED = "tenant:limits:changed"
    TENANT_BUDGET_REACHED = "tenant:budget:reached"  # a part of what it may cost in a month
    TENANT_JOBS_PRUNED = "tenant:jobs:pruned"
    WEBHOOK_ENDPOINT_CREATED = "webhook:endpoint:created"
    WEBHOOK_ENDPOINT_CHANGED = "webhook:endpoint:changed"
    WEBHOOK_ENDPOINT_DELETED = "webhook:endpoint:deleted"
    WEBHOOK_ENDPOINT_DISABLED = "webhook:endpoint:disabled"  # its receiver answered 410
    WEBHOOK_SECRET_ROTATED = "webhook:secret:rotated"
    WEBHOOK_DELIVERY_REDELIVERED = "webhook:delivery:redelivered"
    DEVICE_QUARANTINE_STARTED = "device:quarantine:started"  # lost twice: it gets no worker
    DEVICE_QUARANTINE_ENDED = "device:quarantine:ended"  # an operator has released it
    FLEET_REVISION_APPLIED = "fleet:revision:applied"  # fleet.toml as it is from then on
    USAGE_DAYS_PRUNED = "usage:days:pruned"
    AUDIT_MONTH_PRUNED = "audit:month:pruned"  # by audit_prune_month
