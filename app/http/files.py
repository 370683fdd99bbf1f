"""Serve /v1/files: upload, show, list and erase the pictures that jobs start from."""

import io
import uuid
from typing import BinaryIO

from flask import Blueprint, Request, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import FileStorage

from app.http import delivery
from app.http.answers import answer, answer_page
from app.http.auth import require_key
from app.http.context import caller, runtime
from app.http.pages import read_cursor, read_limit
from app.http.uploads import Spool
from app.problems import MalformedBody, UnsupportedMediaType
from app.schemas import files as schemas
from app.services import files, inputs
from models.tables import File

bp = Blueprint("files", __name__, url_prefix="/v1/files")
bp.before_request(require_key)

FIELD = "file"
_SAID_FOR_NOTHING = ("purpose",)  # ignored: OpenAI's clients must send it
CONTENT_TYPES = [
    "multipart/form-data",
    "image/png",
    "image/jpeg",
    "image/webp",
    "application/octet-stream",
]


@bp.post("")
def bring_file() -> ResponseReturnValue:
    """Store a picture: 201 and the file; the same picture gives the same file.

    The body is multipart with the field `file`, or the picture itself.
    """
    with uploaded(request) as content:
        file = inputs.keep(runtime(), caller(), content, field=FIELD)
    return answer(file_view(file), 201, {"Location": url_for(".show_file", file_id=file.id)})


@bp.get("")
def list_files() -> ResponseReturnValue:
    """List the tenant's files, newest first: `limit` (1 to 100), `cursor`."""
    limit = read_limit(request)
    before = read_cursor(request)
    rows = files.page(runtime(), caller(), limit=limit + 1, before=before)
    return answer_page(
        request,
        schemas.FilePage,
        rows,
        file_view,
        limit=limit,
        id_of=lambda row: row.id,
    )


@bp.get("/<uuid:file_id>")
def show_file(file_id: uuid.UUID) -> ResponseReturnValue:
    """Show the file's metadata."""
    return answer(file_view(files.find(runtime(), caller(), file_id)))


@bp.get("/<uuid:file_id>/content")
def show_content(file_id: uuid.UUID) -> ResponseReturnValue:
    """Serve the picture, as the gateway has encoded it.

    302 to a presigned URL, or with `?redirect=false` the bytes themselves.
    """
    file = files.find(runtime(), caller(), file_id)
    return delivery.deliver(delivery.StoredContent.file(file))


@bp.delete("/<uuid:file_id>")
def erase_file(file_id: uuid.UUID) -> ResponseReturnValue:
    """Delete the picture: 204, also when repeated; 409 while an unfinished job starts from it."""
    files.erase(runtime(), caller(), file_id)
    return "", 204


def uploaded(asked: Request, field: str = FIELD) -> BinaryIO:
    """Return the one picture in the body as a stream, not read into memory yet.

    Raises MalformedBody, UnsupportedMediaType, and RequestEntityTooLarge, which is answered as a
    BodyTooLarge.
    """
    asked.max_content_length = runtime().settings.max_upload_bytes
    if asked.mimetype == "multipart/form-data":
        sent = [file for file in asked.files.getlist(field) if not is_left_out(file)]
        if len(sent) != 1:
            raise MalformedBody(f"Send one picture in the field `{field}`; there are {len(sent)}.")
        for name in ({*asked.files} | {*asked.form}) - {field, *_SAID_FOR_NOTHING}:
            raise MalformedBody(
                f"The form has an unknown field {name[:64]!r}; the only field is `{field}`."
            )
        return sent[0].stream  # type: ignore[return-value]  # an IO[bytes] has the same methods
    if asked.mimetype not in CONTENT_TYPES:
        raise UnsupportedMediaType(
            "Send the picture as multipart/form-data, or send its bytes as the body.",
            accepted=CONTENT_TYPES,
        )
    return _spooled(asked)


def is_left_out(file: FileStorage) -> bool:
    """Check whether this is the empty part that a browser sends when no file was chosen."""
    return not file.filename and not file.stream.seek(0, io.SEEK_END)


def _spooled(asked: Request) -> BinaryIO:
    spool = Spool()  # the caller closes it
    # Read in pieces, a chunked body beyond the limit is a 413 of werkzeug's; it is cut off without
    # an error only where all of it is read at once.
    while piece := asked.stream.read(65_536):
        spool.write(piece)
    spool.seek(0)
    return spool  # type: ignore[return-value]  # so has a temporary file


def file_view(file: File) -> schemas.File:
    """Show a file to a client."""
    return schemas.File(
        id=file.id,
        width_px=file.width_px,
        height_px=file.height_px,
        mode=file.mode,
        size_bytes=file.size_bytes,
        content_sha256=file.content_sha256,
        created_at=file.created_at,
        url=url_for("files.show_content", file_id=file.id),
        urls=schemas.FileUrls(self=url_for("files.show_file", file_id=file.id)),
    )
