"""Store the pictures that a request starts from, as files with ids.

They come as uploads, data URLs and, for tenants that may use them, as URLs.
"""

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import structlog
from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import (
    InvalidImageRequest,
    InvalidPicture,
    PartUnavailable,
    Problem,
    StorageQuotaExceeded,
)
from app.runtime import Runtime
from app.schemas.problems import FieldError
from app.services import dataurls, quotas
from edges import pictures as encoding
from edges import telemetry
from edges.decoders import DecoderDied, TooBusy
from edges.objectstore import ObjectGone, StoreUnavailable, content_sha256, picture_key
from edges.outbound import Unreachable
from edges.pictures import NormalisedPicture, NotAPicture
from models import files, uploads
from models.database import run_transaction, transaction
from models.tables import File

log = structlog.get_logger(__name__)

MAX_NEW_PICTURES = 16  # of one request: each is decoded, encoded and stored while its client waits
UNSEEN = uuid.UUID(int=0)  # the placeholder for a picture that is not decoded yet
_FETCHES_WITHIN = 3  # times FETCH_WITHIN_S: the time for all URLs of one request
# The cache of new pictures' bytes, during one request: masks are decoded a second time.
_KEPT_BYTES = 8_000_000
_WAYS = {
    "id": "the id of a file, from POST /v1/files",
    "data": "a data URL: data:image/png;base64,…",
    "url": "an https URL",
}


def keep(
    runtime: Runtime, caller: Caller, content: bytes | BinaryIO, *, field: str, way: str = "upload"
) -> File:
    """Check a picture, encode it again and store it; return its file.

    A picture that the tenant stored before keeps its file. content: a file is read only once a
    decoder is free. field: its name in the caller's interface. way: how it came, for the metrics.
    Raises InvalidPicture, which points at the field, StorageQuotaExceeded and PartUnavailable.
    """
    return _kept(runtime, caller, _normalised(runtime, caller, content, field), way)


def _kept(runtime: Runtime, caller: Caller, picture: NormalisedPicture, way: str) -> File:
    digest = content_sha256(picture.content)
    with transaction(runtime.database) as session:
        file = files.find_content(session, digest, tenant_id=caller.tenant_id)
        if file is None:
            quotas.check_room(session, caller, len(picture.content))
    if file is None or not _is_stored(runtime, file):
        file = _store(runtime, caller, picture, digest)
    telemetry.PICTURES_KEPT.labels(way).inc()
    log.info(
        "picture_kept",
        file_id=str(file.id),
        way=way,
        width_px=file.width_px,
        height_px=file.height_px,
    )
    return file


def is_new(value: str | None) -> bool:
    """Tell whether the value is a picture that still has to be decoded and stored, or fetched."""
    return value is not None and (dataurls.is_one(value) or _is_url(value))


class _FetchedEnough(Exception):
    """The request may fetch no more pictures, or the object store is away."""


