"""Accept jobs: one statement writes any number of them with everything that belongs to them.

That is their images, places in fair order, ledger entries and audit events.

It is one statement because every job comes through here, and each further round trip would keep the
tenant's place in line locked. It is the database's function `accept_jobs` (models/sql), so that
each connection plans it once; planning it costs more than running it. Locks are taken in the order
of models/__init__.py: the files that jobs start from, flows, ledger, audit chain.
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
    all its images. eta_raw_s: the first guess of its end, kept to learn from. eta_p90_s: what was
    told. megapixel_steps: its count against quotas. steps_per_image: denoise steps that each image
    makes, as they were counted; None: as many as were asked for. tenant_metadata: the tenant's own.
    warnings: parts of its texts that have no effect, as far as is known. fleet_revision: under
    which it was resolved; None: a file's. request_id, traceparent: of the request that made it.
    announced: it goes to Celery as soon as this is
    committed.
    """

    id: uuid.UUID = field(default_factory=new_id)
    params: Resolved
    start_within_s: float
    run_within_s: float | None = None
    predicted_s: float = 0.0
    eta_raw_s: float | None = None
    eta_p90_s: float | None = None
    megapixel_steps: Decimal = Decimal(0)
    steps_per_image: int | None = None
    tenant_metadata: Mapping[str, str] | None = None
    warnings: Sequence[Mapping[str, Any]] = ()
    fleet_revision: int | None = None
    request_id: str | None = None
    traceparent: str | None = None
    requeue_of: uuid.UUID | None = None
    replay_of: uuid.UUID | None = None
    announced: bool = False

    @property
    def flow(self) -> tuple[str, str]:
        """Return (pool, tier)."""
        return self.params.pool, self.params.tier


@dataclass(frozen=True)
class AcceptedRow:
    """A job as the database accepted it."""

    id: uuid.UUID
    accepted_at: datetime
    start_by: datetime
    release_tag: float
    usage_day: date


_ACCEPT = """
    SELECT id, accepted_at, start_by, release_tag, usage_day
    FROM accept_jobs(
        %(jobs)s::jsonb, %(tenant_id)s::uuid, %(api_key_id)s::uuid, %(currency)s, %(actor)s
    )
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
    """Write the tenant's jobs, complete and replayable, and return their rows in the same order.

    The order of `new_jobs` is that of their places in line. Locks the tenant's flows, its ledger of
    the day and its audit chain until commit. Before these it locks the files that the jobs name,
    which the statement's own foreign keys would lock only at its end. Raises FileGone.
    """
    named = {file_id for job in new_jobs for file_id in pictures_of(job.params).values()}
    files.lock_against_erasure(session, named, tenant_id=tenant_id)
    rows = [_row(place, job) for place, job in enumerate(new_jobs)]
    values = {
        "jobs": json.dumps(rows),
        "currency": currency,
        "actor": actor,
        "tenant_id": str(tenant_id),
        "api_key_id": _plain(api_key_id),
    }
    # The driver's own call: SQLAlchemy has nothing to compile and nothing to map.
    result = session.connection().exec_driver_sql(_ACCEPT, values)
    accepted = {row[0]: row[1:] for row in result}
    return [AcceptedRow(job.id, *accepted[job.id]) for job in new_jobs]


def in_order(new_jobs: Sequence[NewJob]) -> list[NewJob]:
    """Return the jobs with their ids dealt out anew, so that the ids sort in this order.

    Ids that were made within one millisecond need not sort in the order in which they were made.
    """
    ids = sorted(job.id for job in new_jobs)
    return [replace(job, id=job_id) for job, job_id in zip(new_jobs, ids, strict=True)]


def _row(place: int, job: NewJob) -> dict[str, Any]:
    """Give the job as `accept_jobs` reads it: its columns by name, and further arguments."""
    params = {name: _plain(getattr(job.params, name)) for name in NAMES}
    origins = {"requeue_of": job.requeue_of, "replay_of": job.replay_of}
    origin = {name: str(value) for name, value in origins.items() if value is not None}
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
        "eta_p90_s": job.eta_p90_s,
        "warnings": list(job.warnings) or None,
        "fleet_revision": job.fleet_revision,
        "request_id": job.request_id,
        "traceparent": job.traceparent,
        "megapixel_steps": str(job.megapixel_steps),
        "steps_per_image": job.steps_per_image,
        "metadata": dict(job.tenant_metadata) if job.tenant_metadata else None,
    }


def _facts(job: NewJob) -> dict[str, Any]:
    """List the facts of the job's audit event; never what its tenant wrote."""
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
