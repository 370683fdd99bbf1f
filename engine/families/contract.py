"""Define what the engine asks of a family of networks.

The engine holds one family object per checkpoint. Between two forwards an image is plain state
(`InFlight`), and a family moves it:

    start(image)                       encode its prompts, draw its noise: it can be denoised now
    predict(images, bucket_rows)       one forward for images at different steps; it changes none
                                       of them, so it can be repeated
    advance(image, its prediction)     guidance and the image's own sampler: one step further
    decode(image)                      pixels

Two kinds implement it. A native family (`latent.py` and what builds on it) keeps latents, a sampler
and conditioning per image, and writes the loop of its diffusers pipeline itself. `pipeline/` runs
any unmodified diffusers pipeline as a coroutine whose denoiser calls come here. Neither keeps state
between calls that one image could leave for another: all of it belongs to the `InFlight`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.capabilities import Capabilities
from engine.config import CheckpointSpec
from engine.inflight import InFlight
from engine.previews import Projector
from engine.request import ImageRequest
from engine.tensors import Rows
from engine.texts import ReadTexts

Recall = Callable[[str, Callable[[], Rows]], Rows]
"""recall(key, encode): what `encode()` gave for this key before, or gives now.

The key names the encoder and all it is told (text, clip skip, padded length); the checkpoint and
the image's adapters are added by who hands `recall` out.
"""


@dataclass(frozen=True)
class State:
    """All of an image in flight that cannot be had again from its request.

    Enough to go on elsewhere with the same bits.
    """

    tensors: dict[str, Tensor]  # on the CPU, each in memory of its own
    facts: dict[str, Any] = field(default_factory=dict)  # JSON-plain


class Family(Protocol):
    """One loaded checkpoint.

    All but the first group of methods is called on the engine's thread, in inference mode.
    """

    # width_px and height_px must be multiples of it, and of more where `check` says so.
    pixels_per_latent: int
    # Does `decode` launch its work in the stream that is current where it is called?
    follows_stream: bool

    @classmethod
    def folders(cls, path: Path) -> tuple[str, ...]:
        """Give the folders of this checkpoint that it reads.

        Every file read must lie in one of them, so that all can be hashed.
        """

    @classmethod
    def load(cls, spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device) -> "Family":
        """Read a checkpoint folder; no network, safetensors only, no code from the folder.

        Raises `CheckpointCorrupt`.
        """

    def networks(self) -> Mapping[str, nn.Module]:
        """Return the networks that an adapter can change, by their folders' names in diffusers.

        Those are unet, transformer, text_encoder…
        """

    def modules(self) -> Sequence[nn.Module]:
        """Return every network whose weights are on the device, each once."""

    def facts(self) -> dict[str, Any]:
        """Return the facts of this checkpoint's set-up that can change a bit.

        Among them are attention classes, tiling and upcasts.
        """

    # --- of a request, from any thread, without tensors ---

    @property
    def capabilities(self) -> Capabilities:
        """Tell what may be asked of this checkpoint; the same for as long as it is loaded."""

    def check(self, request: ImageRequest) -> None:
        """Raise `UnsupportedRequest`, naming the field, for what this checkpoint cannot render.

        Judges by `capabilities`, and by what only the request's own values tell.
        """

    def rows(self, request: ImageRequest) -> int:
        """Tell the rows of a forward this image takes."""

    def text_length(self, request: ImageRequest) -> int:
        """Return the padded length of the request's text in tokens, as a part of the batch key.

        It is chosen from the request's own prompt alone.
        """

    # --- of an image ---

    def read_texts(self, request: ImageRequest) -> ReadTexts:
        """Tell what of its texts is read, by the tokens that its encoders take.

        Empty where a family cannot tell.
        """

    def start(self, image: InFlight, recall: Recall) -> None:
        """Encode and draw noise; set `image.held` and `image.num_steps`.

        Where the family finds out only now, set rows and batch key too.
        """

    def predict(self, images: Sequence[InFlight], bucket_rows: int) -> list[Any]:
        """Give one forward for all images, padded to `bucket_rows`.

        Each image's part of the prediction, in their order.

        All have one batch key. No image is changed. An image's part depends on its own rows and
        `bucket_rows` alone.
        """

    def advance(self, image: InFlight, prediction: Any) -> None:
        """Move the image on by its part of a prediction.

        Changes `image.step`, `image.is_denoised` and all that it holds.
        """

    def clean_latents(self, image: InFlight) -> Tensor | None:
        """Give the clean latents [1, c, h, w] as the last step predicted them, for a preview.

        None unless `image.is_watched` by then.
        """

    def decode(self, image: InFlight) -> Tensor:
        """Give the pixels of a denoised image: [1, 3, h, w], nominally in -1..1 and not clamped.

        One image at a time, always: the decoder of a batch gives other bits."""

    def save(self, image: InFlight) -> State:
        """Copy what is needed to go on elsewhere from `image.step`. The image is left untouched."""

    def restore(self, image: InFlight, state: State, recall: Recall) -> None:
        """Encode again and go on from a saved state; called instead of `start`.

        `image.step` is set already.
        """

    def fork(self, image: InFlight, latents: Tensor, recall: Recall) -> None:
        """Encode, then go on from these kept latents; called instead of `start`.

        `image.step` is set already.
        """

    def latents(self, image: InFlight) -> Tensor:
        """Give the noisy latents as `fork` takes them.

        Raises `UnsupportedRequest` where a family has none to give.
        """

    def release(self, image: InFlight) -> None:
        """Let go of what the image holds, at any moment and in any state; harmless when repeated.

        `image.held` is None after it.
        """

    def projector(self) -> Projector | None:
        """Tell what shows its clean latents as colours; None where nobody knows.

        Asked once, on the engine's thread.
        """
