"""A worker's side of snapshots: go on from the newest one, keep one every so many steps, take one when the worker has to go.

All of it is a courtesy to the steps already done: whatever fails here costs time, never the image.
"""

import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from edges import telemetry
from edges.progress import News
from edges.snapshots import Kept, Snapshots, SnapshotsUnavailable, place
from engine.engine import Engine
from engine.errors import EngineError, SnapshotRefused
from engine.events import OnEvent
from engine.handle import Handle
from engine.request import ImageRequest
from engine.snapshots import peek
from models.leases import Lease, Left
from policy import gates

log = structlog.get_logger(__name__)

WITHDRAW_WITHIN_S = 20.0  # a snapshot is taken at the next step boundary; no step takes that long


@dataclass(frozen=True)
class Earlier:
    """What earlier attempts left of a job's images, by index: the newest snapshot of each, and the step that it had come to.

    That is the later of two: what was heard of its progress last, which is gone with the hand-off, and what its row says, which is a
    heartbeat old.
    """

    kept: Mapping[int, Kept]
    reached: Mapping[int, int]


class Checkpoints:
    """One per worker. The engine's thread leaves snapshots here, a thread of its own keeps the newest of each image.

    fill: how full the hand-off is; where it has little room left, none is kept: what is rendered needs it more.
    """

    def __init__(
        self, engine: Engine, snapshots: Snapshots, news: News, *, fill: Callable[[], float]
    ) -> None:
        self._engine, self._snapshots, self._news, self._fill = engine, snapshots, news, fill
        self._newest: dict[
            tuple[uuid.UUID, int], tuple[int, bytes]
        ] = {}  # attempt and blob by job and image
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def of_earlier_attempts(self, lease: Lease) -> Earlier:
        """What there is to go on from."""
        if lease.attempt == 1:
            return Earlier({}, {})
        heard = {step.index: step.step for step in self._news.steps(lease.job_id)}
        reached = {
            index: max(heard.get(index, 0), lease.reached.get(index, 0)) for index in lease.pending
        }
        try:
            return Earlier(self._snapshots.of(lease.job_id), reached)
        except SnapshotsUnavailable as error:
            log.warning("snapshots_unavailable", reason=str(error))
            return Earlier({}, reached)

    def begin(
        self, kept: Kept | None, request: ImageRequest, on_event: OnEvent, *, within_s: float | None
    ) -> tuple[Handle, int]:
        """Give an image to the engine, from its snapshot where there is one that fits; the step at which it begins comes with it.

        Raises as `Engine.submit`.
        """
        if kept is not None:
            try:
                return self._engine.restore(
                    kept.blob, on_event, request=request, within_s=within_s
                ), kept.step
            except SnapshotRefused as error:  # made elsewhere, or damaged: start again
                telemetry.SNAPSHOTS_REFUSED.inc()
                log.warning("snapshot_refused", request_id=request.id, reason=str(error))
        return self._engine.submit(request, on_event, within_s=within_s), 0

    def keep_soon(self, lease: Lease, index: int, request_id: str) -> None:
        """Keep a snapshot as the image is before its next step. Returns at once; for the engine's thread."""

        def keep(snapshot: Future[bytes]) -> None:
            if snapshot.exception() is None:
                with self._changed:
                    self._newest[lease.job_id, index] = lease.attempt, snapshot.result()
                    self._changed.notify()

        self._engine.snapshot(request_id).add_done_callback(keep)

    def withdraw(self, lease: Lease, handles: Mapping[int, Handle]) -> list[Left]:
        """Take the images out of the engine and keep what they are; those that are finished by then, or cannot be kept, are left out."""
        taken = {
            index: self._engine.withdraw(handle.request.id) for index, handle in handles.items()
        }
        left = []
        for index, snapshot in taken.items():
            try:
                blob = snapshot.result(WITHDRAW_WITHIN_S)
                step = peek(blob).step
                self._snapshots.put(lease.job_id, index, lease.attempt, step, blob)
                device_s = handles[index].progress().device_seconds
                left.append(Left(index, step, place(lease.job_id, index), len(blob), device_s))
            except (EngineError, TimeoutError) as error:
                log.warning("not_kept", index=index, reason=f"{type(error).__name__}: {error}")
            except SnapshotsUnavailable as error:
                log.warning("not_kept", index=index, reason=str(error))
                break  # nor will the others be: a notice has no time for that
        return left

    def close(self) -> None:
        """Keep what was taken until now, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._closing)
                if not self._newest:
                    return
                (job_id, index), (attempt, blob) = self._newest.popitem()
            if not gates.may_keep_snapshot(self._fill()):
                continue
            try:
                self._snapshots.put(job_id, index, attempt, peek(blob).step, blob)
                telemetry.CHECKPOINTS.inc()
            except SnapshotsUnavailable as error:
                log.info("checkpoint_not_kept", reason=str(error))
