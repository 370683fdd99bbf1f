"""The record of what happens to a job while somebody may want to see it: one Redis stream per job, how it is written and read back.

Best effort, as all of edges/progress.py is. The end of a job is not in it: that is heard on the channel of endings and looked up
in Postgres, so that whoever follows a job sees it end whatever becomes of this Redis.

What one job may take of the hand-off's memory: 1000 events of some 70 bytes, and two previews of at most 25 KB for each of its (at
most 8) images. So 0.5 MB while somebody watches previews, 75 KB otherwise, 5 KB as a rule; until ten minutes after the last event,
or one after the job's end. Where the hand-off is half full, previews are not kept at all (edges/progress.py).
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from redis.client import Pipeline

QUEUED, STARTED, STEP, PREVIEW, STORED, FINAL = (
    "queued",
    "started",
    "step",
    "preview",
    "stored",
    "final",
)
BEGINNING = "0-0"
KEPT_PREVIEWS = 2  # of each image
_MOST_EVENTS = 1000
_KEEP_S, _KEEP_ENDED_S = 600, 60


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. id: where to go on reading, growing from event to event; None where nothing can."""

    id: str | None
    kind: str
    data: dict[str, Any]


def key(job_id: object) -> str:
    return f"events:{job_id}"


def append(
    pipe: Pipeline, job_id: object, kind: str, data: Mapping[str, Any], jpeg: bytes | None = None
) -> None:
    """Queue the writing of an event; the pipe's answer to it is the event's id."""
    fields: dict[Any, Any] = {"kind": kind, "data": json.dumps(data, separators=(",", ":"))}
    if jpeg is not None:
        fields["jpeg"] = jpeg
    pipe.xadd(key(job_id), fields, maxlen=_MOST_EVENTS, approximate=True)


def keep(pipe: Pipeline, job_id: object) -> None:
    """Queue what makes the record stay for a while from now on."""
    pipe.expire(key(job_id), _KEEP_S)


def keep_ended(pipe: Pipeline, job_id: object) -> None:
    """The same for a job that has ended: who comes now finds all of it in Postgres."""
    pipe.expire(key(job_id), _KEEP_ENDED_S)


def parsed(raw_id: bytes, fields: Mapping[bytes, bytes]) -> Event:
    """An entry of a stream. Raises ValueError, KeyError for what `append` did not write."""
    data = json.loads(fields[b"data"])
    if (jpeg := fields.get(b"jpeg")) is not None:
        width_px, height_px = Image.open(io.BytesIO(jpeg), formats=["JPEG"]).size
        data |= {
            "jpeg_base64": base64.b64encode(jpeg).decode(),
            "width_px": width_px,
            "height_px": height_px,
        }
    return Event(raw_id.decode(), fields[b"kind"].decode(), data)


def order(event_id: str) -> tuple[int, int]:
    """What ids are compared by. Raises ValueError for what is no id of a stream."""
    time_ms, _, number = event_id.partition("-")
    return int(time_ms), int(number or 0)
