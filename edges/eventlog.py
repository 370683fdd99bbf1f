"""Write and read the events of a job: one Redis stream per job, kept for a few minutes.

Best effort, as all of edges/progress.py is. The end of a job is not in the stream: it is published
on the channel of endings and looked up in Postgres, so that every follower sees a job end whatever
becomes of this Redis.

Memory of the hand-off for one job: 1000 events of some 70 bytes, and two previews of at most 25 KB
for each of its (at most 8) images. That is 0.5 MB while somebody watches previews, 75 KB otherwise,
5 KB as a rule. It is freed ten minutes after the last event, or one minute after the job's end.
Where the hand-off is half full, previews are not kept at all (edges/progress.py).
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from redis.client import Pipeline

QUEUED = "queued"
STARTED = "started"
STEP = "step"
PREVIEW = "preview"
STORED = "stored"
FINAL = "final"
BEGINNING = "0-0"
KEPT_PREVIEWS = 2  # of each image
_MOST_EVENTS = 1000
_KEEP_S = 600
_KEEP_ENDED_S = 60


@dataclass(frozen=True)
class JobEvent:
    """Tell one thing that happened to a job.

    id: where to go on reading, growing from event to event; None for an event that is not in the
    stream.
    """

    id: str | None
    kind: str
    data: dict[str, Any]


def key(job_id: object) -> str:
    return f"events:{job_id}"


def append(
    pipe: Pipeline, job_id: object, kind: str, data: Mapping[str, Any], jpeg: bytes | None = None
) -> None:
    """Add the writing of an event to the pipeline; its result is the event's id."""
    fields: dict[Any, Any] = {"kind": kind, "data": json.dumps(data, separators=(",", ":"))}
    if jpeg is not None:
        fields["jpeg"] = jpeg
    pipe.xadd(key(job_id), fields, maxlen=_MOST_EVENTS, approximate=True)


def keep(pipe: Pipeline, job_id: object) -> None:
    """Add to the pipeline that the stream expires `_KEEP_S` from now."""
    pipe.expire(key(job_id), _KEEP_S)


def keep_ended(pipe: Pipeline, job_id: object) -> None:
    """Add to the pipeline that the stream of an ended job, which is in Postgres, expires soon."""
    pipe.expire(key(job_id), _KEEP_ENDED_S)


def parse(raw_id: bytes, fields: Mapping[bytes, bytes]) -> JobEvent:
    """Parse an entry of a stream. Raises ValueError, KeyError if `append` did not write it."""
    data = json.loads(fields[b"data"])
    if (jpeg := fields.get(b"jpeg")) is not None:
        width_px, height_px = Image.open(io.BytesIO(jpeg), formats=["JPEG"]).size
        data |= {
            "jpeg_base64": base64.b64encode(jpeg).decode(),
            "width_px": width_px,
            "height_px": height_px,
        }
    return JobEvent(raw_id.decode(), fields[b"kind"].decode(), data)


def order(event_id: str) -> tuple[int, int]:
    """Return the sort key of a stream id. Raises ValueError for a text that is no such id."""
    time_ms, _, number = event_id.partition("-")
    return int(time_ms), int(number or 0)
