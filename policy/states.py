"""List states of jobs and images, and outcomes of attempts; each with its meaning beside it."""

from enum import StrEnum


class JobState(StrEnum):
    """The states of a job: queued -> running -> storing -> succeeded, or another final state.

    Also running -> queued and storing -> queued, when work has to be done again.
    """

    QUEUED = "queued"  # accepted; waits, announced or not
    RUNNING = "running"  # a worker holds the lease
    STORING = "storing"  # every image is handed off; the GPU is free, store_by is the deadline
    SUCCEEDED = "succeeded"  # every image is stored
    FAILED = "failed"  # failure_code says why
    REJECTED = "rejected"  # safety said no, before or after the render
    CANCELED = "canceled"  # the tenant said no
    EXPIRED = "expired"  # nothing started before start_by


FINAL_STATES = (
    JobState.SUCCEEDED,
    JobState.FAILED,
    JobState.REJECTED,
    JobState.CANCELED,
    JobState.EXPIRED,
)
# Ended by what the tenant did or asked for: work on images that are not stored is the tenant's.
TAKEN_BACK = (JobState.CANCELED, JobState.REJECTED)
ACTIVE_STATES = (JobState.QUEUED, JobState.RUNNING, JobState.STORING)


class ImageState(StrEnum):
    PENDING = "pending"  # to be rendered
    HANDED_OFF = "handed_off"  # its pixels wait in the hand-off
    STORED = "stored"  # its artifact is in the object store


class Outcome(StrEnum):
    """The end of an attempt."""

    RUNNING = "running"  # it has not
    RENDERED = "rendered"  # every image it was to render is handed off
    LEASE_LOST = "lease_lost"  # its worker fell silent
    CANCELED = "canceled"  # the tenant took the job back
    PREEMPTED = "preempted"  # its worker had to go: snapshots of its images are kept
    RETURNED = "returned"  # given back unharmed: a hand-off that vanished
    ERROR = "error"  # tried again, or failed if it was one too many
    FAILED = "failed"  # no retry helps


class DeliveryState(StrEnum):
    """The state of a webhook delivery."""

    PENDING = "pending"  # due now or later
    DELIVERED = "delivered"  # the receiver answered 2xx
    GONE = "gone"  # it answered 410, or its endpoint was deleted: nothing more is sent there
    FAILED = "failed"  # given up after three days
