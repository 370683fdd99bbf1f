"""Define the fields of a job's request, and which of them hold pictures."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

Picture = str | Path | bytes
PICTURE_FIELDS = ("init_image", "mask", "control_image")
_REFERENCES = ("data:", "http://", "https://")


class JobFields(TypedDict, total=False):
    """The fields of a job's request, except for its prompt.

    The gateway fills in a field that is left out or None.

    A picture may be bytes, a path, a data URL, or the id of an uploaded file. Bytes and paths are
    uploaded first.
    """

    negative_prompt: str | None
    model: str | None
    tier: str | None
    size: str | None
    steps: int | None
    guidance: float | None
    sampler: str | None
    seed: int | None
    n: int | None
    output_format: str | None
    init_image: Picture | None
    mask: Picture | None
    control_image: Picture | None
    strength: float | None
    clip_skip: int | None
    adapters: Sequence[Mapping[str, Any]] | None
    metadata: Mapping[str, str] | None
    start_deadline_s: float | None


def to_upload(value: Any) -> Path | bytes | None:
    """Return what must be uploaded before the field can name it.

    None for a value that the gateway takes as it is.
    """
    if isinstance(value, bytes | Path):
        return value
    if not isinstance(value, str) or value.startswith(_REFERENCES) or _is_id(value):
        return None
    return Path(value)


def _is_id(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True
