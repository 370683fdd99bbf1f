"""Resume from snapshots, keep one every so many steps, and take one when the worker has to leave.

All of it only saves steps already done: a failure here costs time, never the image.
"""

import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from edges import telemetry
from edges.progress import JobSignals
from edges.snapshots import Snapshots, SnapshotsUnavailable, StoredSnapshot, place
from engine.engine import Engine
from engine.errors import EngineError, SnapshotRefused
from engine.events import OnEvent
from engine.handle import Handle
from engine.request import ImageRequest
from engine.snapshots import peek
from models.leases import Lease, LeftSnapshot
from policy import gates

log = structlog.get_logger(__name__)

WITHDRAW_WITHIN_S = 20.0  # a snapshot is taken at the next step boundary; no step takes that long


@dataclass(frozen=True)
class EarlierAttempts:
    """Hold what earlier attempts left of a job's images, by index.

    kept: the newest snapshot of each.  reached: the step it had come to. That is the larger of two
    numbers: the last progress in the hand-off, which may be lost, and its row's, which is a
    heartbeat old.
    """

    kept: Mapping[int, StoredSnapshot]
    reached: Mapping[int, int]


class Checkpoints:
    """Keep a worker's snapshots: the engine's thread adds them, a thread here stores the newest.

    fill: how full the hand-off is. Where it has little room left, no snapshot is stored: rendered
    images need the room more.
    """

    def __init__(
        self,
        engine: Engine,
        snapshots: Snapshots,
        signals: JobSignals,
        *,
        fill: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._signals = signals
        self._fill = fill
        # Attempt and blob, by job and image.
        self._newest: dict[tuple[uuid.UUID, int], tuple[int, bytes]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def of_earlier_attempts(self, lease: Lease) -> EarlierAttempts:
        """Return what this attempt can resume from; no snapshots if they cannot be read."""
        if lease.attempt == 1:
            return EarlierAttempts({}, {})
        heard = {step.index: step.step for step in self._signals.steps(lease.job_id)}
        reached = {
            index: max(heard.get(index, 0), lease.reached.get(index, 0)) for index in lease.pending
        }
        try:
            return EarlierAttempts(self._snapshots.of(lease.job_id), reached)
        except SnapshotsUnavailable as error:
            log.warning("snapshots_unavailable", reason=str(error))
            return EarlierAttempts({}, reached)

    def begin(
        self,
        kept: StoredSnapshot | None,
        request: ImageRequest,
        on_event: OnEvent,
        *,
        within_s: float | None,
    ) -> tuple[Handle, int]:
        """Give an image to the engine, from its snapshot if that fits; return its first step, too.

        Raises as `Engine.submit`.
        """
        if kept is not None:
            restore = self._engine.restore
            try:
                return restore(kept.blob, on_event, request=request, within_s=within_s), kept.step
            except SnapshotRefused as error:  # made elsewhere, or damaged: start again
                telemetry.SNAPSHOTS_REFUSED.inc()
                log.warning("snapshot_refused", request_id=request.id, reason=str(error))
        return self._engine.submit(request, on_event, within_s=within_s), 0

    def keep_soon(self, lease: Lease, index: int, request_id: str) -> None:
        """Have a snapshot taken before the image's next step. Returns at once."""

        def keep(snapshot: Future[bytes]) -> None:
            if snapshot.exception() is None:
                with self._changed:
                    self._newest[lease.job_id, index] = lease.attempt, snapshot.result()
                    self._changed.notify()

        self._engine.snapshot(request_id).add_done_callback(keep)

    def withdraw(self, lease: Lease, handles: Mapping[int, Handle]) -> list[LeftSnapshot]:
        """Take the images out of the engine, store their snapshots, and return what was stored.

        Images that are finished by then, or cannot be stored, are left out.
        """
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
                left.append(
                    LeftSnapshot(index, step, place(lease.job_id, index), len(blob), device_s)
                )
            except (EngineError, TimeoutError) as error:
                log.warning(
                    "snapshot_not_kept", index=index, reason=f"{type(error).__name__}: {error}"
                )
            except SnapshotsUnavailable as error:
                log.warning("snapshot_not_kept", index=index, reason=str(error))
                break  # the others would fail as well, and the notice leaves no time to try
        return left

    def close(self) -> None:
        """Store the snapshots taken so far, and stop."""
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
