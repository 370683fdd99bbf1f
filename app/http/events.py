"""Serve GET /v1/jobs/{id}/events: what happens to a job, as server-sent events."""

import re
import uuid
from collections.abc import Iterator
from contextlib import suppress

from flask import Blueprint, Response, copy_current_request_context, json, request

from app.http.auth import require_key
from app.http.connection import give_up_when_unread
from app.http.context import caller, runtime
from app.http.views import image_url, job_view
from app.live.streams import Tell
from app.problems import InvalidQuery, Unauthenticated
from app.schemas.base import to_plain
from edges.eventlog import STORED, JobEvent
from models.tables import Job

bp = Blueprint("events", __name__, url_prefix="/v1/jobs")
bp.before_request(require_key)

_RETRY_MS = 2000  # before a browser reconnects
EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?", re.ASCII)


@bp.get("/<uuid:job_id>/events")
def follow_job(job_id: uuid.UUID) -> Response:
    """Stream the job's events until `final`, from the first or from `Last-Event-ID` on.

    With `?previews=true` it includes preview pictures.
    """
    parts = runtime()
    stream = parts.events.follow(
        caller(),
        job_id,
        tell=teller(),
        after=_read_last_id(),
        previews=_read_previews(),
        heartbeat_s=parts.settings.event_heartbeat_s,
    )
    give_up_when_unread(request)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(_lines(stream), content_type="text/event-stream", headers=headers)


def teller() -> Tell:
    """Return a function that shows events to clients, with the links of this request.

    It works after the request has ended, too.
    """

    def tell(event: JobEvent, job_id: uuid.UUID, ended: Job | None) -> JobEvent:
        if ended is not None:
            return JobEvent(event.id, event.kind, to_plain(job_view(ended)))
        if event.kind == STORED:
            url = image_url(job_id, event.data["index"])
            return JobEvent(event.id, event.kind, event.data | {"url": url})
        return event

    return copy_current_request_context(tell)


def _lines(stream: Iterator[JobEvent | None]) -> Iterator[str]:
    yield f"retry: {_RETRY_MS}\n\n"
    with suppress(Unauthenticated):
        # The key was revoked: the stream ends, and the client gets a 401 when it reconnects.
        for event in stream:
            if event is None:
                yield ": still here\n\n"
            else:
                id_line = f"id: {event.id}\n" if event.id is not None else ""
                yield f"{id_line}event: {event.kind}\ndata: {json.dumps(event.data)}\n\n"


def _read_last_id() -> str | None:
    text = request.headers.get("Last-Event-ID", "").strip()
    if text and not EVENT_ID.fullmatch(text):
        raise InvalidQuery(
            "Last-Event-ID must be the id of an event in this stream.", header="Last-Event-ID"
        )
    return text or None


def _read_previews() -> bool:
    text = request.args.get("previews", "false").lower()
    if text not in ("true", "false"):
        raise InvalidQuery(
            "previews must be true or false.", parameter="previews", accepted=["true", "false"]
        )
    return text == "true"
