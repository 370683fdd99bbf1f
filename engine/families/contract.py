"""What the engine asks of a family of networks.

The engine holds one family object per checkpoint. Between two forwards an image is plain state (`InFlight`); a family turns that
state into rows, predicts all rows of a batch in one forward, and moves each image on from its own rows of the prediction:

    inputs(image) -> rows          the runner concatenates and pads the rows of all images of a batch
    denoise(rows) -> prediction    one forward for strangers at different steps
    advance(image, prediction)     guidance and the image's own sampler; the image is one step further

A family must not keep state between calls that one image could leave for another: all of it belongs to the `InFlight`.
Everything per image in `Rows` is a row, so a family with more inputs (pooled embeddings, size ids, a guidance scale) adds names, and
one whose denoiser is driven from inside a pipeline call can record that call's tensors as rows and resume it in `advance`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.inflight import InFlight
from engine.request import ImageRequest

Rows = dict[str, Tensor]
"""Named tensors, each [b, ...] with the same b."""

Recall = Callable[[str, Callable[[], Rows]], Rows]
"""recall(key, encode): what `encode()` gave for this key before, or gives now."""


class Sampler(Protocol):
    """What the engine uses of a diffusers scheduler object. In this house a *scheduler* decides which images advance."""

    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> tuple[Tensor, ...]: ...


class Family(Protocol):
    """One loaded checkpoint."""

    pixels_per_latent: int  # width_px and height_px must be multiples of it

    @classmethod
    def folders(cls) -> tuple[str, ...]:
        """The folders of a checkpoint that it reads. Every file read must lie in one of them, so that all can be hashed."""

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype, device: torch.device) -> "Family":
        """Read a checkpoint folder; no network, safetensors only. Raises `CheckpointCorrupt`."""

    def check(self, request: ImageRequest) -> None:
        """Raise `UnsupportedRequest` for what this checkpoint cannot render. Any thread; no tensors."""

    def rows(self, request: ImageRequest) -> int:
        """Rows of a forward this image takes."""

    def text_length(self, request: ImageRequest) -> int:
        """Padded length of its text in tokens: part of the batch key."""

    def encode(self, request: ImageRequest, recall: Recall) -> Rows:
        """Turn the prompts into conditioning rows, each tensor [rows(request), ...]."""

    def sampler(self, request: ImageRequest) -> Sampler:
        """A fresh sampler for this image alone, its timesteps set (on the CPU: reading them never waits for a device)."""

    def initial_latents(self, request: ImageRequest, sampler: Sampler, generator: torch.Generator) -> Tensor:
        """Draw the initial noise, [1, c, h/8, w/8] on the device, scaled as the sampler wants it."""

    def inputs(self, image: InFlight) -> Rows:
        """The rows of the image's next forward; the image is left untouched, so a failed forward can be repeated."""

    def denoise(self, rows: Rows) -> Tensor:
        """Predict all rows in one forward: [b, c, h/8, w/8]. Row i of the result depends on row i alone."""

    def advance(self, image: InFlight, prediction: Tensor) -> None:
        """Apply guidance and one sampler step to the image's latents. prediction: [rows, c, h/8, w/8]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [1, c, h/8, w/8] to pixels [1, 3, h, w], nominally in -1..1 and not clamped. One image at a time, always:
        the decoder of a batch gives other bits."""

    def facts(self) -> dict[str, Any]:
        """What of this checkpoint's set-up can change a bit: attention classes, tiling, upcasts."""
