"""Submit the parameters of a job again; they are not resolved anew, so the image is the same."""

import uuid

from app.caller import Caller
from app.problems import ReplayImpossible
from app.runtime import Runtime
from app.services import jobs
from app.services.submit import Accepted, Prepared, accept_once
from models import files
from models.database import transaction
from models.idempotency import IdempotentRequest
from models.tables import Job
from policy.fleet import Fleet
from policy.params import params_of, pictures_of


def replay(
    runtime: Runtime,
    caller: Caller,
    job_id: uuid.UUID,
    *,
    idempotent: IdempotentRequest | None = None,
) -> Accepted:
    """Accept a job with every parameter of the caller's job, including its model version.

    Raises JobNotFound, ReplayImpossible and what `accept_once` raises.
    """
    return accept_once(
        runtime, caller, lambda: _prepared(runtime, caller, job_id), idempotent=idempotent
    )


def _prepared(runtime: Runtime, caller: Caller, job_id: uuid.UUID) -> Prepared:
    job = jobs.find(runtime, caller, job_id)
    if job.erased_at is not None:
        raise ReplayImpossible("The job was erased: its parameters are gone.")
    _check_fleet(runtime.fleet, job)
    _check_files(runtime, job)
    return Prepared(params_of(job), replay_of=job_id)


def _check_fleet(fleet: Fleet, job: Job) -> None:
    model = fleet.models.get(job.model)
    if model is None or all(version.id != job.model_version for version in model.versions):
        raise ReplayImpossible(
            f"Version {job.model_version} of model {job.model} is not offered any more.",
            gone="model_version",
        )
    if job.tier not in fleet.tiers:
        raise ReplayImpossible(f"Tier {job.tier} is not offered any more.", gone="tier")
    if job.pool not in fleet.pools or job.model not in fleet.pools[job.pool].models:
        raise ReplayImpossible(
            f"Model {job.model} has moved to another pool of workers.", gone="pool"
        )
    for adapter in job.adapters or []:
        if adapter["name"] not in model.adapters:
            raise ReplayImpossible(
                f"Adapter {adapter['name']} is not offered any more.", gone="adapter"
            )


def _check_files(runtime: Runtime, job: Job) -> None:
    with transaction(runtime.database) as session:
        for name, file_id in pictures_of(job).items():
            if files.find(session, file_id, tenant_id=job.tenant_id) is None:
                raise ReplayImpossible(f"The picture that {name} names was deleted.", gone=name)
