"""Keep what each version of a model can do, as workers describe it when they have loaded it.

The newest description wins: workers that differ are of two releases, or of two revisions of the
catalogue, while the older ones are replaced.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.tables import CheckpointCapabilities

Version = tuple[str, str]  # of which model, and its id


def publish(
    session: Session, described: Mapping[Version, Mapping[str, Any]], *, worker: str
) -> None:
    """Write what these versions can do, over what was known of them before."""
    # In the same order in every worker, so that no two deadlock.
    for (model, version), value in sorted(described.items(), key=lambda item: item[0]):
        new = {
            "described": dict(value),
            "worker": worker,
            "published_at": func.clock_timestamp(),
        }
        statement = insert(CheckpointCapabilities).values(model=model, version=version, **new)
        session.execute(
            statement.on_conflict_do_update(index_elements=["model", "version"], set_=new)
        )


def read_all(session: Session) -> dict[Version, Any]:
    """Read what every version can do that a worker has ever loaded."""
    rows = session.execute(
        select(
            CheckpointCapabilities.model,
            CheckpointCapabilities.version,
            CheckpointCapabilities.described,
        )
    )
    return {(model, version): described for model, version, described in rows}
