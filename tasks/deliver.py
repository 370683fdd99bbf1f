"""Deliver webhooks: tell tenants' endpoints what became of their jobs.

Each delivery is a row (models/webhooks.py). A task tries one, then the others that are due at the
same endpoint. Nothing here can slow a worker or a gateway: it is a role of its own, and a receiver
that hangs blocks a few of its threads for some seconds.
"""

import json
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.outbound import Outbound, Unreachable
from edges.webhooks import headers
from models import jobs, webhooks
from models.database import run_transaction, transaction
from models.tables import Image, Job
from models.webhooks import AttemptResult, Claim, TooManyUnderWay
from policy.instants import rfc3339
from policy.webhooks import GIVE_UP_AFTER_S, SLOW_AFTER_S, next_try_s

log = structlog.get_logger(__name__)

ATTEMPT_S = 10.0
GO_ON_S = 30.0  # with one endpoint, before others get the thread


@dataclass(frozen=True, kw_only=True)
class WebhookSender:
    """Deliver webhooks; one per process."""

    database: Database
    broker: Broker
    outbound: Outbound
    name: str
    public_url: str = ""  # where links to the gateway begin

    def hear(self, job_id: uuid.UUID) -> None:
        """Hand out the deliveries of an ended job. If this fails, the sweeper does it later."""
        try:
            with transaction(self.database) as session:
                found = webhooks.due_of_job(session, job_id)
            self.hand_out(found)
        except (SQLAlchemyError, BrokerUnavailable) as error:
            log.warning("webhooks_not_handed_out", job_id=str(job_id), reason=type(error).__name__)

    def hand_out(self, delivery_ids: Sequence[uuid.UUID]) -> None:
        """Publish a message for each delivery. Raises BrokerUnavailable."""
        for delivery_id in delivery_ids:
            self.broker.ask_to_deliver(delivery_id)

    def deliver_webhook(self, *, delivery_id: str) -> None:
        """Try the delivery, then the others that are due at its endpoint.

        Harmless when the message comes twice: only the task that claims a delivery tries it.
        """
        until = time.monotonic() + GO_ON_S
        following: uuid.UUID | None = uuid.UUID(delivery_id)
        try:
            while following is not None and time.monotonic() < until:
                following = self._deliver(following)
        except SQLAlchemyError as error:
            log.warning("delivery_postponed", delivery_id=delivery_id, reason=type(error).__name__)
        except BaseException as error:
            log.error("delivery_task_failed", delivery_id=delivery_id, exc_info=error)

    def _deliver(self, delivery_id: uuid.UUID) -> uuid.UUID | None:
        """Make one attempt; if it succeeded, return the next delivery that is due there."""
        claimed = self._claim(delivery_id)
        if claimed is None:
            return None
        claim, job = claimed
        tried = self._try(claim, job)
        self._record(claim, tried)
        if not tried.is_delivered:
            return None  # the next one would fail, too; each is tried when it is due
        with transaction(self.database) as session:
            return webhooks.next_of_endpoint(session, claim.endpoint_id)

    def _claim(self, delivery_id: uuid.UUID) -> tuple[Claim, Job | None] | None:
        """Claim the delivery and find the job it tells of; None if it is not to be tried now."""
        with transaction(self.database) as session:
            try:
                claim = webhooks.claim(session, delivery_id)
            except TooManyUnderWay:
                telemetry.WEBHOOKS_DEFERRED.inc()
                return None
            if claim is None:
                telemetry.DUPLICATES.labels("deliver").inc()
                return None
            if not claim.job_id:
                return claim, None
            job = jobs.find_without_prompts(session, claim.job_id, tenant_id=claim.tenant_id)
            return claim, job

    def _record(self, claim: Claim, tried: AttemptResult) -> None:
        """Write the attempt down, with how fast the endpoint is; count and log it."""
        state = run_transaction(
            self.database, lambda session: webhooks.record(session, claim, tried, actor=self.name)
        )
        is_slow = tried.took_s >= SLOW_AFTER_S
        if is_slow != claim.is_slow:
            with transaction(self.database) as session:
                webhooks.note_speed(session, claim.endpoint_id, is_slow=is_slow)
        telemetry.WEBHOOK_ATTEMPTS.labels(_outcome(tried)).inc()
        telemetry.WEBHOOK_SECONDS.observe(tried.took_s)
        log.info(
            "webhook_tried",
            delivery_id=str(claim.id),
            attempt=claim.attempt,
            status=tried.status,
            error=tried.error,
            state=state,
        )

    def _try(self, claim: Claim, job: Job | None) -> AttemptResult:
        at = datetime.now(UTC)
        facts = message(claim, job, at, public_url=self.public_url)
        body = json.dumps(facts, separators=(",", ":"))
        started = time.monotonic()
        status: int | None = None
        retry_after_s: float | None = None
        error: str | None = None
        try:
            trace = job.traceparent if job is not None else None
            signed = headers(str(claim.id), at, body, claim.secrets, trace)
            answer = self.outbound.post(claim.url, body.encode(), signed, timeout_s=ATTEMPT_S)
            status = answer.status
            retry_after_s = answer.retry_after_s
            error = "redirects are not followed" if 300 <= status < 400 else None
        except Unreachable as refused:
            error = refused.reason
        try_again_s = next_try_s(claim.attempt, draw=random.random(), retry_after_s=retry_after_s)
        is_last = claim.age_s + try_again_s > GIVE_UP_AFTER_S
        return AttemptResult(
            status, error, time.monotonic() - started, None if is_last else try_again_s
        )


