"""Keep the weights of checkpoints that left the device in the host's memory.

So they return in the time of a copy: nothing is hashed, read or built again. The newest are kept,
as many as fit. Called by the thread that loads alone.
"""

import logging
import time
from dataclasses import replace

from engine.config import CheckpointSpec
from engine.device import Device
from engine.loading import LoadedCheckpoint, adapter_bank, tensors_of

log = logging.getLogger(__name__)


class HostCopies:
    """Checkpoints whose tensors are in host memory."""

    def __init__(self, max_bytes: int) -> None:
        """Hold none yet. max_bytes: of all together; 0 keeps none."""
        self._max_bytes = max_bytes
        self._kept: dict[str, LoadedCheckpoint] = {}  # by name, the oldest in front

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put(self, loaded: LoadedCheckpoint) -> None:
        """Move its weights to the host where they fit, in place of older ones; else free them.

        Recorded graphs would read where the weights were: such a checkpoint is always freed.
        """
        if loaded.adapters is not None:
            loaded.adapters.close()
        bare = replace(loaded, adapters=None)
        if bare.spec.cuda_graphs or bare.weights_bytes > self._max_bytes:
            bare.free()
            return
        self.drop(bare.spec.name)
        while self._size_bytes + bare.weights_bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))
        # Not pinned: torch rounds pinned blocks up to a power of two, up to twice the budget.
        _move(bare, "cpu")
        self._kept[bare.spec.name] = bare

    def take(self, spec: CheckpointSpec, device: Device) -> LoadedCheckpoint | None:
        """Move a checkpoint back to the device; None if there is none that is loaded as `spec`."""
        kept = self._kept.pop(spec.name, None)
        if kept is None:
            return None
        if kept.spec != spec:
            kept.free()
            return None
        started = time.perf_counter()
        try:
            _move(kept, device.name)
            bank = adapter_bank(spec, kept.family, device)
        except BaseException:
            kept.free()
            raise
        load_s = time.perf_counter() - started
        log.info("checkpoint_copied_back", extra={"checkpoint": spec.name, "load_s": load_s})
        return replace(kept, adapters=bank, load_s=load_s)

    def drop(self, name: str) -> None:
        """Free the copy of a checkpoint, if there is one."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.free()

    @property
    def _size_bytes(self) -> int:
        return sum(kept.weights_bytes for kept in self._kept.values())


def _move(loaded: LoadedCheckpoint, device: str) -> None:
    for tensor in tensors_of(loaded.family):
        tensor.data = tensor.data.to(device)
