"""The progress of one request: where it stands, its tensors, and what it has taken so far.

Only the engine's thread writes here; others may read the plain numbers. Importable without torch,
so that the scheduler's tests can build one by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from engine.request import ImageRequest

if TYPE_CHECKING:
    from engine.tensors import Tensors
    from engine.texts import TokenCount

PACE_MEMORY = 0.3  # weight of the newest step in an image's seconds per step


class RenderState(StrEnum):
    """Where an image stands."""

    QUEUED = "queued"  # not encoded yet
    RUNNING = "running"  # has latents; advances when the scheduler picks it
    PARKED = "parked"  # somebody better took its seat; it keeps its state in place and comes back
    DENOISED = "denoised"  # all denoise steps behind it; waits for decode
    FINISHED = "finished"
    FAILED = "failed"
    CANCELED = "canceled"


@dataclass(frozen=True)
class BatchKey:
    """What images must agree on to share a forward.

    Steps, guidance, sampler, seed and adapters are not in it: they are per row.
    """

    checkpoint: str
    height_px: int
    width_px: int
    text_length: int  # tokens, from the request's own prompt, never from its neighbours'
    call: str = ""  # of a pipeline run as a coroutine: which network it calls, and how

    def __str__(self) -> str:
        """Tell how curves on disk and in metrics name it."""
        call = self.call and f" {self.call}"
        size = f"{self.width_px}x{self.height_px}"
        return f"{self.checkpoint} {size} text={self.text_length}{call}"


@dataclass
class Account:
    """What an image has taken so far; the words of `RenderRecord`."""

    encode_s: float = 0.0
    denoise_s: float = 0.0
    padding_s: float = 0.0  # of `denoise_s`
    decode_s: float = 0.0
    forwards: int = 0
    shared_forwards: int = 0
    rows_total: int = 0
    max_rows: int = 0
    max_images: int = 0

    @property
    def device_seconds(self) -> float:
        """Return the device seconds that the image took until now."""
        return self.encode_s + self.denoise_s + self.decode_s


@dataclass(eq=False)
class InFlight:
    """One request on its way through the engine."""

    request: ImageRequest
    batch_key: BatchKey  # of its next forward
    rows: int  # of its next forward: 2 with classifier-free guidance, else 1
    rank: int = 0  # the request's, until a caller sets another
    state: RenderState = RenderState.QUEUED
    step: int = 0  # denoise steps behind it
    num_steps: int = 0  # 0: as requested
    is_denoised: bool = False  # are all its denoise steps behind it?
    is_watched: bool = False  # does anybody look at previews?
    origin: str = ""  # sha256 of the latents it was forked from
    skips_blocks: bool = False  # may its steps reuse what blocks computed where little changed?
    prompt: TokenCount | None = None  # of its prompt, once it is encoded; None: not known

    submitted_at: float = 0.0  # these four on the monotonic clock
    first_step_at: float | None = None
    last_step_at: float | None = None
    # Between its own steps, waiting included: what a caller notices.
    seconds_per_step: float | None = None
    eta_s: float | None = None
    account: Account = field(default_factory=Account)

    # The state that its family keeps, `Tensors` for a native one; None before encode and after the
    # end.
    held: Any = None

    def __post_init__(self) -> None:
        self.num_steps = self.num_steps or self.request.num_steps
        self.rank = self.rank or self.request.rank

    @property
    def id(self) -> str:
        """Return the request's id."""
        return self.request.id

    def count_step(self) -> None:
        """Note one more denoise step behind it."""
        self.step += 1
        self.is_denoised = self.step >= self.num_steps

    def note_step(self, now: float, *, decode_s: float) -> None:
        """Learn the image's pace from a step that ended `now`, and say when it will be there.

        now: on the monotonic clock.  decode_s: seconds that its decode will take.
        """
        since = self.last_step_at or self.first_step_at or now
        newest_s = now - since
        known_s = self.seconds_per_step
        if known_s is None:
            self.seconds_per_step = newest_s
        else:
            self.seconds_per_step = known_s + PACE_MEMORY * (newest_s - known_s)
        self.last_step_at = now
        self.eta_s = (self.num_steps - self.step) * self.seconds_per_step + decode_s

    @property
    def tensors(self) -> Tensors:
        """Return what an image of a native family holds on the device, from encode to the end."""
        assert self.held is not None, f"image {self.id} is {self.state} and holds no tensors"
        held: Tensors = self.held
        return held
