"""Make previews of an image only while somebody watches its job: they cost device time."""

import threading
import uuid
from collections.abc import Mapping

from edges.progress import ProgressWriter
from engine.handle import Handle


class Previews:
    """Switch previews on and off for the jobs that a worker renders."""

    def __init__(self, progress: ProgressWriter) -> None:
        self._progress = progress
        self._jobs: dict[uuid.UUID, Mapping[int, Handle]] = {}
        self._lock = threading.Lock()
        progress.when_unwatched(self.hide)

    def begin(self, job_id: uuid.UUID, handles: Mapping[int, Handle]) -> None:
        """Note that the job is in the engine; show it now if somebody watches already."""
        with self._lock:
            self._jobs[job_id] = handles
        if self._progress.is_watched(job_id):
            self.show(job_id)

    def end(self, job_id: uuid.UUID) -> None:
        """Note that the job is no longer in the engine."""
        with self._lock:
            self._jobs.pop(job_id, None)

    def show(self, job_id: uuid.UUID) -> None:
        """Make previews of the job's images; do nothing for a job that is rendered elsewhere."""
        self._turn(job_id, on=True)

    def hide(self, job_id: uuid.UUID) -> None:
        """Make no more previews of the job's images."""
        self._turn(job_id, on=False)

    def _turn(self, job_id: uuid.UUID, *, on: bool) -> None:
        with self._lock:
            handles = self._jobs.get(job_id, {})
        for handle in handles.values():
            handle.watch(on)