def _outcome(tried: AttemptResult) -> str:
    """Name how an attempt went, for Prometheus."""
    if tried.is_delivered:
        return "delivered"
    return f"{str(tried.status)[0]}xx" if tried.status is not None else "unreachable"


def message(claim: Claim, job: Job | None, at: datetime, *, public_url: str = "") -> dict[str, Any]:
    """Make the body: what happened, when, and to what; no prompt.

    It is the same at every attempt, because a job in a final state no longer changes.
    public_url: the start of its links; without one they are paths.
    """
    if job is None and claim.data is not None:
        return {"type": claim.event, "timestamp": rfc3339(claim.created_at), "data": claim.data}
    if job is None:
        return {"type": claim.event, "timestamp": rfc3339(at), "data": {}}
    ended_at = rfc3339(job.finished_at or at)
    return {"type": claim.event, "timestamp": ended_at, "data": _job_facts(job, public_url)}


def _job_facts(job: Job, public_url: str) -> dict[str, Any]:
    """Tell of a job as `app.schemas.events.EndedJob` describes it."""
    own = f"{public_url}/v1/jobs/{job.id}"
    cost = {"amount": str(job.cost), "currency": job.currency} if job.cost is not None else None
    return {
        "id": str(job.id),
        "object": "job",
        "state": job.state,
        "tier": job.tier,
        "model": job.model,
        "model_version": job.model_version,
        "seed": job.seed,
        "n": job.num_images,
        "metadata": job.tenant_metadata or {},
        "failure": {"code": job.failure_code} if job.failure_code else None,
        "cost": cost,
        "created_at": rfc3339(job.accepted_at),
        "started_at": rfc3339(job.started_at) if job.started_at else None,
        "finished_at": rfc3339(job.finished_at) if job.finished_at else None,
        "images": [_image_facts(own, image) for image in job.images],
        "urls": {"self": own},
    }


def _image_facts(own: str, image: Image) -> dict[str, Any]:
    """Tell of an image as `app.schemas.events.StoredImage` or `MissingImage` describes it."""
    facts = {"index": image.index, "seed": image.seed, "state": image.state}
    artifact = image.artifact
    if artifact is None:
        return facts | {"url": None}
    return facts | {
        "pixels_sha256": artifact.pixels_sha256,
        "content_sha256": artifact.content_sha256,
        "content_type": artifact.content_type,
        "size_bytes": artifact.size_bytes,
        "width_px": artifact.width_px,
        "height_px": artifact.height_px,
        "url": f"{own}/images/{image.index}",
    }
