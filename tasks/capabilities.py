"""Publish what the checkpoints of a worker can do, so that the gateway accepts nothing else."""

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from engine.engine import Engine
from models import capabilities
from models.database import run_transaction
from policy.capabilities import source_of
from policy.fleet import Fleet, checkpoint_name

log = structlog.get_logger(__name__)


def publish(database: Database, fleet: Fleet, engine: Engine, *, worker: str) -> None:
    """Write what every checkpoint can do that the engine serves; call it after each revision.

    fleet: by which they were loaded.

    A failure is logged only: then the gateway goes on by what it knows.
    """
    described = {
        (name, version.id): {
            **engine.capabilities(checkpoint).as_json(),
            "source": source_of(model, version.id),
        }
        for name, model in fleet.models.items()
        for version in model.versions
        if (checkpoint := checkpoint_name(name, version.id)) in engine.checkpoints
    }
    try:
        run_transaction(
            database, lambda session: capabilities.publish(session, described, worker=worker)
        )
    except SQLAlchemyError as error:
        log.warning("capabilities_not_published", reason=f"{type(error).__name__}: {error}"[:300])
