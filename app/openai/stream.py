"""Stream an image call as server-sent events for OpenAI's clients: partial images, then the image.

Their decoder takes every block for one of their own events. So the stream has no `id:`, no `retry:`
and no other event; a heartbeat is a comment. A failed heartbeat also shows that the client has
left. When the last client that streams a job through this process has left, the job is canceled,
unless the call asked to keep it running. Clients of other processes are not counted: a client that
tries again may be connected to any process.
"""

import base64
import io
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import structlog
from flask import Response, request
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from app.caller import Caller
from app.documents import JobDocument
from app.http.connection import give_up_when_unread
from app.http.context import caller, runtime
from app.http.events import teller
from app.live.capacity import Holding
from app.openai.answers import extras_of, problem_of_end
from app.openai.body import ImageCall
from app.problems import JobAlreadyFinished, JobNotFound, PartUnavailable, Problem, Unauthenticated
from app.runtime import Runtime
from app.schemas import openai as schemas
from app.schemas.base import to_json
from app.services.cancel import cancel
from edges.encoding import encode
from edges.eventlog import FINAL, PREVIEW, JobEvent
from edges.objectstore import StoreUnavailable, image_key
from policy.formats import FORMATS

log = structlog.get_logger(__name__)

HEARTBEAT_S = 1.5  # the second heartbeat shows that a client has left


def respond(asked: ImageCall, job: JobDocument, place: Holding) -> Response:
    """Stream the events of a job, whether it is new or was found by its key.

    place: reserved among the event streams; freed at the end.
    """
    events = runtime().events.follow(
        caller(),
        job.id,
        tell=teller(),
        previews=asked.partial_images > 0,
        heartbeat_s=HEARTBEAT_S,
        place=place,
    )
    give_up_when_unread(request)
    headers = {
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
        "X-Darkroom-Job-Id": str(job.id),
    }
    lines = _lines(runtime(), caller(), asked, job, events)
    return Response(lines, content_type="text/event-stream", headers=headers)


def _lines(
    parts: Runtime,
    asking: Caller,
    asked: ImageCall,
    job: JobDocument,
    events: Iterator[JobEvent | None],
) -> Iterator[str]:
    """Yield the stream's lines; cancel the job when its last client leaves before its end."""
    told = _EventTranslator(asked, job, parts)
    is_over = False
    parts.watchers.enter(job.id)
    try:
        yield ": begin\n\n"
        for event in events:
            yield ": hb\n\n" if event is None else "".join(told.lines(event))
            is_over = is_over or (event is not None and event.kind == FINAL)
        if not is_over:  # this process ends, and the job goes on
            is_over = True
            detail = "The gateway is being restarted. Send the request again."
            yield _data(_error(PartUnavailable(detail, part="gateway")))
        yield "data: [DONE]\n\n"
    except Unauthenticated as problem:  # a revoked key is no reason to cancel the job
        is_over = True
        yield _data(_error(problem))
    finally:
        is_last = parts.watchers.leave(job.id)
        if is_last and not is_over and not asked.keeps_running:
            _cancel(parts, asking, job.id)


class _EventTranslator:
    """Selects which events of the job are sent, and translates them to OpenAI's."""

    def __init__(self, asked: ImageCall, job: JobDocument, parts: Runtime) -> None:
        self._asked = asked
        self._parts = parts
        self._tenant_id = job.tenant_id
        self._output_format = job.output_format
        self._extras = dict(extras_of(job))
        self._size = f"{job.width_px}x{job.height_px}"
        self._partials = 0

    def lines(self, event: JobEvent) -> Iterator[str]:
        if event.kind == PREVIEW and self._is_due(event.data):
            yield _data(self._partial(event.data))
        elif event.kind == FINAL:
            yield _data(self._final(event.data))

    def _is_due(self, preview: Mapping[str, Any]) -> bool:
        """Tell whether to send this preview: the k-th of n is due at k / (n + 1) of the steps."""
        wanted = self._asked.partial_images
        step = preview["step"]
        num_steps = preview["num_steps"]
        is_far_enough = step * (wanted + 1) >= num_steps * (self._partials + 1)
        return self._partials < wanted and step < num_steps and is_far_enough

    def _partial(self, preview: Mapping[str, Any]) -> schemas.PartialImage:
        content = base64.b64decode(preview["jpeg_base64"])
        if self._output_format != "jpeg":
            pixels = np.asarray(Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB"))
            content = encode(pixels, self._output_format)
        index = self._partials
        self._partials += 1
        return schemas.PartialImage(
            type=f"{self._asked.event}.partial_image",
            partial_image_index=index,
            step=preview["step"],
            steps=preview["num_steps"],
            job_id=self._extras["job_id"],
            **self._head(content),
        )

    def _final(self, job: Mapping[str, Any]) -> schemas.CompletedImage | schemas.StreamError:
        failure = job["failure"] or {}
        problem = problem_of_end(
            uuid.UUID(job["id"]), job["state"], failure.get("code"), failure.get("detail")
        )
        if problem is not None:
            return _error(problem)
        image = job["images"][0]
        extension = FORMATS[self._output_format].extension
        key = image_key(self._tenant_id, image["content_sha256"], extension)
        try:
            content = self._parts.store.get(key)
        except StoreUnavailable:
            detail = "The object store cannot be reached right now."
            return _error(PartUnavailable(detail, part="object_store"))
        kind = schemas.CompletedImageOnBehalf if self._asked.user else schemas.CompletedImage
        user: dict[str, Any] = {"safety_identifier": self._asked.user} if self._asked.user else {}
        return kind(
            type=f"{self._asked.event}.completed",
            usage=schemas.usage_of(job.get("prompt_tokens")),
            pixels_sha256=image["pixels_sha256"],
            content_sha256=image["content_sha256"],
            **user,
            **self._extras | {"warnings": job["warnings"]},
            **self._head(content),
        )

    def _head(self, content: bytes) -> dict[str, Any]:
        """Return the members of `schemas.ImageEvent`."""
        return {
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            "size": self._size,
            "quality": self._asked.quality,
            "output_format": self._output_format,
        }


def _error(problem: Problem) -> schemas.StreamError:
    return schemas.StreamError(error=problem.openai_error())


def _data(told: schemas.ImageEvent | schemas.StreamError) -> str:
    return f"data: {to_json(told).decode()}\n\n"


def _cancel(parts: Runtime, asking: Caller, job_id: uuid.UUID) -> None:
    """Cancel the job of a client that has left: nobody would see its image."""
    try:
        cancel(parts, asking, job_id)
    except (JobAlreadyFinished, JobNotFound, SQLAlchemyError) as error:
        log.info("left_job_not_canceled", job_id=str(job_id), reason=type(error).__name__)
    else:
        log.info("left_job_canceled", job_id=str(job_id))
