"""Serve /v1/images, OpenAI's images interface, so that its clients work unmodified.

Every call makes a job like any other.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flask import Blueprint, Response, request
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import FileStorage

from app.documents import JobDocument
from app.http import delivery, uploads
from app.http.answers import answer
from app.http.auth import require_key
from app.http.body import read_object
from app.http.connection import has_left
from app.http.context import caller, runtime
from app.http.errors import respond
from app.http.files import is_left_out
from app.http.idempotency import read_idempotent
from app.openai import body as openai_body
from app.openai import stream as openai_stream
from app.openai.answers import extras_of, may_still_answer, problem_of_end
from app.openai.body import EDIT, GENERATION, VARIATION, ImageCall, nearest_size
from app.problems import (
    InvalidImageRequest,
    InvalidPicture,
    InvalidQuery,
    NotOffered,
    PartUnavailable,
    Problem,
    UnsupportedMediaType,
)
from app.schemas import openai as schemas
from app.services import inputs, jobs, submit, wait
from app.services.submit import Accepted, Prepared
from edges.objectstore import StoreUnavailable
from models.idempotency import IdempotentRequest
from models.tables import Artifact, File, Job
from policy.params import RequestedParams

bp = Blueprint("openai_images", __name__, url_prefix="/v1/images")
bp.before_request(require_key)

# The header in which OpenAI's clients count their tries; they send no idempotency key.
RETRY_COUNT = "X-Stainless-Retry-Count"


@bp.errorhandler(InvalidImageRequest)
@bp.errorhandler(InvalidPicture)
@bp.errorhandler(InvalidQuery)
def as_bad_request(problem: Problem) -> Response:
    """Answer 400 where our own routes answer 422.

    OpenAI answers 400, and its clients raise BadRequestError for that status only.
    """
    problem.status = 400
    return respond(problem)


@bp.post("/generations")
def generate() -> ResponseReturnValue:
    """Make images from a prompt; with `stream`, send events with partial images on the way."""
    fields = read_object(request, problem=InvalidImageRequest)
    return _serve(_read(GENERATION, fields), None, fields)


@bp.post("/edits")
def edit() -> ResponseReturnValue:
    """Repaint a picture as the prompt says; with a mask, only in the area that it selects.

    A mask selects its transparent area, or its white area if it has no transparency. Without a
    mask, the transparent area of the picture is repainted. The body is a form, or JSON with
    `images` and `mask`, where each holds an `image_url` (a data URL) or a `file_id`.
    """
    fields, sent = _read_edit()
    return _serve(_read(EDIT, fields), sent, fields)


@bp.post("/variations")
def vary() -> ResponseReturnValue:
    """Make variations of the picture in the body."""
    fields, sent = _read_edit()
    if sent.mask is not None:
        raise NotOffered("A variation takes no mask; /v1/images/edits does.", parameter="mask")
    return _serve(_read(VARIATION, fields), sent, fields)


Source = FileStorage | str  # a file of a form; the id of a file, a data URL or a URL


@dataclass
class _SentPictures:
    """The picture of a call, and its mask, as they were sent; not decoded yet."""

    image: Source
    mask: Source | None

    def digests(self) -> list[str | None]:
        """Return a digest of each, to compare calls."""
        sources = (self.image, self.mask)
        return [_digest(source) if source is not None else None for source in sources]

    def forget(self) -> None:
        """Free the pictures, so that they take no memory while the client waits."""
        self.image = ""
        self.mask = None

    def unseen(self, requested: RequestedParams) -> RequestedParams:
        """Return the parameters with placeholders for the pictures, to check them first."""
        mask = inputs.UNSEEN if self.mask is not None else None
        return replace(requested, init_image=inputs.UNSEEN, mask=mask)

    def bring(self, requested: RequestedParams) -> RequestedParams:
        """Return the parameters with the pictures stored.

        Without a size they get one near the picture's. Raises as services.inputs does.
        """
        asking = caller()
        intake = inputs.Intake(runtime(), asking)
        init = _brought(intake, self.image, "image")
        sized = _sized(self.unseen(requested), init)
        resolved = submit.resolve(runtime(), asking, sized)
        requested = replace(requested, size=sized.size)
        size = (resolved.width_px, resolved.height_px)
        if self.mask is not None:
            mask = _brought(intake, self.mask, "mask")
            inputs.check_shapes(asking, init, mask)
            intake.check_mask(mask, *size)
            return replace(requested, init_image=init.id, mask=mask.id)
        mask_id = init.id if intake.has_hole(init, *size) else None
        return replace(requested, init_image=init.id, mask=mask_id)


def _brought(intake: inputs.Intake, source: Source, field: str) -> File:
    if isinstance(source, FileStorage):
        # An IO[bytes] has the methods of a BinaryIO.
        return intake.keep(source.stream, field=field, way="openai")  # type: ignore[arg-type]
    return intake.files({field: source})[field]


def _digest(source: Source) -> str:
    if isinstance(source, str):
        return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    source.stream.seek(0)
    # An IO[bytes] has the methods that file_digest needs.
    digest = hashlib.file_digest(source.stream, "sha256").hexdigest()  # type: ignore[arg-type]
    source.stream.seek(0)
    return digest


def _read(kind: str, fields: Mapping[str, Any]) -> ImageCall:
    return openai_body.read(kind, fields, runtime().fleet, runtime().asker(caller()))


def _read_edit() -> tuple[dict[str, Any], _SentPictures]:
    """Read the fields, the one picture and the mask.

    Raises UnsupportedMediaType, NotOffered, InvalidImageRequest, BodyTooLarge.
    """
    if request.mimetype == "multipart/form-data":
        request.max_content_length = runtime().settings.max_upload_bytes
        return _read_form()
    if request.mimetype == "application/json":
        request.max_content_length = runtime().settings.max_job_body_bytes
        fields = read_object(request, problem=InvalidImageRequest)
        return fields, _sent_in(fields)
    accepted = ["multipart/form-data", "application/json"]
    raise UnsupportedMediaType(
        "Send the picture as multipart/form-data, or as a data URL in JSON.", accepted=accepted
    )


def _read_form() -> tuple[dict[str, Any], _SentPictures]:
    files = {
        name: [file for file in sent if not is_left_out(file)]
        for name, sent in request.files.lists()
    }
    images = files.pop("image", []) + files.pop("image[]", [])
    masks = files.pop("mask", []) + files.pop("mask[]", [])
    for name in (name for name, sent in files.items() if sent):
        raise NotOffered(
            f"{name[:64]} cannot be a file; only image and mask can.", parameter=name[:64]
        )
    fields = openai_body.gathered(request.form.to_dict(flat=False))
    return fields, _only(images, masks, "one picture, as a file of the form")


def _sent_in(fields: dict[str, Any]) -> _SentPictures:
    """Take the pictures out of the fields `image` or `images`, and `mask`.

    Each is text, {"image_url": …} or {"file_id": …}.
    """
    images = [fields.pop(name) for name in ("image", "images") if fields.get(name) is not None]
    listed = [each for said in images for each in (said if isinstance(said, list) else [said])]
    mask = fields.pop("mask", None)
    sources = [_source(each, "image") for each in listed]
    masks = [_source(mask, "mask")] if mask is not None else []
    return _only(sources, masks, 'one picture: "images": [{"image_url": "data:…"}]')


def _source(said: object, field: str) -> str:
    if isinstance(said, dict) and len(said) == 1 and said.keys() <= {"image_url", "file_id"}:
        said = next(iter(said.values()))
    if not isinstance(said, str):
        detail = 'must be text, {"image_url": a data URL} or {"file_id": the id of a file}'
        raise InvalidImageRequest.at(field, detail)
    return said


def _only(images: Sequence[Source], masks: Sequence[Source], wanted: str) -> _SentPictures:
    for field, what, sent in (("image", "picture", images), ("mask", "mask", masks)):
        if len(sent) > 1:
            raise NotOffered(
                f"Models take one {what} at a time; the request has {len(sent)}.",
                parameter=field,
            )
    if not images:
        raise InvalidImageRequest.at("image", f"is required: {wanted}")
    return _SentPictures(images[0], masks[0] if masks else None)


def _sized(requested: RequestedParams, picture: File) -> RequestedParams:
    """Replace size `auto` by the size that is nearest to the picture's.

    Of those of the model and tier that the request resolves to.
    """
    if requested.size is not None:
        return requested
    resolved = submit.resolve(runtime(), caller(), requested)
    sizes = runtime().fleet.sizes_of(resolved.model, resolved.tier)
    return replace(requested, size=nearest_size(sizes, picture.width_px, picture.height_px))


def _serve(
    asked: ImageCall, sent: _SentPictures | None, fields: Mapping[str, Any]
) -> ResponseReturnValue:
    asks_for = [fields, *(sent.digests() if sent is not None else [])]
    if asked.streams:
        # Before the job is made: without a place nobody could follow it.
        place = runtime().events.take_place(caller().tenant_id)
        try:
            return openai_stream.respond(asked, _accept(asked, sent, asks_for).job, place)
        except BaseException:
            place.release()
            raise
    with wait.require_waiting_place(runtime(), caller()):
        job_id = _accept(asked, sent, asks_for).job.id
        if sent is not None:
            sent.forget()
        job = _wait_for_job(job_id)
    problem = problem_of_end(job.id, job.state, job.failure_code, job.failure_detail)
    if problem is not None:
        raise problem
    return answer(_view(asked, job), headers={"X-Darkroom-Job-Id": str(job.id)})


def _wait_for_job(job_id: uuid.UUID) -> Job:
    """Return the job once it has ended, or as it is after `IMAGES_WAIT_S`."""
    job = jobs.find(runtime(), caller(), job_id)
    uploads.release()  # the job's pictures are stored by now
    wait_s = runtime().settings.images_wait_s
    return wait.wait_for_end(runtime(), caller(), job, wait_s, has_left=has_left(request))


def _accept(asked: ImageCall, sent: _SentPictures | None, asks_for: list[Any]) -> Accepted:
    """Accept the job of this call; a client's retry may get the job of the earlier try."""

    def may_answer(earlier: JobDocument) -> bool:
        return own_key is not None or may_still_answer(earlier, streams=asked.streams)

    own_key = read_idempotent(request, asks_for)
    idempotent = own_key or _derived_key(asks_for)
    return submit.accept_once(
        runtime(),
        caller(),
        lambda: _prepare(asked, sent),
        idempotent=idempotent,
        may_answer=may_answer,
    )


