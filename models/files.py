"""Keep pictures that tenants upload to start jobs from.

Files are content-addressed, so the same picture twice is one file.
"""

import uuid
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ARRAY, Select, Uuid, any_, func, literal, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models import audit, uploads
from models.audit_events import EventName
from models.ids import new_id
from models.tables import File, Job, StoredFiles
from policy.params import PICTURES
from policy.states import ACTIVE_STATES

_LAST_ID = uuid.UUID(int=2**128 - 1)


class FileInUse(Exception):
    """A job that is not finished starts from the file; nothing was changed."""

    def __init__(self, file_id: uuid.UUID, job_id: uuid.UUID) -> None:
        super().__init__(f"job {job_id} starts from file {file_id}")
        self.file_id = file_id
        self.job_id = job_id


class FileGone(Exception):
    """A file that a job is to start from is erased, or not the tenant's; nothing was changed."""

    def __init__(self, file_id: uuid.UUID) -> None:
        super().__init__(f"file {file_id} is gone")
        self.file_id = file_id


def lock_against_erasure(
    session: Session, file_ids: Collection[uuid.UUID], *, tenant_id: uuid.UUID
) -> None:
    """Keep the tenant's files from being erased until commit, for a job that is to start from them.

    Raises FileGone.
    """
    if not file_ids:
        # Most jobs name no file, and making the statement takes a tenth of the Python time of
        # accepting one.
        return
    live = (
        select(File.id)
        .where(File.id.in_(file_ids), File.tenant_id == tenant_id, File.erased_at.is_(None))
        .order_by(File.id)
    )
    held = set(session.scalars(live.with_for_update(read=True, key_share=True)))
    for file_id in sorted(set(file_ids) - held):
        raise FileGone(file_id)


def find(session: Session, file_id: uuid.UUID, *, tenant_id: uuid.UUID) -> File | None:
    """Find the tenant's file; None if it is erased.

    None also for another tenant's, for existence is private.
    """
    return session.scalar(
        select(File).where(
            File.id == file_id, File.tenant_id == tenant_id, File.erased_at.is_(None)
        )
    )


def find_content(session: Session, content_sha256: str, *, tenant_id: uuid.UUID) -> File | None:
    """Find the tenant's file with these bytes; None if there is none, or it is erased."""
    return session.scalar(_live(tenant_id).where(File.content_sha256 == content_sha256))


def page(
    session: Session, *, tenant_id: uuid.UUID, limit: int, before: uuid.UUID | None = None
) -> Sequence[File]:
    """List up to `limit` of the tenant's files, newest first, older than `before`.

    Erased ones are left out.
    """
    # Forces the index on tenant and id, whatever the planner estimates: see models/listing.py.
    is_own = File.tenant_id == any_(literal([tenant_id], ARRAY(Uuid)))
    query = select(File).where(is_own, File.erased_at.is_(None), File.id < (before or _LAST_ID))
    return session.scalars(query.order_by(File.tenant_id.desc(), File.id.desc()).limit(limit)).all()


def keep(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    object_key: str,
    mode: str,
    size_bytes: int,
    width_px: int,
    height_px: int,
    content_sha256: str,
    actor: str,
) -> File:
    """Write and return the row of a picture whose object is stored.

    Returns the row that is there already if the tenant has brought the same picture before.
    """
    facts: dict[str, Any] = {
        "content_sha256": content_sha256,
        "size_bytes": size_bytes,
        "width_px": width_px,
        "height_px": height_px,
    }
    row = {"id": new_id(), "tenant_id": tenant_id, "object_key": object_key, "mode": mode, **facts}
    added: File | None = session.scalar(
        insert(File)
        .values(**row)
        .on_conflict_do_nothing(
            index_elements=[File.tenant_id, File.content_sha256],
            index_where=File.erased_at.is_(None),
        )
        .returning(File)
    )
    uploads.end(session, object_key)
    if added is None:
        # Another transaction committed the same picture first.
        return session.scalars(_live(tenant_id).where(File.content_sha256 == content_sha256)).one()
    facts["file_id"] = str(added.id)
    audit.append(session, EventName.FILE_CONTENT_STORED, chain=tenant_id, actor=actor, **facts)
    return added


def erase(session: Session, file_id: uuid.UUID, *, tenant_id: uuid.UUID, actor: str) -> File | None:
    """Have the content deleted; the row stays. None if the tenant has no such file.

    Harmless when repeated. Raises FileInUse. A task that tidies the store deletes the object later,
    unless something else has the same content.
    """
    file = session.scalar(
        select(File).where(File.id == file_id, File.tenant_id == tenant_id).with_for_update()
    )
    if file is None or file.erased_at is not None:
        return file
    user = _find_user(session, file_id, tenant_id)
    if user is not None:
        raise FileInUse(file_id, user)
    file.erased_at = func.clock_timestamp()
    uploads.give_up(session, file.object_key)
    facts: dict[str, Any] = {"file_id": str(file_id), "content_sha256": file.content_sha256}
    audit.append(session, EventName.FILE_CONTENT_ERASED, chain=tenant_id, actor=actor, **facts)
    return file


def _find_user(session: Session, file_id: uuid.UUID, tenant_id: uuid.UUID) -> uuid.UUID | None:
    """Find an active job that starts from the file."""
    uses = or_(*(getattr(Job, param.name) == file_id for param in PICTURES.values()))
    query = select(Job.id).where(Job.tenant_id == tenant_id, Job.state.in_(ACTIVE_STATES), uses)
    return session.scalar(query.limit(1))


def stored(session: Session, *, tenant_id: uuid.UUID) -> tuple[int, int]:
    """Count the tenant's files and their bytes, with what this transaction has written.

    Exact until commit if this transaction has kept or erased a file: that locks the count.
    """
    row = session.execute(
        select(StoredFiles.files, StoredFiles.size_bytes).where(StoredFiles.tenant_id == tenant_id)
    ).one_or_none()
    return (row.files, row.size_bytes) if row is not None else (0, 0)


def find_all(
    session: Session, file_ids: Sequence[uuid.UUID], *, tenant_id: uuid.UUID
) -> dict[uuid.UUID, File]:
    """Find those of these files that are the tenant's and not erased, by id."""
    is_one = File.id == any_(literal(list(file_ids), ARRAY(Uuid)))
    query = select(File).where(is_one, File.tenant_id == tenant_id, File.erased_at.is_(None))
    return {file.id: file for file in session.scalars(query)}


def _live(tenant_id: uuid.UUID) -> Select[File]:
    return select(File).where(File.tenant_id == tenant_id, File.erased_at.is_(None))
