"""/v1/images: OpenAI's interface for images, so that its clients work unmodified. Every call is a job like any other."""

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify, request
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import FileStorage

from app import accepting, delivery, inputs, openai_body, openai_stream, waiting
from app.accepting import Accepted
from app.auth import caller, require_key
from app.body import read_object
from app.gateway import gateway
from app.idempotency import read_once
from app.openai_answers import NO_TOKENS, extras_of, may_still_answer, problem_of_end
from app.openai_body import EDIT, GENERATION, VARIATION, Asked, nearest_size
from app.problems import (
    InvalidImageRequest,
    InvalidPicture,
    InvalidQuery,
    NotOffered,
    PartUnavailable,
    Problem,
    UnsupportedMediaType,
)
from edges.objectstore import StoreUnavailable
from models.idempotency import Once
from models.tables import Artifact, File, Job
from policy.catalog import Wish

bp = Blueprint("openai_images", __name__, url_prefix="/v1/images")
bp.before_request(require_key)

RETRY_COUNT = "X-Stainless-Retry-Count"  # how OpenAI's clients number their tries; they send no idempotency key


@bp.errorhandler(InvalidImageRequest)
@bp.errorhandler(InvalidPicture)
@bp.errorhandler(InvalidQuery)
def as_bad_request(problem: Problem) -> Response:
    """400, where our own routes say 422: it is what OpenAI answers, and what its clients raise BadRequestError for."""
    problem.status = 400
    return problem.response()


@bp.post("/generations")
def generate() -> ResponseReturnValue:
    """Images from a prompt; with `stream`, server-sent events with partial images on the way."""
    fields = read_object(request)
    asked = openai_body.read(GENERATION, fields, gateway().fleet)
    return _serve(asked, asked.wish, [fields])


@bp.post("/edits")
def edit() -> ResponseReturnValue:
    """A picture painted over as the prompt says; with a mask, only where that is transparent (or white, if it has no transparency)."""
    fields, image, mask = _read_form()
    asked = openai_body.read(EDIT, fields, gateway().fleet)
    init = inputs.keep(image.stream, field="image", way="openai")
    repainted = inputs.keep(mask.stream, field="mask", way="openai") if mask is not None else None
    if repainted is not None:
        inputs.check_shapes(init, repainted)
    wish = replace(_sized(asked.wish, init), init_image=init.id, mask=repainted.id if repainted is not None else None)
    return _serve(asked, wish, [fields, init.content_sha256, repainted and repainted.content_sha256])


@bp.post("/variations")
def vary() -> ResponseReturnValue:
    """Pictures like the one that is sent."""
    fields, image, mask = _read_form()
    if mask is not None:
        raise NotOffered("A variation takes no mask; /v1/images/edits does.", parameter="mask")
    asked = openai_body.read(VARIATION, fields, gateway().fleet)
    init = inputs.keep(image.stream, field="image", way="openai")
    return _serve(asked, replace(_sized(asked.wish, init), init_image=init.id), [fields, init.content_sha256])


def _read_form() -> tuple[dict[str, Any], FileStorage, FileStorage | None]:
    """The fields, the one picture and the mask. Raises UnsupportedMediaType, NotOffered, InvalidImageRequest, BodyTooLarge."""
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType("Send the picture as multipart/form-data.", accepted=["multipart/form-data"])
    request.max_content_length = gateway().settings.max_upload_bytes
    images = request.files.getlist("image") + request.files.getlist("image[]")
    if len(images) > 1:
        raise NotOffered(f"The models here take one picture at a time; there are {len(images)}.", parameter="image")
    if not images:
        detail = "is required: one picture, as a file of the form"
        raise InvalidImageRequest(f"image {detail}.", errors=[{"pointer": "/image", "detail": detail}])
    for name in request.files.keys() - {"image", "image[]", "mask"}:
        detail = f"{name[:64]} is not offered as a file: image and mask are."
        raise NotOffered(detail, parameter=name[:64])
    return openai_body.gathered(request.form.to_dict(flat=False)), images[0], request.files.get("mask")


def _sized(wish: Wish, picture: File) -> Wish:
    """`auto` is the offered size that is nearest to the picture's."""
    if wish.size is not None:
        return wish
    fleet = gateway().fleet
    model = fleet.model_ids[wish.model or fleet.default_model()]
    tier = wish.tier if wish.tier in fleet.tiers else fleet.default_tier()
    return replace(wish, size=nearest_size(fleet.sizes_of(model, tier), picture.width_px, picture.height_px))


def _serve(asked: Asked, wish: Wish, asks_for: list[Any]) -> ResponseReturnValue:
    accepted = _accept(asked, wish, asks_for)
    if asked.streams:
        return openai_stream.respond(asked, accepted.job)
    job = waiting.watched(accepted.job.id, gateway().settings.images_wait_s)
    if (problem := problem_of_end(job.id, job.state, job.failure_code)) is not None:
        raise problem
    return jsonify(_view(asked, job)), 200, {"X-Darkroom-Job-Id": str(job.id)}


def _accept(asked: Asked, wish: Wish, asks_for: list[Any]) -> Accepted:
    """The job of this call: a new one for a first try, for a further one that of the try before, as long as that may still answer it."""
    metadata = dict(asked.metadata) | ({"user": asked.user} if asked.user and "user" not in asked.metadata else {})
    once = read_once(request, asks_for)
    if once is None:
        once = _by_itself(asks_for)
        if not once.renew and (earlier := accepting.answered(once)) is not None:
            if may_still_answer(earlier, streams=asked.streams):
                return Accepted(earlier, is_new=False)
            once = replace(once, renew=True)
    elif (earlier := accepting.answered(once)) is not None:
        return Accepted(earlier, is_new=False)
    return accepting.accept(accepting.resolve(wish), metadata=metadata, once=once)


def _by_itself(asks_for: list[Any]) -> Once:
    """What a call without an idempotency key is known by when it is tried again."""
    canonical = json.dumps([request.path, *asks_for], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    is_first = request.headers.get(RETRY_COUNT, "0") == "0"
    return Once(f"→openai:{caller().api_key_id}:{digest}", digest, renew=is_first)  # no header can carry that arrow


def _view(asked: Asked, job: Job) -> dict[str, Any]:
    return {
        "created": int(job.accepted_at.timestamp()),
        "background": "opaque",
        "data": [_image_view(asked, image.artifact) | {"seed": image.seed} for image in job.images if image.artifact is not None],
        "output_format": job.output_format,
        "quality": None if asked.quality == "auto" else asked.quality,
        "size": f"{job.width_px}x{job.height_px}",
        "usage": NO_TOKENS,
        **({"safety_identifier": asked.user} if asked.user else {}),
        **extras_of(job),
    }


def _image_view(asked: Asked, artifact: Artifact) -> dict[str, Any]:
    parts = gateway()
    digests = {"pixels_sha256": artifact.pixels_sha256, "content_sha256": artifact.content_sha256}
    if asked.as_url:
        return {"url": delivery.url_of(artifact), **digests}
    try:
        return {"b64_json": base64.b64encode(parts.store.get(artifact.object_key)).decode(), **digests}
    except StoreUnavailable:
        raise PartUnavailable("The object store cannot be reached right now.", retry_after_s=2, part="object_store") from None
