"""Build what answers and streams of /v1/images share: how a job ended, and our extra members."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from app.documents import JobDocument
from app.problems import (
    InvalidImageRequest,
    JobAlreadyFinished,
    JobExpired,
    JobFailed,
    JobUnfinished,
    ModerationBlocked,
    Problem,
)
from models.tables import Job
from policy.failures import is_our_fault, told_detail
from policy.params import OPENAI_ANSWER, members_of
from policy.states import JobState

JOINED_FOR_S = 600.0  # after the job's end; clients retry within seconds


def problem_of_end(
    job_id: uuid.UUID, state: str, failure_code: str | None, failure_detail: str | None
) -> Problem | None:
    """Return the problem of a job that gave no images; None if it succeeded.

    Of the failure's detail it says what a tenant may read.
    """
    shown_id = str(job_id)
    told = told_detail(failure_code, failure_detail)
    if state == JobState.SUCCEEDED:
        return None
    if state == JobState.CANCELED:
        return JobAlreadyFinished("The job was canceled.", state=state, job_id=shown_id)
    if state == JobState.EXPIRED:
        return JobExpired(
            "No worker started the job before its deadline.", retry_after_s=5, job_id=shown_id
        )
    if state == JobState.REJECTED:
        return ModerationBlocked(
            "The safety rules refused the request or its images.", job_id=shown_id
        )
    if state == JobState.FAILED and is_our_fault(failure_code):
        return JobFailed(
            "The job failed through no fault of the request" + (f": {told}." if told else "."),
            failure_code=failure_code or "unknown",
            job_id=shown_id,
        )
    if state == JobState.FAILED:
        detail = f"The job cannot be rendered: {told or failure_code}."
        return InvalidImageRequest(
            detail,
            errors=[{"pointer": "", "detail": detail}],
            failure_code=failure_code or "unknown",
            job_id=shown_id,
        )
    return JobUnfinished(
        "The job has not ended yet. Send the same request again to go on waiting for it.",
        retry_after_s=1,
        job_id=shown_id,
    )


def may_still_answer(job: Job | JobDocument, *, streams: bool) -> bool:
    """Tell whether a repeated call may be answered with this earlier job, instead of a new one.

    True for an unfinished job, and for one that ended less than JOINED_FOR_S ago in a way that a
    new job would repeat. False for a job that failed on our side or expired, since a new one may
    succeed; for an erased one; and for one that was canceled because its client left the stream. An
    older job does not count either: OpenAI's clients send no key, so this may be a new call.
    """
    if job.finished_at is None:
        return True
    has_failed_here = job.state == JobState.FAILED and is_our_fault(job.failure_code)
    is_ours = job.state == JobState.EXPIRED or has_failed_here
    has_left = job.state == JobState.CANCELED and streams
    ended_s = (datetime.now(UTC) - job.finished_at).total_seconds()
    return not is_ours and not has_left and job.erased_at is None and ended_s < JOINED_FOR_S


def extras_of(job: Job | JobDocument) -> Mapping[str, Any]:
    """Return the members of `schemas.OwnMembers`: those that OpenAI's interface does not have."""
    return {"job_id": job.id, **members_of(job, OPENAI_ANSWER), "warnings": job.warnings or []}
