"""The tensors: start an image, advance many with one forward, decode one, copy one out.

It does not choose who advances (`scheduler.py`) nor what is said about it (`engine.py`). All of it
runs on the engine's thread.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.blockcache import RowKey
from engine.conditioning import ConditioningCache
from engine.device import Device, Stopwatch
from engine.errors import ImageNotFinite
from engine.families.contract import Family, Recall, State
from engine.families.latent import LatentFamily
from engine.fetches import Fetched
from engine.inflight import InFlight
from engine.loading import LoadedCheckpoint
from engine.previews import Projector
from engine.request import AdapterUse
from engine.scheduler import Batch
from engine.texts import ReadTexts


class PendingDecode:
    """An image's pixels on their way off the device."""

    def __init__(
        self, if_not_finite: str, pixels: Tensor, is_finite: Tensor, watch: Stopwatch
    ) -> None:
        self.watch = watch  # of the decode
        self._if_not_finite = if_not_finite
        self._pixels = pixels  # [h, w, 3] uint8 on the CPU, there when the watch is ready
        self._is_finite = is_finite

    @property
    def is_ready(self) -> bool:
        """Tell whether `pixels` would return without waiting."""
        return self.watch.is_ready

    def pixels(self) -> NDArray[np.uint8]:
        """Give the finished pixels, [h, w, 3], in memory of their own.

        Waits for the device; raises `ImageNotFinite`.
        """
        self.watch.wait()
        if not bool(self._is_finite):
            raise ImageNotFinite(self._if_not_finite)
        return self._pixels.numpy().copy()  # pinned memory is not the caller's to hold


