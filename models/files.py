"""Pictures that tenants bring: content-addressed, so the same picture twice is one file."""

import uuid

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.tables import File


def find(session: Session, file_id: uuid.UUID, *, tenant_id: uuid.UUID) -> File | None:
    """The tenant's file; None also for an erased one and for another tenant's, for existence is private."""
    return session.scalar(select(File).where(File.id == file_id, File.tenant_id == tenant_id, File.erased_at.is_(None)))
