"""Tell where a job's time went, from the rows that every process has written about it.

Nothing is collected beside these: they are there also after processes were killed, and a job that
was begun again by another worker is one trace with two attempts.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from models import jobs
from models.tables import Attempt, Image, Job, WebhookAttempt, WebhookDelivery
from policy.states import Outcome

AT_ONCE = timedelta(milliseconds=50)  # a job ends in the transaction that ends its attempt


@dataclass(frozen=True)
class Span:
    """Something that took a time.

    depth: 0 is the job.  end: None while it goes on.  facts: what else is known of it.
    """

    name: str
    depth: int
    start: datetime
    end: datetime | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A job's spans, in the order of their starts, those within one behind it."""

    job_id: uuid.UUID
    request_id: str | None
    traceparent: str | None
    spans: Sequence[Span]


def of_job(session: Session, job_id: uuid.UUID) -> Trace | None:
    """Read a job's trace; None if there is no such job."""
    job = session.get(
        Job,
        job_id,
        options=[
            *jobs.WITHOUT_TEXTS,
            selectinload(Job.images).selectinload(Image.artifact),
            selectinload(Job.attempts),
        ],
    )
    if job is None:
        return None
    spans = [
        _job_span(job),
        *_attempt_spans(job),
        *_storing_spans(job),
        *_webhook_spans(session, job),
    ]
    return Trace(job.id, job.request_id, job.traceparent, spans)


def _job_span(job: Job) -> Span:
    facts = {
        "state": job.state,
        "tier": job.tier,
        "model": f"{job.model}@{job.model_version}",
        "images": job.num_images,
    }
    if job.failure_code:
        facts["failure"] = job.failure_code
    return Span("job", 0, job.accepted_at, job.finished_at, facts)


def _attempt_spans(job: Job) -> Iterator[Span]:
    """Yield the waits in line and the attempts between them."""
    since = job.accepted_at
    for attempt in job.attempts:
        yield Span("wait in line", 1, since, attempt.started_at, {"pool": job.pool})
        yield _attempt_span(attempt)
        if job.first_preview_at is not None and _is_within(job.first_preview_at, attempt):
            at = job.first_preview_at
            yield Span("first preview", 2, at, at)
        since = attempt.ended_at or attempt.started_at
    last = job.attempts[-1] if job.attempts else None
    has_it = last is not None and last.outcome in (Outcome.RENDERED, Outcome.RUNNING)
    ended_with_it = job.finished_at is not None and job.finished_at - since < AT_ONCE
    if not has_it and not ended_with_it:
        yield Span("wait in line", 1, since, job.finished_at, {"pool": job.pool})


def _is_within(moment: datetime, attempt: Attempt) -> bool:
    return attempt.started_at <= moment and (attempt.ended_at is None or moment <= attempt.ended_at)


def _attempt_span(attempt: Attempt) -> Span:
    facts: dict[str, Any] = {"worker": attempt.worker, "outcome": attempt.outcome}
    if attempt.error:
        facts["error"] = attempt.error
    if attempt.resumed_steps:
        facts["resumed_steps"] = attempt.resumed_steps
    if attempt.lost_steps:
        facts["lost_steps"] = attempt.lost_steps
    if attempt.steps:
        facts["steps"] = attempt.steps
        facts["mean_rows"] = round(attempt.mean_rows, 1)
    device = {
        "wait_s": attempt.waited_s,
        "encode_s": attempt.encode_s,
        "denoise_s": attempt.denoise_s,
        "decode_s": attempt.decode_s,
        "unfinished_s": attempt.unfinished_s,
    }
    facts |= {name: round(seconds, 4) for name, seconds in device.items() if seconds}
    return Span(f"attempt {attempt.attempt}", 1, attempt.started_at, attempt.ended_at, facts)


def _storing_spans(job: Job) -> Iterator[Span]:
    """Yield the way of each image from its hand-off into the store."""
    for image in job.images:
        if image.handed_off_at is not None:
            stored = image.artifact
            facts: dict[str, Any] = {"attempt": image.handed_off_attempt}
            if stored is not None:
                facts["bytes"] = stored.size_bytes
            end = stored.created_at if stored is not None else None
            yield Span(f"store image {image.index}", 1, image.handed_off_at, end, facts)


def _webhook_spans(session: Session, job: Job) -> Iterator[Span]:
    """Yield the deliveries to webhooks, with each attempt."""
    deliveries = select(WebhookDelivery).where(WebhookDelivery.job_id == job.id)
    for delivery in session.scalars(deliveries.order_by(WebhookDelivery.id)):
        facts = {"event": delivery.event, "state": delivery.state, "attempts": delivery.attempts}
        yield Span("webhook", 1, delivery.created_at, delivery.ended_at, facts)
        tries = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery.id)
        for tried in session.scalars(tries.order_by(WebhookAttempt.attempt)):
            begun = tried.at - timedelta(seconds=tried.took_s)
            answer = tried.status if tried.status is not None else tried.error
            yield Span(f"try {tried.attempt}", 2, begun, tried.at, {"answer": answer})