class Runner:
    """The loaded checkpoints on one device."""

    def __init__(
        self, checkpoints: Mapping[str, LoadedCheckpoint], device: Device, cache: ConditioningCache
    ) -> None:
        self._checkpoints = checkpoints
        self._device = device
        self._cache = cache
        self._projectors: dict[str, Projector | None] = {}  # made when somebody first watches

    @torch.inference_mode()
    def start(self, image: InFlight) -> None:
        """Give the image its conditioning, sampler and initial latents.

        After this it can be denoised.
        """
        with self._encoding(image) as recall:
            self._family_of(image).start(image, recall)

    @torch.inference_mode()
    def restore(self, image: InFlight, state: State) -> None:
        """Let the image go on where `state` was saved, instead of starting it."""
        with self._encoding(image) as recall:
            self._family_of(image).restore(image, state, recall)

    @torch.inference_mode()
    def fork(self, image: InFlight, latents: Tensor) -> None:
        """Let the image go on from another's latents at `image.step`, instead of starting it."""
        with self._encoding(image) as recall:
            self._family_of(image).fork(image, latents, recall)

    def read_texts(self, image: InFlight) -> ReadTexts:
        """Tell what of the image's texts is read.

        On the engine's thread only: tokenizers are shared with `encode`.
        """
        return self._family_of(image).read_texts(image.request)

    @torch.inference_mode()
    def predict(self, batch: Batch) -> list[Any]:
        """Run one forward for all images of the batch, padded to its bucket.

        No image is changed, so it can be repeated.

        Returns each image's own part of the prediction, in the batch's order.
        """
        with self._adapted(batch), self._block_cached(batch):
            return self._family_of(batch.images[0]).predict(batch.images, batch.bucket_rows)

    @torch.inference_mode()
    def advance(self, image: InFlight, prediction: Any) -> None:
        """Move one image on by its part of the prediction."""
        self._family_of(image).advance(image, prediction)

    @torch.inference_mode()
    def rehearse(self, image: InFlight, prediction: Any) -> None:
        """Make a step of a native family's image with the prediction that another one got."""
        family = self._family_of(image)
        if isinstance(family, LatentFamily):
            family.inputs(image)  # some samplers begin a step there
        family.advance(image, prediction)

    @torch.inference_mode()
    def decode(self, image: InFlight) -> PendingDecode:
        """Launch the decode of a denoised image.

        What it gives is read later, without stalling a GPU.

        One image at a time: a batched decode gives other bits, and its memory is what a large image
        needs most of.
        """
        loaded = self._checkpoints[image.request.checkpoint]
        with self._device.aside() if loaded.family.follows_stream else nullcontext():
            watch = self._device.stopwatch()
            decoded = loaded.family.decode(image)
            is_finite = self._device.fetch(torch.isfinite(decoded).all())
            pixels = self._device.fetch(as_bytes(decoded))
            watch.stop()
        complaint = f"image {image.id} decoded to NaN or infinity after {image.step} steps"
        return PendingDecode(complaint, pixels, is_finite, watch)

    @torch.inference_mode()
    def save(self, image: InFlight) -> State:
        """Copy what is needed to go on elsewhere; the image is left untouched."""
        return self._family_of(image).save(image)

    @torch.inference_mode()
    def latents(self, image: InFlight) -> Fetched:
        """Launch a copy of the image's noisy latents, as `fork` takes them."""
        return self._fetched(self._family_of(image).latents(image).clone())

    @torch.inference_mode()
    def preview(self, image: InFlight) -> Fetched | None:
        """Launch what shows what the last step took the finished image to be, [h/8, w/8, 3] uint8.

        None when nobody watched that step.
        """
        family = self._family_of(image)
        name = image.request.checkpoint
        clean = family.clean_latents(image)
        if clean is not None and name not in self._projectors:
            self._projectors[name] = family.projector()
        projector = self._projectors.get(name)
        if clean is None or projector is None:
            return None
        return self._fetched(projector.project(clean))

    def _fetched(self, tensor: Tensor) -> Fetched:
        watch = self._device.stopwatch()
        fetched = self._device.fetch(tensor)
        watch.stop()
        return Fetched(fetched, watch)

    def keep_only(self, held: Collection[str]) -> None:
        """Let go of what is remembered of checkpoints that are not held any more."""
        for name in self._projectors.keys() - set(held):
            del self._projectors[name]

    def release(self, image: InFlight) -> None:
        """Let go of all that the image holds on the device.

        Harmless at any moment, also when repeated.
        """
        loaded = self._checkpoints.get(image.request.checkpoint)
        if loaded is None:
            return  # it came after its checkpoint had gone
        loaded.family.release(image)
        if loaded.block_cache is not None:
            loaded.block_cache.forget(image.id)

    @contextmanager
    def _encoding(self, image: InFlight) -> Iterator[Recall]:
        """Apply the image's adapters to the text encoders within this context.

        Gives a `Recall` that remembers encodings under those adapters' names.
        """
        loaded = self._checkpoints[image.request.checkpoint]
        with loaded.adapted([image.request.adapters]):
            yield partial(self._cache.recall, loaded.conditioning_key(image.request))

    def _adapted(self, batch: Batch) -> AbstractContextManager[None]:
        """Apply each image's adapters to its rows of a forward within this context.

        Padding has none.
        """
        uses: list[tuple[AdapterUse, ...]] = [
            image.request.adapters for image in batch for _ in range(image.rows)
        ]
        uses += [()] * (batch.bucket_rows - batch.used_rows)
        return self._checkpoints[batch.key.checkpoint].adapted(uses)

    def _block_cached(self, batch: Batch) -> AbstractContextManager[None]:
        """Let rows skip blocks that may, unless anybody in the batch must have exact bits."""
        cache = self._checkpoints[batch.key.checkpoint].block_cache
        if cache is None or batch.is_pinned or not any(image.skips_blocks for image in batch):
            return nullcontext()
        keys: list[RowKey | None] = []
        for image in batch:
            for row in range(image.rows):
                key = RowKey(
                    image_id=image.id,
                    row=row,
                    step=image.step,
                    num_steps=image.num_steps,
                )
                keys.append(key if image.skips_blocks else None)
        keys += [None] * (batch.bucket_rows - batch.used_rows)
        bank = self._checkpoints[batch.key.checkpoint].adapters
        return cache.rows(keys, narrow=None if bank is None else bank.narrow)

    def _family_of(self, image: InFlight) -> Family:
        return self._checkpoints[image.request.checkpoint].family


def as_bytes(decoded: Tensor) -> Tensor:
    """Give decoded pixels [1, 3, h, w] in -1..1 as [h, w, 3] uint8.

    On their device: a quarter of the bytes are fetched.
    """
    unit = (decoded[0] * 0.5 + 0.5).clamp(0, 1).float()
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
