"""Many jobs of one tenant, accepted at once: all of them or none, in as many statements as one job takes, or nearly."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from itertools import groupby
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from models import audit, flows, idempotency, usage
from models.idempotency import Once
from models.ids import new_id
from models.jobs import accepted_facts
from models.tables import Image, Job


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """One job to be written. The fields are what `jobs.accept` takes."""

    id: uuid.UUID = field(default_factory=new_id)
    params: Mapping[str, Any]
    start_within_s: float
    run_within_s: float | None
    predicted_s: float
    eta_raw_s: float | None
    megapixel_steps: Decimal
    labels: Mapping[str, str] | None

    @property
    def flow(self) -> tuple[str, str]:
        """Pool and tier."""
        return self.params["pool"], self.params["tier"]


def in_order(new: Sequence[NewJob]) -> list[NewJob]:
    """The same with ids that sort as they do, even if they were made within a millisecond."""
    return [replace(job, id=job_id) for job, job_id in zip(new, sorted(job.id for job in new), strict=True)]


def accept(
    session: Session,
    new: Sequence[NewJob],
    *,
    tenant_id: uuid.UUID,
    api_key_id: uuid.UUID | None,
    currency: str,
    actor: str,
    once: Once | None = None,
    answer: Mapping[str, Any] | None = None,
) -> None:
    """Write all of them as `jobs.accept` writes one: rows, images, places in fair order, the ledger, an audit event each.

    once: the key that the batch comes under, and `answer` what it came to. Raises AlreadyAnswered or KeyReused if it came before.
    """
    if once is not None:
        idempotency.claim(session, once, tenant_id=tenant_id)
    tags = _places(session, new, tenant_id)
    day = usage.reserve(session, tenant_id=tenant_id, amount=sum((job.megapixel_steps for job in new), Decimal(0)), jobs=len(new))
    now = session.execute(select(func.clock_timestamp())).scalar_one()
    common = {"tenant_id": tenant_id, "api_key_id": api_key_id, "currency": currency, "usage_day": day}
    rows = [
        {
            **job.params,
            **common,
            "id": job.id,
            "release_tag": tags[job.id],
            "start_by": now + timedelta(seconds=job.start_within_s),
            "run_within_s": job.run_within_s,
            "predicted_s": job.predicted_s,
            "eta_raw_s": job.eta_raw_s,
            "megapixel_steps": job.megapixel_steps,
            "labels": dict(job.labels) if job.labels else None,
        }
        for job in new
    ]
    session.execute(insert(Job), rows)
    images = [
        {"job_id": job.id, "index": index, "seed": job.params["seed"] + index} for job in new for index in range(job.params["num_images"])
    ]
    session.execute(insert(Image), images)
    if once is not None:
        idempotency.fulfil(session, once, tenant_id=tenant_id, answer=answer)
    events = [audit.Event("job:request:accepted", actor, job.id, facts=accepted_facts(job.params)) for job in new]
    audit.append_all(session, events, chain=tenant_id)


def _places(session: Session, new: Sequence[NewJob], tenant_id: uuid.UUID) -> dict[uuid.UUID, float]:
    """Start tags by job. Flows are locked in the order of their names, as by every batch."""
    tags: dict[uuid.UUID, float] = {}
    for (pool, tier), group in groupby(sorted(new, key=lambda job: job.flow), key=lambda job: job.flow):
        of_flow = list(group)
        costs = [job.predicted_s for job in of_flow]
        starts = flows.enter_many(session, pool=pool, tier=tier, tenant_id=tenant_id, predicted_s=costs)
        tags |= zip((job.id for job in of_flow), starts, strict=True)
    return tags


def jobs_of(session: Session, job_ids: Sequence[uuid.UUID], *, tenant_id: uuid.UUID) -> dict[uuid.UUID, Job]:
    """The tenant's jobs of these ids, without images, attempts and artifacts."""
    return {job.id: job for job in session.scalars(select(Job).where(Job.tenant_id == tenant_id, Job.id.in_(job_ids)))}