class Intake:
    """The pictures of one request: repeated values are stored once, and new ones are limited."""

    def __init__(self, runtime: Runtime, caller: Caller) -> None:
        self._runtime = runtime
        self._caller = caller
        self._files: dict[str, File] = {}
        self._refused: dict[tuple[str, str], Problem] = {}
        self._closed: Problem | None = None  # why no further picture is stored
        self._contents: dict[uuid.UUID, bytes] = {}
        self._new = 0
        self._fetched_s = 0.0  # seconds that URLs took
        self._to_fetch = MAX_NEW_PICTURES  # how many may still be read from the object store
        self._unreadable: set[uuid.UUID] = set()  # files that the store lost, or no pictures

    def look_up(self, values: Iterable[str]) -> None:
        """Find all values that are ids of files in one query, also for a thousand jobs."""
        ids = {value: file_id for value in values if (file_id := _id(value)) is not None}
        if ids:
            with transaction(self._runtime.database) as session:
                found = files.find_all(
                    session, list(set(ids.values())), tenant_id=self._caller.tenant_id
                )
            self._files |= {
                value: found[file_id] for value, file_id in ids.items() if file_id in found
            }

    def files(self, fields: Mapping[str, str | None]) -> dict[str, File]:
        """Return the file of each picture field that has a value.

        Raises InvalidImageRequest or InvalidPicture, which point at the field, StorageQuotaExceeded
        and PartUnavailable.
        """
        found = {
            field: self._file(field, value) for field, value in fields.items() if value is not None
        }
        if "mask" in found and "init_image" in found:
            check_shapes(self._caller, found["init_image"], found["mask"])
        return found

    def keep(self, content: bytes | BinaryIO, *, field: str, way: str) -> File:
        """Store as `keep` does, and cache the picture's bytes until the request ends."""
        picture = _normalised(self._runtime, self._caller, content, field)
        file = _kept(self._runtime, self._caller, picture, way)
        if sum(map(len, self._contents.values())) + len(picture.content) <= _KEPT_BYTES:
            self._contents[file.id] = picture.content
        return file

    def check_mask(self, mask: File, width_px: int, height_px: int, *, field: str = "mask") -> None:
        """Check that the mask selects something of an image of this size.

        Raises InvalidImageRequest otherwise: the job would change nothing.
        """
        if self._judge("selects", mask, width_px, height_px) is False:
            detail = (
                "selects nothing: at the size of the image it has no transparent and no white part"
            )
            accepted = {"repainted": "its transparent part or, if it has none, its white part"}
            raise _refused(self._caller, field, detail, accepted)

    def has_hole(self, picture: File, width_px: int, height_px: int) -> bool:
        """Tell whether a part of the picture is transparent; False if that cannot be told now."""
        if picture.mode != "RGBA":
            return False
        return self._judge("has_hole", picture, width_px, height_px) is True

    def _judge(self, what: str, file: File, width_px: int, height_px: int) -> bool | None:
        """Answer a yes-or-no question about a picture; None if it cannot be fetched or read.

        So it is while the object store is away, or when the request has fetched enough: the job is
        then accepted without the check.
        """
        if file.id in self._unreadable:
            return None
        key = (what, file.content_sha256, width_px, height_px)
        try:
            return self._runtime.judged.get(
                key, lambda: self._look(what, file, width_px, height_px)
            )
        except (ObjectGone, NotAPicture) as error:
            _log_not_judged(file, error)
            self._unreadable.add(file.id)  # a thousand jobs may name it: it is fetched once
        except StoreUnavailable as error:
            _log_not_judged(file, error)
            self._to_fetch = 0  # a request must not ask an absent store a thousand times
        except _FetchedEnough:
            pass
        except TooBusy:
            raise _too_busy() from None
        return None

    def _look(self, what: str, file: File, width_px: int, height_px: int) -> bool:
        """Ask a decoder about the picture's pixels. Raises _FetchedEnough."""
        content = self._contents.get(file.id)
        if content is None:
            if self._to_fetch <= 0:
                raise _FetchedEnough
            self._to_fetch -= 1
            content = self._runtime.store.get(file.object_key, soon=True)
        asked = getattr(self._runtime.decoders, what)
        return bool(asked(content, width_px, height_px, tenant=self._caller.tenant_id))

    def _file(self, field: str, value: str) -> File:
        if (known := self._files.get(value)) is not None:
            return known
        if (refusal := self._refused.get((field, value))) is not None:
            raise refusal
        try:
            self._files[value] = self._bring(field, value)
        except (InvalidImageRequest, InvalidPicture) as error:
            self._refused[field, value] = error
            raise
        except (PartUnavailable, StorageQuotaExceeded) as error:
            self._closed = error
            raise
        return self._files[value]

    def _bring(self, field: str, value: str) -> File:
        if not is_new(value):
            return _named(self._runtime, self._caller, field, value)
        if self._closed is not None:
            raise self._closed
        self._new += 1
        if self._new > MAX_NEW_PICTURES:
            most = {"max_new_pictures": MAX_NEW_PICTURES}
            detail = (
                f"is one of more than {MAX_NEW_PICTURES} new pictures in the request;"
                " upload them with POST /v1/files first"
            )
            raise _refused(self._caller, field, detail, most)
        if dataurls.is_one(value):
            return self.keep(_decoded(self._caller, field, value), field=field, way="data_url")
        return self.keep(self._fetched(field, value), field=field, way="url")

    def _fetched(self, field: str, url: str) -> bytes:
        """Fetch a picture by its URL, if the tenant may use URLs."""
        parts = self._runtime
        if not self._caller.limits.url_inputs:
            detail = (
                "is a URL, and your tenant may not name pictures by URL;"
                " upload the picture with POST /v1/files"
            )
            raise _refused(self._caller, field, detail)
        if (why := parts.outbound.refusal(url)) is not None:
            raise _refused(self._caller, field, why)
        within_s = parts.settings.fetch_within_s
        left_s = min(within_s, _FETCHES_WITHIN * within_s - self._fetched_s)
        if left_s <= 0:
            detail = "was not fetched: the other pictures of the request took too long"
            raise _refused(self._caller, field, detail)
        began = time.monotonic()
        try:
            max_bytes = parts.settings.max_upload_bytes
            return parts.outbound.fetch(url, max_bytes=max_bytes, timeout_s=left_s)
        except Unreachable as error:
            raise _refused(self._caller, field, f"could not be fetched: {error.reason}") from None
        finally:
            self._fetched_s += time.monotonic() - began


