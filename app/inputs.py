"""Pictures that a request starts from: uploads, data URLs and, for tenants that may, URLs; all become files, and files have ids."""

import base64
import binascii
import re
import uuid
from collections.abc import Mapping
from typing import BinaryIO

import structlog
from sqlalchemy.orm import Session

from app.auth import caller
from app.gateway import gateway
from app.problems import InvalidImageRequest, InvalidPicture, PartUnavailable
from edges import pictures as encoding
from edges import telemetry
from edges.objectstore import StoreUnavailable, content_sha256, picture_key
from edges.outbound import Unreachable
from edges.pictures import NotAPicture, Picture, TooBusy
from models import files, uploads
from models.database import run_transaction, transaction
from models.tables import File

log = structlog.get_logger(__name__)

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
_WAYS = {
    "id": "the id that POST /v1/files answered with",
    "data": "a data URL: data:image/png;base64,…",
    "url": "an https URL",
}


def keep(content: bytes | BinaryIO, *, field: str, way: str = "upload") -> File:
    """Check a picture, encode it again and store it; the row of the file, which is the one that is there if the tenant brought it before.

    content: a file is read only when its turn has come.  field: how the caller's interface names it.  way: how it came, for the metrics.
    Raises InvalidPicture, which points at the field, and PartUnavailable.
    """
    picture = _normalised(content, field)
    digest, tenant_id = content_sha256(picture.content), caller().tenant_id
    with transaction(gateway().database) as session:
        file = files.find_content(session, digest, tenant_id=tenant_id)
    if file is None or not _is_stored(file):
        file = _store(picture, digest)
    telemetry.PICTURES_KEPT.labels(way).inc()
    log.info("picture_kept", file_id=str(file.id), way=way, width_px=file.width_px, height_px=file.height_px)
    return file


def pictures(fields: Mapping[str, str | None]) -> dict[str, uuid.UUID]:
    """The file of each field that stands for a picture, of those that say something.

    Raises InvalidImageRequest or InvalidPicture, which point at the field, and PartUnavailable.
    """
    found = {field: _file(field, value) for field, value in fields.items() if value is not None}
    if "mask" in found and "init_image" in found:
        check_shapes(found["init_image"], found["mask"])
    return {field: file.id for field, file in found.items()}


def _file(field: str, value: str) -> File:
    if value[:5].lower() == "data:":
        return keep(_decoded(field, value), field=field, way="data_url")
    if value[:8].lower().startswith(("https://", "http://")):
        return keep(_fetched(field, value), field=field, way="url")
    try:
        file_id = uuid.UUID(value)
    except ValueError:
        raise _refused(field, "is neither the id of a file nor a data URL" + (" nor a URL" if _may_fetch() else "")) from None
    with transaction(gateway().database) as session:
        file = files.find(session, file_id, tenant_id=caller().tenant_id)
    if file is None:
        raise _refused(field, f"names no file of yours: {file_id}")
    return file


def _normalised(content: bytes | BinaryIO, field: str) -> Picture:
    try:
        with telemetry.PICTURE_SECONDS.time():
            return encoding.normalise(content)
    except NotAPicture as error:
        telemetry.PICTURES_REFUSED.inc()
        entry = {"pointer": f"/{field}", "detail": f"The picture {error}", "accepted": encoding.ACCEPTED}
        raise InvalidPicture(f"{field}: the picture {error}.", errors=[entry], accepted=encoding.ACCEPTED) from None
    except TooBusy:
        raise PartUnavailable("Many pictures are being read right now.", retry_after_s=2, part="pictures") from None


def _is_stored(file: File) -> bool:
    """Ask whether the store still has it: what it has lost is there again with whoever brings it again. If it cannot say: yes."""
    try:
        return gateway().store.holds(file.object_key)
    except StoreUnavailable:
        return True


def _store(picture: Picture, digest: str) -> File:
    parts, asking = gateway(), caller()
    key = picture_key(asking.tenant_id, digest)
    run_transaction(parts.database, lambda session: uploads.begin(session, key))
    try:
        parts.store.put(key, picture.content, content_type="image/png")
    except StoreUnavailable as error:
        log.warning("picture_not_stored", reason=str(error))
        raise PartUnavailable("The object store cannot be reached right now.", retry_after_s=2, part="object_store") from None

    def keep_row(session: Session) -> File:
        return files.keep(
            session,
            tenant_id=asking.tenant_id,
            object_key=key,
            mode=picture.mode,
            size_bytes=len(picture.content),
            width_px=picture.width_px,
            height_px=picture.height_px,
            content_sha256=digest,
            actor=asking.actor,
        )

    return run_transaction(parts.database, keep_row)


def _decoded(field: str, value: str) -> bytes:
    head = _DATA_URL.match(value)
    if head is None:
        raise _refused(field, "is not a data URL of a picture in base64")
    try:
        return base64.b64decode(value[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused(field, "is a data URL whose base64 is damaged") from None


def _fetched(field: str, url: str) -> bytes:
    """What lies behind a URL, for a tenant that may have pictures fetched."""
    parts = gateway()
    if not _may_fetch():
        raise _refused(field, "is a URL, and pictures are not fetched for your tenant; upload it with POST /v1/files")
    if (why := parts.outbound.refusal(url)) is not None:
        raise _refused(field, why)
    try:
        return parts.outbound.fetch(url, max_bytes=parts.settings.max_upload_bytes, timeout_s=parts.settings.fetch_within_s)
    except Unreachable as error:
        raise _refused(field, f"could not be fetched: {error.reason}") from None


def _may_fetch() -> bool:
    return caller().limits.url_inputs


def check_shapes(picture: File, mask: File) -> None:
    """A mask is scaled and cut as its picture is: of another shape, it would cover something else."""
    difference = abs(mask.width_px * picture.height_px - picture.width_px * mask.height_px)
    if difference > picture.width_px + picture.height_px:  # what rounding makes of a picture that was scaled
        shapes = f"{mask.width_px}x{mask.height_px} pixels, and init_image {picture.width_px}x{picture.height_px}"
        raise _refused("mask", f"has another shape than init_image: it is {shapes}", {"ratio_of": "init_image"})


def _refused(field: str, detail: str, accepted: object = None) -> InvalidImageRequest:
    ways = [text for way, text in _WAYS.items() if way != "url" or _may_fetch()]
    return InvalidImageRequest(
        f"{field} {detail}", errors=[{"pointer": f"/{field}", "detail": detail, "accepted": ways if accepted is None else accepted}]
    )
