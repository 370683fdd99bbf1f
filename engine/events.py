"""The events that an image sends its caller.

They are Queued, Started (or Resumed, from a snapshot), Stepped…, then Finished or Failed.

Previewed comes some time after its Stepped while somebody watches; Parked and Resumed come in pairs
between two steps, when a better rank takes the image's seat and gives it back. Events are values;
`on_event` is called with them from the engine's own threads, one event at a time, and must be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.texts import UnreadText

if TYPE_CHECKING:
    from engine.records import FinishedImage


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The engine's thread has taken the request in."""

    request_id: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is encoded and the noise drawn; the next denoise step may include it."""

    request_id: str
    unread: tuple[UnreadText, ...] = ()  # what of its texts has no effect


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """One more denoise step is behind it: `step` of `num_steps`."""

    request_id: str
    step: int
    num_steps: int
    eta_s: float | None


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """What the image will roughly look like, as the last step predicted it: a small JPEG.

    Only the newest matters.
    """

    request_id: str
    step: int
    jpeg: bytes


@dataclass(frozen=True, kw_only=True)
class Parked:
    """Somebody of a better rank took its seat.

    It keeps its latents and goes on later from this step.
    """

    request_id: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """It goes on from this step: its seat is free again, or a snapshot of it has been restored."""

    request_id: str
    step: int
    unread: tuple[UnreadText, ...] = ()  # as `Started` tells it; empty after `Parked`


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Rendered. The last event."""

    request_id: str
    image: FinishedImage


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It will not be rendered; `error` says why (`ImageCanceled` when somebody asked for that).

    The last event.
    """

    request_id: str
    error: EngineError


EngineEvent = Queued | Started | Stepped | Previewed | Parked | Resumed | Finished | Failed
OnEvent = Callable[[EngineEvent], None]
