"""Work on what is fetched from the device, in a thread that waits for it there.

The device thread launches a copy and goes on; packing a preview and keeping latents need no device.
It does not know what is fetched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from torch import Tensor

from engine.device import Stopwatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A tensor on its way to the host: there once the device has passed the stopped watch."""

    tensor: Tensor
    watch: Stopwatch


@dataclass(frozen=True)
class _Work:
    fetched: Fetched
    do: Callable[[Tensor], None]
    is_done: threading.Event


class Fetches:
    """Copies on their way from the device, and what is done with each. Used by the device thread.

    The thread is begun with the first. It is a daemon, so that no device that hangs keeps a
    process from its end.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._newest: dict[str, _Work] = {}  # by image

    def add(self, image_id: str, fetched: Fetched, do: Callable[[Tensor], None]) -> None:
        """Have `do(tensor)` called once the tensor is there; everybody's in their order."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name="fetches", daemon=True)
            self._thread.start()
        work = self._newest[image_id] = _Work(fetched, do, threading.Event())
        self._queue.put(work)

    def finish(self, image_id: str) -> None:
        """Wait until the work of an image is done, then forget the image."""
        newest = self._newest.pop(image_id, None)
        if newest is not None:
            newest.is_done.wait()

    def forget(self, image_id: str) -> None:
        """Forget an image; its work is done all the same. Harmless when it is not here."""
        self._newest.pop(image_id, None)

    def close(self) -> None:
        """Let the thread end after the work that it has."""
        self._queue.put(None)

    def _live(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work.fetched.watch.wait()
                work.do(work.fetched.tensor)
            except Exception:  # a courtesy: the images go on without
                log.exception("fetch_failed")
            work.is_done.set()
            del work  # else its tensor is held until the next
