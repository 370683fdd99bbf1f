"""The tensors: encode a prompt, advance many images with one forward, decode one image.

It does not choose who advances (`scheduler.py`) nor what is said about it (`engine.py`). All of it runs on the engine's thread.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.conditioning import ConditioningCache
from engine.device import Device
from engine.errors import ImageNotFinite
from engine.families.contract import Family, Rows
from engine.inflight import InFlight, Tensors
from engine.loading import LoadedCheckpoint
from engine.scheduler import Batch


class Runner:
    """The loaded checkpoints on one device."""

    def __init__(self, checkpoints: Mapping[str, LoadedCheckpoint], device: Device, cache: ConditioningCache) -> None:
        self._checkpoints = checkpoints
        self._device = device
        self._cache = cache

    @torch.inference_mode()
    def encode(self, image: InFlight) -> None:
        """Give the image its conditioning, sampler and initial latents: after this it can be denoised."""
        checkpoint = self._checkpoints[image.request.checkpoint]
        family = checkpoint.family
        conditioning = family.encode(image.request, partial(self._cache.recall, checkpoint.weights_digest))
        generator = torch.Generator("cpu").manual_seed(image.request.seed)
        sampler = family.sampler(image.request)
        image.num_steps = len(sampler.timesteps)
        image.tensors = Tensors(
            sampler=sampler,
            timesteps=sampler.timesteps,
            conditioning=conditioning,
            latents=family.initial_latents(image.request, sampler, generator),
            generator=generator,
        )

    @torch.inference_mode()
    def predict(self, batch: Batch) -> list[Tensor]:
        """Run one forward for all images of the batch, padded to its bucket; no image is changed, so it can be repeated.

        Returns each image's own rows of the prediction, [image.rows, c, h/8, w/8], in the batch's order.
        """
        family = self._family_of(batch.images[0])
        rows = stack_rows([family.inputs(image) for image in batch], batch.bucket_rows, self._device.torch_device)
        prediction = family.denoise(rows)
        return list(torch.split(prediction[: batch.used_rows], [image.rows for image in batch]))

    @torch.inference_mode()
    def advance(self, image: InFlight, prediction: Tensor) -> None:
        """Move one image on by one denoise step from its rows of the prediction."""
        # No isfinite() here: it would stall the device at every step; decode() checks.
        self._family_of(image).advance(image, prediction)

    @torch.inference_mode()
    def decode(self, image: InFlight) -> NDArray[np.uint8]:
        """Give the finished pixels, [h, w, 3], in memory of their own. Raises `ImageNotFinite`.

        One image at a time: a batched decode gives other bits, and its memory is what a large image needs most of.
        """
        decoded = self._family_of(image).decode(image.tensors.latents)
        is_finite = torch.isfinite(decoded).all()
        pixels = (decoded * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()[0]
        if not bool(is_finite):
            raise ImageNotFinite(f"image {image.id} decoded to NaN or infinity after {image.step} steps")
        finished: NDArray[np.uint8] = np.ascontiguousarray((pixels * 255).round().astype(np.uint8))
        return finished

    def _family_of(self, image: InFlight) -> Family:
        return self._checkpoints[image.request.checkpoint].family


def stack_rows(parts: Sequence[Rows], bucket_rows: int, device: torch.device) -> Rows:
    """Concatenate the rows of several images and pad each tensor with zeros to `bucket_rows`, on the device.

    Zeros are cheap and stay finite in every network here: normalisations carry an epsilon, and attention over equal keys is uniform.
    Rows never mix, so what the padding computes is nobody's.
    """
    stacked: Rows = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        padding = bucket_rows - sum(len(tensor) for tensor in tensors)
        if padding > 0:
            tensors.append(first.new_zeros((padding, *first.shape[1:])))
        stacked[name] = torch.cat(tensors).to(device, non_blocking=True)
    return stacked
