"""A job's parameters, read from its row and asked for again: nothing is resolved anew, so the same image comes of them."""

from app.http.context import runtime
from app.problems import ReplayImpossible
from models import files
from models.database import transaction
from models.tables import Job
from policy.params import Resolved, params_of, pictures_of


def resolved_again(job: Job) -> Resolved:
    """What the job was accepted with. Raises ReplayImpossible if that, or what it needs, is gone."""
    if job.erased_at is not None:
        raise ReplayImpossible("The job was erased: its parameters are gone.")
    _check_fleet(job)
    _check_files(job)
    return params_of(job)


def _check_fleet(job: Job) -> None:
    fleet = runtime().fleet
    model = fleet.models.get(job.model)
    if model is None or all(version.id != job.model_version for version in model.versions):
        raise ReplayImpossible(f"Version {job.model_version} of model {job.model} is not offered any more.", gone="model_version")
    if job.tier not in fleet.tiers:
        raise ReplayImpossible(f"Tier {job.tier} is not offered any more.", gone="tier")
    if job.pool not in fleet.pools or job.model not in fleet.pools[job.pool].models:
        raise ReplayImpossible(f"Model {job.model} is not served by the same workers any more.", gone="pool")
    for adapter in job.adapters or []:
        if adapter["name"] not in model.adapters:
            raise ReplayImpossible(f"Adapter {adapter['name']} is not offered any more.", gone="adapter")


def _check_files(job: Job) -> None:
    with transaction(runtime().database) as session:
        for name, file_id in pictures_of(job).items():
            if files.find(session, file_id, tenant_id=job.tenant_id) is None:
                raise ReplayImpossible(f"The picture that {name} names was deleted.", gone=name)
