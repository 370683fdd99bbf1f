"""Show, list and erase the pictures that jobs start from; app/services/inputs.py stores them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import FileInUse, FileNotFound
from app.runtime import Runtime
from app.services.tidying import ask_to_tidy
from models import files
from models.database import run_transaction, transaction
from models.tables import File


def page(
    runtime: Runtime,
    caller: Caller,
    *,
    limit: int,
    before: UUID | None,
) -> Sequence[File]:
    """List up to `limit` of the caller's files, newest first, older than `before`."""
    with transaction(runtime.database) as session:
        return files.page(session, tenant_id=caller.tenant_id, limit=limit, before=before)


def find(runtime: Runtime, caller: Caller, file_id: UUID) -> File:
    """Return the caller's file. Raises FileNotFound, also for an erased one."""
    with transaction(runtime.database) as session:
        file = files.find(session, file_id, tenant_id=caller.tenant_id)
    return _found(file, file_id)


def erase(runtime: Runtime, caller: Caller, file_id: UUID) -> None:
    """Delete the picture of the caller's file; harmless when repeated.

    Raises FileNotFound, and FileInUse while a job that is not finished starts from it.
    """

    def end(session: Session) -> File | None:
        return files.erase(session, file_id, tenant_id=caller.tenant_id, actor=caller.actor)

    try:
        file = run_transaction(runtime.database, end)
    except files.FileInUse as error:
        detail = "An unfinished job starts from this picture."
        raise FileInUse(detail, job_id=str(error.job_id)) from None
    _found(file, file_id)
    ask_to_tidy(runtime)


def _found(file: File | None, file_id: UUID) -> File:
    if file is None:
        raise FileNotFound(f"There is no file {file_id}.")
    return file
