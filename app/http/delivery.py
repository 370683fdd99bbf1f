"""How a stored picture comes to a client: by a redirect to the object store, or through this gateway.

A redirect costs the gateway nothing, but asks three things of a client: that it reaches the object store, that it leaves its key
behind on the way (a store refuses a signed URL that comes with `Authorization`), and, in a browser, that the store allows its page.
Whoever cannot do that asks for `?redirect=false`, or the operator sets IMAGE_DELIVERY=proxy: then the bytes come from here, in
pieces as the store gives them. What a client does not take at once waits in GATEWAY_BUFFER_BYTES, in no thread. HEAD is always
answered here, from the database.
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
class Stored:
    """A picture in the object store."""

    key: str
    content_type: str
    size_bytes: int
    content_sha256: str
    filename: str

    @classmethod
    def image(cls, artifact: Artifact) -> Self:
        """An image of a job."""
        filename = f"{artifact.job_id}-{artifact.index}.{extension_of(artifact.content_type)}"
        return cls(
            artifact.object_key,
            artifact.content_type,
            artifact.size_bytes,
            artifact.content_sha256,
            filename,
        )

    @classmethod
    def file(cls, file: File) -> Self:
        """A picture that a tenant brought."""
        return cls(
            file.object_key, "image/png", file.size_bytes, file.content_sha256, f"{file.id}.png"
        )

    def presigned_url(self) -> str:
        """A URL of the object store that shows it to whoever has the URL."""
        return runtime().store.presigned_url(
            self.key, content_type=self.content_type, filename=self.filename
        )


def deliver(stored: Stored) -> Response:
    """The answer to a GET or HEAD of the picture. Raises InvalidQuery, and as `content` does."""
    if _is_redirected() and request.method != "HEAD":
        response = cast("Response", redirect(stored.presigned_url(), 302, Response=Response))
        response.headers["Cache-Control"] = "no-store"
        return response
    return content(stored)


def url_of(artifact: Artifact) -> str:
    """An absolute URL that shows the image to whoever has it, for PRESIGN_TTL_S: of the object store, or of this gateway."""
    parts = runtime()
    if parts.settings.image_delivery == "redirect":
        return Stored.image(artifact).presigned_url()
    query: dict[str, Any] = parts.links.signed(artifact.id)
    own = url_for("links.show_linked", artifact_id=artifact.id, **query)
    return urljoin(parts.settings.public_url or request.host_url, own)


def content(stored: Stored) -> Response:
    """The picture itself, or the part of it that is asked for; of HEAD, what is known of it.

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


def _pieces(stored: Stored, span: Span | None) -> Iterable[bytes]:
    try:
        pieces = runtime().store.open(stored.key, span)
    except ObjectGone:
        raise ImageNotFound("The object store does not have this picture any more.") from None
    except StoreUnavailable:
        raise PartUnavailable(
            "The object store cannot be reached right now.", retry_after_s=2, part="object_store"
        ) from None
    return pieces


def _span(stored: Stored) -> Span | None:
    """The part that is asked for; None for all of it. Several parts at once are none: that is answered with all of it."""
    wanted, size = request.range if request.method == "GET" else None, stored.size_bytes
    if wanted is None or wanted.units != "bytes" or len(wanted.ranges) != 1 or not _is_same(stored):
        return None
    found = wanted.range_for_length(size)
    if found is None:
        raise RangeNotSatisfiable(f"The picture has {size} bytes.", size_bytes=size)
    return Span(found[0], found[1] - 1)


def _is_same(stored: Stored) -> bool:
    """Whether what the client has a part of is this picture: by If-Range, where it says so."""
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
