"""What an image tells its caller on the way, in this order: Queued, Started, Stepped…, then Finished or Failed.

Events are values; `on_event` is called with them from the engine's own thread and must be fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError

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


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """One more denoise step is behind it: `step` of `num_steps`."""

    request_id: str
    step: int
    num_steps: int
    eta_s: float | None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Rendered. The last event."""

    request_id: str
    image: FinishedImage


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It will not be rendered; `error` says why (`ImageCanceled` when somebody asked for that). The last event."""

    request_id: str
    error: EngineError


Event = Queued | Started | Stepped | Finished | Failed
