"""A worker's side of previews: they cost device time, so an image makes them only while somebody watches its job."""

import threading
import uuid
from collections.abc import Mapping

from edges.progress import ProgressWriter
from engine.handle import Handle


class Previews:
    """One per worker: begins and ceases to show the jobs that it renders."""

    def __init__(self, progress: ProgressWriter) -> None:
        self._progress = progress
        self._jobs: dict[uuid.UUID, Mapping[int, Handle]] = {}
        self._lock = threading.Lock()
        progress.when_unwatched(self.hide)

    def begin(self, job_id: uuid.UUID, handles: Mapping[int, Handle]) -> None:
        """The job is in the engine: whoever begins to watch is heard from now on, and somebody may watch already."""
        with self._lock:
            self._jobs[job_id] = handles
        if self._progress.is_watched(job_id):
            self.show(job_id)

    def end(self, job_id: uuid.UUID) -> None:
        """The job is not in the engine any more."""
        with self._lock:
            self._jobs.pop(job_id, None)

    def show(self, job_id: uuid.UUID) -> None:
        """Make previews of the job's images; nothing for a job that is rendered elsewhere."""
        self._turn(job_id, on=True)

    def hide(self, job_id: uuid.UUID) -> None:
        """Make none any more."""
        self._turn(job_id, on=False)

    def _turn(self, job_id: uuid.UUID, *, on: bool) -> None:
        with self._lock:
            handles = self._jobs.get(job_id, {})
        for handle in handles.values():
            handle.watch(on)
