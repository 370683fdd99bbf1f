"""Define the tables of pictures that tenants upload, and of objects on their way to the store."""

import uuid
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.ids import new_id
from models.tables.base import NOW, Base


class File(Base):
    """A picture of a tenant, encoded again by the gateway.

    PNG, 8 bits, sRGB, upright, without metadata.
    """

    __tablename__ = "files"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    object_key: Mapped[str]
    mode: Mapped[str]  # L, RGB or RGBA
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    width_px: Mapped[int]
    height_px: Mapped[int]
    content_sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    erased_at: Mapped[datetime | None]

    __table_args__ = (
        # The same picture twice is one file.
        Index(
            "files_live",
            "tenant_id",
            "content_sha256",
            unique=True,
            postgresql_where=text("erased_at IS NULL"),
        ),
        Index("files_by_key", "object_key"),
        Index("files_by_tenant", "tenant_id", "id", postgresql_where=text("erased_at IS NULL")),
    )


class StoredFiles(Base):
    """The number of a tenant's files, and their bytes.

    Counted by a trigger on `files` in the transaction that changes it.
    """

    __tablename__ = "stored_files"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    files: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class Upload(Base):
    """An object that is being stored, or was given up.

    Written before the upload, deleted in the transaction that names the object's artifact or file.
    """

    __tablename__ = "uploads"

    object_key: Mapped[str] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)

    __table_args__ = (Index("uploads_by_age", "started_at"),)
