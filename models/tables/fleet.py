"""Define the table of the fleet's revisions."""

from datetime import datetime

from sqlalchemy import Identity
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import NOW, Base


class FleetRevision(Base):
    """One text of fleet.toml that was applied; the one with the highest number is in force."""

    __tablename__ = "fleet_revisions"

    number: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    content: Mapped[str]
    sha256: Mapped[str]  # of the content, in hexadecimal
    applied_at: Mapped[datetime] = mapped_column(server_default=NOW)
    actor: Mapped[str]
    note: Mapped[str | None]
    # The revision whose content this one brings back.
    rollback_of: Mapped[int | None]
