"""Store rendered images: encode, upload under a content-addressed key, commit.

Artifact, state, cost and audit event are one transaction.
"""

import time
import uuid
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from dispatch.endings import EndedJobs, lose_hand_off
from dispatch.release import Release
from edges import telemetry
from edges.encoding import encode
from edges.handoff import Handoff, HandoffCorrupt, HandoffUnavailable, Pixels
from edges.objectstore import ObjectStore, StoreUnavailable, content_sha256, image_key
from edges.progress import JobSignals
from models import jobs, sweeping, uploads
from models.database import run_transaction, transaction
from models.tables import Job
from policy.current import CurrentFleet
from policy.fleet import Fleet
from policy.formats import FORMATS
from policy.states import FINAL_STATES, JobState
from settings import StoreSettings

log = structlog.get_logger(__name__)

TIDY_FOR_S = 30.0  # of each minute: images are stored by the same few threads


@dataclass(frozen=True, kw_only=True)
class Storekeeper:
    """Store images; one per results worker."""

    settings: StoreSettings
    current: CurrentFleet
    database: Database
    handoff: Handoff
    store: ObjectStore
    signals: JobSignals
    ended: EndedJobs
    release: Release
    name: str
    # Set when something could not be stored; cleared when storing works again.
    _is_behind: Event = field(default_factory=Event, init=False)

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that runs now."""
        return self.current.fleet

    def store_images(self, *, job_id: str) -> None:
        """Store every image of the job whose pixels wait.

        Harmless when delivered twice or late, or when killed at any point.
        """
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id)
        try:
            self._store_images(uuid.UUID(job_id))
            self._hasten_others()
        except (StoreUnavailable, HandoffUnavailable, OperationalError, PoolTimeout) as error:
            self._is_behind.set()
            # The sweeper announces it again when `store_by` has passed.
            log.warning("store_postponed", reason=f"{type(error).__name__}: {error}"[:300])
        except BaseException as error:
            log.error("store_task_failed", exc_info=error)

    def _store_images(self, job_id: uuid.UUID) -> None:
        with transaction(self.database) as session:
            job = jobs.find_without_texts(session, job_id)
            is_open = job is not None and job.state not in FINAL_STATES
            waiting = jobs.handed_off(session, job_id) if is_open else {}
        if job is None or not waiting:
            telemetry.DUPLICATES.labels("store").inc()
            return
        telemetry.bind_request_of(job)
        gone = [
            index
            for index, attempt in waiting.items()
            if not self._store_image(job, index, attempt)
        ]
        if gone:
            log.warning("handoff_gone", indexes=gone)
            lose_hand_off(
                self.database, self.ended, job.id, gone, attempt_of=waiting, release=self.release
            )

    def _hasten_others(self) -> None:
        """Make all postponed jobs due at once now that storing works again.

        Otherwise each would wait for the time of its next try.
        """
        if self._is_behind.is_set():
            self._is_behind.clear()
            with transaction(self.database) as session:
                sweeping.hasten_stores(session)

    def _store_image(self, job: Job, index: int, attempt: int) -> bool:
        """Store one image; False if its pixels are gone."""
        pixels = self._pixels(job.id, index, attempt)
        if pixels is None:
            return self._is_settled(job.id, index)
        artifact = self._upload(job, pixels)

        def store(session: Session) -> Job | None:
            return jobs.store(
                session,
                job_id=job.id,
                index=index,
                attempt=attempt,
                artifact=artifact,
                fleet=self.fleet,
                store_within_s=self.settings.store_within_s,
                actor=self.name,
            )

        after = run_transaction(self.database, store)
        self.handoff.drop(job.id, index, attempt)
        if after is None:
            telemetry.DUPLICATES.labels("store").inc()
            run_transaction(
                self.database, lambda session: uploads.end_if_named(session, artifact["object_key"])
            )
            return True
        telemetry.IMAGES_STORED.labels(job.tier, job.output_format).inc()
        telemetry.STORED_BYTES.inc(artifact["size_bytes"])
        self._tell_stored(after, index, artifact)
        return True

    def _pixels(self, job_id: uuid.UUID, index: int, attempt: int) -> Pixels | None:
        """Read an image from the hand-off; None if it is gone, or damaged."""
        try:
            return self.handoff.get(job_id, index, attempt)
        except HandoffCorrupt as error:
            log.error("handoff_corrupt", index=index, reason=str(error))
            return None

    def _tell_stored(self, job: Job, index: int, artifact: dict[str, Any]) -> None:
        """Tell the job's followers that an image is stored; if it was the last one, of its end."""
        self.signals.publish_stored(
            job.id, {"index": index, "seed": job.seed + index, **_told(artifact)}
        )
        if job.state == JobState.SUCCEEDED:
            log.info("job_succeeded", tier=job.tier, device_seconds=round(job.device_seconds, 4))
            self.ended.notify_ended(job)

    def _upload(self, job: Job, pixels: Pixels) -> dict[str, Any]:
        """Encode and upload; return the artifact's columns.

        The same pixels go to the same key, so doing it twice is harmless.
        """
        kind = FORMATS[job.output_format]
        content = encode(pixels.array, job.output_format)
        digest = content_sha256(content)
        key = image_key(job.tenant_id, digest, kind.extension)
        run_transaction(self.database, lambda session: uploads.begin(session, key))
        self.store.put(key, content, content_type=kind.content_type)
        height_px, width_px, _ = pixels.array.shape
        return {
            "object_key": key,
            "content_type": kind.content_type,
            "size_bytes": len(content),
            "width_px": width_px,
            "height_px": height_px,
            "pixels_sha256": pixels.sha256,
            "content_sha256": digest,
        }

    def _is_settled(self, job_id: uuid.UUID, index: int) -> bool:
        """Tell whether another delivery of the message stored the image meanwhile."""
        with transaction(self.database) as session:
            return index not in jobs.handed_off(session, job_id)

    def _tidy_one(self) -> bool:
        """Delete one orphaned object; False if there is none.

        Its row is locked meanwhile, so that nobody stores the same object again.
        """
        with transaction(self.database) as session:
            key = uploads.left_behind(session, older_than_s=uploads.ORPHAN_AFTER_S)
            if key is None:
                return False
            self.store.delete(key)
            uploads.end(session, key)
        telemetry.SWEPT.labels("orphan_object").inc()
        log.info("swept", why="orphan_object", object_key=key)
        return True

    def tidy_store(self) -> None:
        """Delete objects that no row names: left by a crash between upload and commit, or given up.

        Stops after `TIDY_FOR_S`; the sweeper asks again for the rest. Harmless when repeated, or
        when several do it.
        """
        ends_at = time.monotonic() + TIDY_FOR_S
        try:
            while self._tidy_one() and time.monotonic() < ends_at:
                pass
        except StoreUnavailable as error:
            log.warning("tidy_postponed", reason=str(error))
        except BaseException as error:
            log.error("tidy_task_failed", exc_info=error)


def _told(artifact: dict[str, Any]) -> dict[str, Any]:
    """Return what a job's followers are told of a stored image: all but its key in the store."""
    return {name: value for name, value in artifact.items() if name != "object_key"}
