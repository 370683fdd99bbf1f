"""Submit the parameters of a job again; they are not resolved anew, so the image is the same."""

import uuid
from dataclasses import replace

from app.caller import Caller
from app.problems import ReplayImpossible
from app.runtime import Runtime
from app.services import jobs
from app.services.submit import Accepted, Prepared, accept_once
from models import files, workers
from models import jobs as jobs_rows
from models.database import transaction
from models.idempotency import IdempotentRequest
from models.tables import Job
from policy.fleet import RETIRED_MODEL, Fleet, checkpoint_name
from policy.params import params_of, pictures_of
from policy.routing import Asker, choose_pool, pools_for


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
    _check_digests(runtime, job)
    _check_files(runtime, job)
    pool = _pool(runtime.fleet, job, runtime.asker(caller))
    return Prepared(replace(params_of(job), pool=pool), replay_of=job_id)


def _check_fleet(fleet: Fleet, job: Job) -> None:
    model = fleet.models.get(job.model, RETIRED_MODEL)
    served = model.as_served.get(job.model_version)
    if served is None:
        raise ReplayImpossible(
            f"Version {job.model_version} of model {job.model} is not offered any more.",
            gone="model_version",
        )
    if served.precision != job.precision:
        raise ReplayImpossible(
            f"Version {job.model_version} of model {job.model} computes in {served.precision} now,"
            f" not in {job.precision}.",
            gone="precision",
        )
    if job.tier not in fleet.tiers:
        raise ReplayImpossible(f"Tier {job.tier} is not offered any more.", gone="tier")
    for adapter in job.adapters or []:
        if adapter["name"] not in model.adapters:
            raise ReplayImpossible(
                f"Adapter {adapter['name']} is not offered any more.", gone="adapter"
            )


def _check_digests(runtime: Runtime, job: Job) -> None:
    """Raise ReplayImpossible if other files or options would render it than those that did.

    Files are told apart by their digests; those that no live worker tells of are not compared.
    """
    checkpoint = checkpoint_name(job.model, job.model_version)
    with transaction(runtime.database) as session:
        facts = jobs_rows.rendered_facts(session, job.id)
        now = workers.weights_of(session, checkpoint, silent_for_s=runtime.settings.lease_ttl_s)
    before = facts.get("weights")
    if before is not None and now and before not in now:
        raise ReplayImpossible(
            f"The files of {checkpoint} were changed since the job was rendered.", gone="weights"
        )
    model = runtime.fleet.models[job.model]
    options = dict(model.of_version(job.model_version).options)
    if facts and facts.get("options", {}) != options:
        raise ReplayImpossible(
            f"The options of {checkpoint} were changed since the job was rendered.", gone="options"
        )
    offered = model.adapters
    for adapter in facts.get("adapters") or []:
        if offered[adapter["name"]].sha256 != adapter["sha256"]:
            raise ReplayImpossible(
                f"The file of adapter {adapter['name']} was changed since the job was rendered.",
                gone="adapter",
            )


def _pool(fleet: Fleet, job: Job, asker: Asker) -> str:
    """Choose the pool anew: the catalogue or what is alive may have changed."""
    pools = pools_for(
        fleet, model=job.model, version=job.model_version, tier=job.tier, tenant=asker.tenant
    )
    if not pools:
        raise ReplayImpossible(
            f"No pool of workers serves {job.model} in tier {job.tier} for you any more.",
            gone="pool",
        )
    pools = tuple(
        pool for pool in pools if (job.bucket_rows or 0) <= fleet.pools[pool].max_batch_rows
    )
    if not pools:
        raise ReplayImpossible(
            f"The job was rendered in forward passes of {job.bucket_rows} rows; no pool that may"
            " render it makes such large ones any more.",
            gone="bucket_rows",
        )
    return choose_pool(fleet, pools, checkpoint_name(job.model, job.model_version), asker)


def _check_files(runtime: Runtime, job: Job) -> None:
    with transaction(runtime.database) as session:
        for name, file_id in pictures_of(job).items():
            if files.find(session, file_id, tenant_id=job.tenant_id) is None:
                raise ReplayImpossible(f"The picture that {name} names was deleted.", gone=name)
