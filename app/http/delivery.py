"""Deliver a stored picture: by a redirect to the object store, or through this gateway.

A redirect costs the gateway nothing, but the client must reach the object store, must drop its API
key on the way (a store refuses a signed URL that comes with `Authorization`), and, in a browser,
needs the store's permission for its page (CORS). Other clients ask for `?redirect=false`, or the
operator sets IMAGE_DELIVERY=proxy. Then the bytes come from here, in chunks as the store sends
them. Bytes that the client has not read yet wait in GATEWAY_BUFFER_BYTES and occupy no thread. HEAD
is always answered here, from the database.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import urljoin

from flask import Response, redirect, request, url_for
from werkzeug.http import unquote_etag

from app.http.context import runtime
from app.problems import ImageNotFound, InvalidQuery, PartUnavailable, RangeNotSatisfiable
from edges.objectstore import PRIVATE, ObjectGone, Span, StoreUnavailable
from models.tables import Artifact, File
from policy.formats import extension_of


@dataclass(frozen=True)
class StoredContent:
    """A picture in the object store."""

    key: str
    content_type: str
    size_bytes: int
    content_sha256: str
    filename: str

    @classmethod
    def image(cls, artifact: Artifact) -> Self:
        """Describe an image of a job."""
        filename = f"{artifact.job_id}-{artifact.index}.{extension_of(artifact.content_type)}"
        return cls(
            key=artifact.object_key,
            content_type=artifact.content_type,
            size_bytes=artifact.size_bytes,
            content_sha256=artifact.content_sha256,
            filename=filename,
        )

    @classmethod
    def file(cls, file: File) -> Self:
        """Describe a picture that a tenant uploaded."""
        return cls(
            key=file.object_key,
            content_type="image/png",
            size_bytes=file.size_bytes,
            content_sha256=file.content_sha256,
            filename=f"{file.id}.png",
        )

    def presigned_url(self) -> str:
        """Return a URL of the object store that needs no key."""
        return runtime().store.presigned_url(
            self.key, content_type=self.content_type, filename=self.filename
        )


def deliver(stored: StoredContent) -> Response:
    """Answer a GET or HEAD of the picture. Raises InvalidQuery, and as `content` does."""
    if _is_redirected() and request.method != "HEAD":
        response = cast("Response", redirect(stored.presigned_url(), 302, Response=Response))
        response.headers["Cache-Control"] = "no-store"
        return response
    return content(stored)


def url_of(artifact: Artifact) -> str:
    """Return an absolute URL of the image that needs no API key for PRESIGN_TTL_S.

    It is a URL of the object store or of this gateway, by IMAGE_DELIVERY.
    """
    parts = runtime()
    if parts.settings.image_delivery == "redirect":
        return StoredContent.image(artifact).presigned_url()
    query: dict[str, Any] = parts.links.signed(artifact.id)
    own = url_for("links.show_linked", artifact_id=artifact.id, **query)
    return urljoin(parts.settings.public_url or request.host_url, own)


def content(stored: StoredContent) -> Response:
    """Answer with the picture or the requested part of it; to HEAD, with the headers only.

    Raises ImageNotFound, PartUnavailable, RangeNotSatisfiable.
    """
    response = Response(status=200, content_type=stored.content_type)
    response.set_etag(stored.content_sha256)
    response.headers["Cache-Control"] = PRIVATE
    if stored.content_sha256 in request.if_none_match:
        response.status_code = 304
        return response
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Disposition"] = f'inline; filename="{stored.filename}"'
    span = _span(stored)
    if span is not None:
        response.status_code = 206
        response.headers["Content-Range"] = f"bytes {span.first}-{span.last}/{stored.size_bytes}"
    response.content_length = stored.size_bytes if span is None else span.last - span.first + 1
    if request.method != "HEAD":
        response.response = _pieces(stored, span)
    return response


def _pieces(stored: StoredContent, span: Span | None) -> Iterable[bytes]:
    try:
        pieces = runtime().store.open(stored.key, span)
    except ObjectGone:
        raise ImageNotFound("The object store does not have this picture any more.") from None
    except StoreUnavailable:
        raise PartUnavailable(
            "The object store cannot be reached right now.", retry_after_s=2, part="object_store"
        ) from None
    return pieces


def _span(stored: StoredContent) -> Span | None:
    """Return the requested byte range; None for the whole picture.

    A request for several ranges is answered with the whole picture, too.
    """
    wanted = request.range if request.method == "GET" else None
    size = stored.size_bytes
    if wanted is None or wanted.units != "bytes" or len(wanted.ranges) != 1 or not _is_same(stored):
        return None
    found = wanted.range_for_length(size)
    if found is None:
        raise RangeNotSatisfiable(f"The picture has {size} bytes.", size_bytes=size)
    return Span(found[0], found[1] - 1)


def _is_same(stored: StoredContent) -> bool:
    """Check `If-Range`: does the client's part belong to this picture? True without the header."""
    told = request.headers.get("If-Range")
    return told is None or unquote_etag(told) == (stored.content_sha256, False)


def _is_redirected() -> bool:
    text = request.args.get("redirect")
    if text is None:
        return runtime().settings.image_delivery == "redirect"
    if text.lower() not in ("true", "false"):
        raise InvalidQuery(
            "redirect must be true or false.", parameter="redirect", accepted=["true", "false"]
        )
    return text.lower() == "true"
