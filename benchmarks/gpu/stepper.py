"""A loaded checkpoint whose images are moved step by step, without an engine around them."""

from collections.abc import Sequence

import torch

from engine.conditioning import ConditioningCache
from engine.config import CheckpointSpec
from engine.device import Device
from engine.families.contract import State
from engine.inflight import BatchKey, InFlight, RenderState
from engine.loading import load_checkpoint
from engine.request import ImageRequest
from engine.runner import Runner
from engine.scheduler import Batch


class Stepper:
    """The engine's own device, family and runner."""

    def __init__(self, spec: CheckpointSpec, device: str, *, attention: str = "auto") -> None:
        self.device = Device(device, num_threads=1, attention=attention)
        self.device.prepare()
        self.loaded = load_checkpoint(spec, self.device)
        self.runner = Runner({spec.name: self.loaded}, self.device, ConditioningCache(1 << 30))

    def key(self, request: ImageRequest) -> BatchKey:
        """Return what images must agree on to share a forward with one of this request."""
        return BatchKey(
            request.checkpoint,
            request.height_px,
            request.width_px,
            self.loaded.family.text_length(request),
        )

    def started(self, request: ImageRequest) -> InFlight:
        """Make the image, ready for its first step. Raises `UnsupportedRequest`."""
        image = self._image(request)
        self.runner.start(image)
        return image

    def restored(self, request: ImageRequest, state: State, step: int) -> InFlight:
        """Make the image, ready to go on where its state was saved, with `step` steps behind it."""
        image = self._image(request)
        image.step = step
        self.runner.restore(image, state)
        return image

    def step(self, image: InFlight, *, bucket_rows: int, among: Sequence[InFlight] = ()) -> None:
        """Move the image on by one step, in a forward of all of `among`; alone if there are none.

        The others stay where they are.
        """
        images = tuple(among) or (image,)
        predictions = self.runner.predict(Batch(images, bucket_rows))
        self.runner.advance(image, predictions[images.index(image)])

    def _image(self, request: ImageRequest) -> InFlight:
        family = self.loaded.family
        family.check(request)
        return InFlight(
            request=request,
            batch_key=self.key(request),
            rows=family.rows(request),
            state=RenderState.RUNNING,
        )

    def wait(self) -> None:
        """Wait until the device has done all it was told."""
        if self.device.is_cuda:
            torch.cuda.synchronize(self.device.torch_device)
