"""Accept jobs: one statement writes any number of them, with images, places in fair order, ledger entries and audit events.

One statement, because this is the way in: what it costs is what everybody pays, and every further round trip is paid with the tenant's
place in line locked. It is the database's function `accept_jobs` (models/sql), so that each connection plans it once; planning it
costs more than running it. Locks are taken in the order of models/__init__.py: the files that jobs start from, flows, ledger, audit chain.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy.orm import Session

from models import files
from models.ids import new_id
from policy.params import NAMES, Resolved, pictures_of


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be accepted.

    params: every resolved parameter, so that it can be replayed.  predicted_s: device seconds of
    all its images.  eta_raw_s: the first guess of its end, kept to learn from.  megapixel_steps:
    what it counts against quotas.  steps_per_image: denoise steps that each image makes, as they
    were counted; None: all that are asked for.  tenant_metadata: the tenant's own.  warnings: what of
    its texts has no effect, as far as is known.  announced: it goes to Celery as soon as this is
    committed.
    """

    id: uuid.UUID = field(default_factory=new_id)
    params: Resolved
    start_within_s: float
    run_within_s: float | None = None
    predicted_s: float = 0.0
    eta_raw_s: float | None = None
    megapixel_steps: Decimal = Decimal(0)
    steps_per_image: int | None = None
    tenant_metadata: Mapping[str, str] | None = None
    warnings: Sequence[Mapping[str, Any]] = ()
    requeue_of: uuid.UUID | None = None
    replay_of: uuid.UUID | None = None
    announced: bool = False

    @property
    def flow(self) -> tuple[str, str]:
        """Pool and tier."""
        return self.params.pool, self.params.tier


@dataclass(frozen=True)
class AcceptedRow:
    """What the database made of a job."""

    id: uuid.UUID
    accepted_at: datetime
    start_by: datetime
    release_tag: float
    usage_day: date


_ACCEPT = """
    SELECT id, accepted_at, start_by, release_tag, usage_day
    FROM accept_jobs(%(jobs)s::jsonb, %(tenant_id)s::uuid, %(api_key_id)s::uuid, %(currency)s, %(actor)s)
"""


def accept(
    session: Session,
    new_jobs: Sequence[NewJob],
    *,
    tenant_id: uuid.UUID,
    api_key_id: uuid.UUID | None,
    currency: str,
    actor: str,
) -> list[AcceptedRow]:
    """Write the tenant's jobs, complete and replayable, in the order of their places in line; what the database made of each.

    Locks the tenant's flows, its ledger of the day and its audit chain until commit, and before these the files that the jobs name,
    which the statement's own foreign keys would only get to at its end. Raises FileGone.
    """
    named = {file_id for job in new_jobs for file_id in pictures_of(job.params).values()}
    files.hold(session, named, tenant_id=tenant_id)
    rows = [_row(place, job) for place, job in enumerate(new_jobs)]
    ids = {"tenant_id": str(tenant_id), "api_key_id": _plain(api_key_id)}
    given = {"jobs": json.dumps(rows), "currency": currency, "actor": actor, **ids}
    # Plain: nothing to compile, nothing to map.
    made = {row[0]: row[1:] for row in session.connection().exec_driver_sql(_ACCEPT, given)}
    return [AcceptedRow(job.id, *made[job.id]) for job in new_jobs]


def in_order(new_jobs: Sequence[NewJob]) -> list[NewJob]:
    """The same with ids that sort as they do, even if they were made within a millisecond."""
    return [
        replace(job, id=job_id)
        for job, job_id in zip(new_jobs, sorted(job.id for job in new_jobs), strict=True)
    ]


def _row(place: int, job: NewJob) -> dict[str, Any]:
    """The job as `accept_jobs` reads it: its columns by their names, and what it needs beside."""
    params = {name: _plain(getattr(job.params, name)) for name in NAMES}
    origin = {
        name: str(value)
        for name, value in (("requeue_of", job.requeue_of), ("replay_of", job.replay_of))
        if value is not None
    }
    return {
        **params,
        **origin,
        "place": place,
        "id": str(job.id),
        "event_id": str(new_id()),
        "facts": _facts(job) | origin,
        "start_within_s": job.start_within_s,
        "announced": job.announced,
        "run_within_s": job.run_within_s,
        "predicted_s": job.predicted_s,
        "eta_raw_s": job.eta_raw_s,
        "warnings": list(job.warnings) or None,
        "megapixel_steps": str(job.megapixel_steps),
        "steps_per_image": job.steps_per_image,
        "metadata": dict(job.tenant_metadata) if job.tenant_metadata else None,
    }


def _facts(job: NewJob) -> dict[str, Any]:
    """What the audit log says of the job; never what its tenant wrote."""
    params = job.params
    facts: dict[str, Any] = {
        "pool": params.pool,
        "tier": params.tier,
        "model": params.model,
        "model_version": params.model_version,
        "num_images": params.num_images,
        "seed": str(params.seed),
    }
    if params.model_alias:
        facts["model_alias"] = params.model_alias
    if job.warnings:
        facts["warnings"] = [warning["code"] for warning in job.warnings]
    return facts


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, uuid.UUID) else value
