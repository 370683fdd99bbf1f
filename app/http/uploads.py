"""Limit how many large bodies are received at once, and hold uploads until they are read.

A body occupies a thread for as long as its client sends, and an upload is written to the temporary
folder meanwhile. Both are limited: a request takes its share before the first byte is read
(`admit`). It gives the share back when it begins to wait for something else, or when it ends.
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
    """Reserve what the request's body needs, if it is large. Raises UploadsExhausted."""
    size = asked.content_length
    if size is None and "chunked" in asked.headers.get("Transfer-Encoding", "").lower():
        size = room.largest_bytes
    # With Expect, the client sends its body only once a thread asks for it.
    least = 0 if "Expect" in asked.headers else SMALL_BODY_BYTES
    if size is None or not least < size <= room.largest_bytes:
        return  # small, or so large that it is refused where it is read
    holdings: list[Holding] = g.setdefault("upload_holdings", [])
    holdings.append(room.take_body(tenant_id))
    if asked.mimetype != "application/json":
        holdings.append(room.take_spool(tenant_id, size))


def release(error: BaseException | None = None) -> None:
    """Give back what this request's body reserved; harmless when repeated.

    Closes the request, so that a part of the body that was not read is lost.
    """
    holdings: list[Holding] = g.get("upload_holdings", [])
    if holdings:
        request.close()
    while holdings:
        holdings.pop().release()


class Spool(tempfile.SpooledTemporaryFile[bytes]):
    """An upload: in memory while it is small, else in the temporary folder.

    A full folder raises UploadsExhausted, a 503, instead of an unexpected error.
    """

    def __init__(self) -> None:
        super().__init__(max_size=IN_MEMORY_BYTES, mode="w+b")

    def write(self, data: Any) -> int:
        """Write the bytes. Raises UploadsExhausted."""
        try:
            return int(super().write(data))
        except OSError as error:
            raise _full(error) from error

    def seek(self, *where: int) -> int:
        """Move the position; buffered bytes may be written only now. Raises UploadsExhausted."""
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
    """A request that writes the files of its forms to spools."""

    def get_data(self, *args: Any, **options: Any) -> Any:
        data = super().get_data(*args, **options)
        if len(data) <= SMALL_BODY_BYTES:
            release()  # a chunked body turned out to be small
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