def _prepare(asked: ImageCall, sent: _SentPictures | None) -> Prepared:
    """Resolve the call. Pictures are decoded last, and only if the job could be accepted."""
    metadata = dict(asked.metadata)
    requested = asked.requested
    if asked.user:
        metadata.setdefault("user", asked.user)
    if sent is not None:
        unseen = submit.resolve(runtime(), caller(), sent.unseen(requested))
        # Also for stored files: they are decoded to find out whether they have a transparent area.
        submit.foresee(runtime(), caller(), unseen)
        requested = sent.bring(requested)
    return Prepared(submit.resolve(runtime(), caller(), requested), metadata)


def _derived_key(asks_for: list[Any]) -> IdempotentRequest:
    """Make an idempotency key for a call without one, so that a retry finds its job."""
    canonical = json.dumps([request.path, *asks_for], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    is_first = request.headers.get(RETRY_COUNT, "0") == "0"
    # No key that a client sends in a header can contain the arrow.
    return IdempotentRequest(f"→openai:{caller().api_key_id}:{digest}", digest, renew=is_first)


def _view(asked: ImageCall, job: Job) -> schemas.Images:
    kind = schemas.ImagesOnBehalf if asked.user else schemas.Images
    user: dict[str, Any] = {"safety_identifier": asked.user} if asked.user else {}
    return kind(
        created=int(job.accepted_at.timestamp()),
        data=[
            _image_view(asked, image.artifact, image.seed)
            for image in job.images
            if image.artifact is not None
        ],
        output_format=job.output_format,
        quality=None if asked.quality == "auto" else asked.quality,
        size=f"{job.width_px}x{job.height_px}",
        usage=schemas.usage_of(job.prompt_tokens),
        **user,
        **extras_of(job),
    )


def _image_view(
    asked: ImageCall, artifact: Artifact, seed: int
) -> schemas.ImageContent | schemas.ImageLink:
    if asked.as_url:
        return schemas.ImageLink(
            url=delivery.url_of(artifact),
            seed=seed,
            pixels_sha256=artifact.pixels_sha256,
            content_sha256=artifact.content_sha256,
        )
    try:
        content = runtime().store.get(artifact.object_key)
    except StoreUnavailable:
        raise PartUnavailable(
            "The object store cannot be reached right now.", retry_after_s=2, part="object_store"
        ) from None
    return schemas.ImageContent(
        b64_json=base64.b64encode(content).decode(),
        seed=seed,
        pixels_sha256=artifact.pixels_sha256,
        content_sha256=artifact.content_sha256,
    )