def _named(runtime: Runtime, caller: Caller, field: str, value: str) -> File:
    """Find the file with this id."""
    if (file_id := _id(value)) is None:
        nor_url = " nor a URL" if caller.limits.url_inputs else ""
        raise _refused(caller, field, f"is neither the id of a file nor a data URL{nor_url}")
    with transaction(runtime.database) as session:
        file = files.find(session, file_id, tenant_id=caller.tenant_id)
    if file is None:
        raise _refused(caller, field, f"names a file that your tenant does not have: {file_id}")
    return file


def _id(value: str) -> uuid.UUID | None:
    try:
        # The longest spelling of a UUID is urn:uuid:{…}, of 45 characters.
        return uuid.UUID(value) if len(value) <= 45 else None
    except ValueError:
        return None


def _is_url(value: str) -> bool:
    return value[:8].lower().startswith(("https://", "http://"))


def _normalised(
    runtime: Runtime, caller: Caller, content: bytes | BinaryIO, field: str
) -> NormalisedPicture:
    try:
        with telemetry.PICTURE_SECONDS.time():
            return runtime.decoders.normalise(content, tenant=caller.tenant_id)
    except NotAPicture as error:
        telemetry.PICTURES_REFUSED.inc()
        if isinstance(error, DecoderDied):
            telemetry.DECODERS_DIED.inc()
            log.warning("decoder_died", field=field)
        entry: FieldError = {
            "pointer": f"/{field}",
            "detail": f"The picture {error}",
            "accepted": encoding.ACCEPTED,
        }
        raise InvalidPicture(
            f"{field}: the picture {error}.", errors=[entry], accepted=encoding.ACCEPTED
        ) from None
    except TooBusy:
        raise _too_busy() from None


def _log_not_judged(file: File, error: Exception) -> None:
    log.warning("mask_not_judged", file_id=str(file.id), reason=type(error).__name__)


def _too_busy() -> PartUnavailable:
    return PartUnavailable(
        "Too many pictures are being decoded right now.", retry_after_s=2, part="pictures"
    )


def _is_stored(runtime: Runtime, file: File) -> bool:
    """Ask whether the store still has the picture; True if the store cannot tell.

    A lost picture is stored again when its tenant uploads it again.
    """
    try:
        return runtime.store.holds(file.object_key)
    except StoreUnavailable:
        return True


def _store(runtime: Runtime, caller: Caller, picture: NormalisedPicture, digest: str) -> File:
    key = picture_key(caller.tenant_id, digest)
    run_transaction(runtime.database, lambda session: uploads.begin(session, key))
    try:
        runtime.store.put(key, picture.content, content_type="image/png")
    except StoreUnavailable as error:
        log.warning("picture_not_stored", reason=str(error))
        raise PartUnavailable(
            "The object store cannot be reached right now.", retry_after_s=2, part="object_store"
        ) from None

    def keep_row(session: Session) -> File:
        file = files.keep(
            session,
            tenant_id=caller.tenant_id,
            object_key=key,
            mode=picture.mode,
            size_bytes=len(picture.content),
            width_px=picture.width_px,
            height_px=picture.height_px,
            content_sha256=digest,
            actor=caller.actor,
        )
        quotas.check_room(session, caller)
        return file

    return run_transaction(runtime.database, keep_row)


def _decoded(caller: Caller, field: str, value: str) -> bytes:
    try:
        return dataurls.decoded(value)
    except dataurls.Unreadable as error:
        raise _refused(caller, field, f"is a data URL {error}") from None


def check_shapes(caller: Caller, picture: File, mask: File) -> None:
    """Check that mask and picture have the same shape. Raises InvalidImageRequest.

    Both are scaled and cropped alike, so a mask of another shape would cover the wrong area.
    """
    difference = abs(mask.width_px * picture.height_px - picture.width_px * mask.height_px)
    if difference > picture.width_px + picture.height_px:
        # A larger difference than rounding makes when a picture is scaled.
        detail = (
            f"has another shape than init_image: it is {mask.width_px}x{mask.height_px} pixels,"
            f" and init_image {picture.width_px}x{picture.height_px}"
        )
        raise _refused(caller, "mask", detail, {"ratio_of": "init_image"})


def _refused(
    caller: Caller, field: str, detail: str, accepted: object = None
) -> InvalidImageRequest:
    ways = [text for way, text in _WAYS.items() if way != "url" or caller.limits.url_inputs]
    return InvalidImageRequest.at(field, detail, accepted=ways if accepted is None else accepted)
