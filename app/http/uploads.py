"""Large bodies: how many come in at once, and where uploads lie until they are read.

Reading one keeps a thread for as long as its client takes, and uploads are written to the temporary folder meanwhile, so both have an end:
a request takes its share of them before the first byte is read (`admit`) and gives it back when it waits for something else, or is over.
"""

import errno
import tempfile
import uuid
from contextlib import suppress
from typing import IO, Any

import structlog
from flask import Request, g, request

from app.live.capacity import Holding
from app.live.uploads import RETRY_AFTER_S, UploadRoom
from app.problems import UploadsExhausted
from edges import telemetry
from settings import SMALL_BODY_BYTES

log = structlog.get_logger(__name__)

IN_MEMORY_BYTES = 262_144  # of an upload; what is longer lies on disk
_FULL = (errno.ENOSPC, errno.EDQUOT)


def admit(asked: Request, room: UploadRoom, tenant_id: uuid.UUID) -> None:
    """Take what the request's body needs, if it is a large one. Raises UploadsExhausted."""
    size = asked.content_length
    if size is None and "chunked" in asked.headers.get("Transfer-Encoding", "").lower():
        size = room.largest_bytes
    # such a body comes only when a thread has asked for it
    least = 0 if "Expect" in asked.headers else SMALL_BODY_BYTES
    if size is None or not least < size <= room.largest_bytes:
        # beyond that, whoever reads refuses it
        return
    holdings: list[Holding] = g.setdefault("upload_holdings", [])
    holdings.append(room.take_body(tenant_id))
    if asked.mimetype != "application/json":
        holdings.append(room.take_spool(tenant_id, size))


def release(error: BaseException | None = None) -> None:
    """Let go of what this request's body took; harmless when repeated. What was not read of it is gone."""
    holdings: list[Holding] = g.get("upload_holdings", [])
    if holdings:
        request.close()
    while holdings:
        holdings.pop().release()


class Spool(tempfile.SpooledTemporaryFile[bytes]):
    """An upload on its way: in memory while it is small, else in the temporary folder. A full one is a 503, not a fault of ours."""

    def __init__(self) -> None:
        super().__init__(max_size=IN_MEMORY_BYTES, mode="w+b")

    def write(self, data: Any) -> int:
        """Raises UploadsExhausted."""
        try:
            return int(super().write(data))
        except OSError as error:
            raise _full(error) from error

    def seek(self, *where: int) -> int:
        """Raises UploadsExhausted: what was written may only now go to the disk."""
        try:
            return int(super().seek(*where))
        except OSError as error:
            raise _full(error) from error

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def __exit__(self, *raised: Any) -> None:
        self.close()


class SpoolingRequest(Request):
    """A request whose forms keep their files in spools."""

    def get_data(self, *args: Any, **options: Any) -> Any:
        data = super().get_data(*args, **options)
        if len(data) <= SMALL_BODY_BYTES:
            release()  # it was chunked, and small after all
        return data

    def _get_file_stream(self, *args: Any, **kwargs: Any) -> IO[bytes]:
        return Spool()


def _full(error: OSError) -> Exception:
    if error.errno not in _FULL:
        return error
    telemetry.SHED.labels("uploads_exhausted").inc()
    log.error("upload_spool_full", reason=error.strerror)
    return UploadsExhausted(
        "The temporary folder of this gateway process is full.", retry_after_s=RETRY_AFTER_S
    )
