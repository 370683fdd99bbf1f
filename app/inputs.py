"""Pictures that a request starts from: from what its fields say to ids of files."""

import uuid
from collections.abc import Mapping

from app.auth import caller
from app.gateway import gateway
from app.problems import InvalidImageRequest
from models import files
from models.database import transaction


def pictures(fields: Mapping[str, str | None]) -> dict[str, uuid.UUID]:
    """The file that each field names, of those that name one. Raises InvalidImageRequest, which points at the field."""
    return {field: _file_id(field, value) for field, value in fields.items() if value is not None}


def _file_id(field: str, value: str) -> uuid.UUID:
    try:
        file_id = uuid.UUID(value)
    except ValueError:
        raise _refused(field, "is not the id of a file") from None
    with transaction(gateway().database) as session:
        if files.find(session, file_id, tenant_id=caller().tenant_id) is None:
            raise _refused(field, f"names no file of yours: {file_id}")
    return file_id


def _refused(field: str, detail: str) -> InvalidImageRequest:
    accepted = ["the id that POST /v1/files answered with"]
    return InvalidImageRequest(f"{field} {detail}", errors=[{"pointer": f"/{field}", "detail": detail, "accepted": accepted}])
