"""Render one job: take the lease, give its images to the engine, hand the pixels on as each is done.

Turns every engine error into a decision: fail now, put back, or count a try. Nothing ever leaves a task body as an
exception, for Celery would keep its message unacknowledged.
"""

import os
import queue
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.progress import News, ProgressWriter, Step
from edges.release import Release
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped, ImageCanceled, ImageNotFinite, UnknownCheckpoint, UnsupportedRequest
from engine.events import Event, Failed, Finished, Stepped
from engine.handle import Handle
from engine.records import FinishedImage
from engine.request import Determinism, ImageRequest
from models import leases
from models.database import transaction
from models.leases import Lease, LeaseLost, Rendered
from models.states import FailureCode, JobState
from models.tables import Job
from policy import queues
from policy.catalog import checkpoint_name
from policy.fleet import Fleet
from settings import Settings
from tasks.keeper import Held, LeaseKeeper

log = structlog.get_logger(__name__)

PATIENCE_S = (0.2, 0.5, 1, 2, 4)  # waits between tries to hand on what was rendered; pixels are worth some
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """What rendering needs, made once per worker process: the weights stay in `engine` from task to task."""

    settings: Settings
    fleet: Fleet
    engine: Engine
    keeper: LeaseKeeper
    database: Database
    broker: Broker
    release: Release
    handoff: Handoff
    progress: ProgressWriter
    news: News

    def render_job(self, *, job_id: str) -> None:
        """Render one job. Harmless when delivered twice: only the lease holder works."""
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id, worker=self.keeper.identity.name)
        try:
            with self.keeper.leased(uuid.UUID(job_id)) as held:
                if held is None:
                    telemetry.DUPLICATES.labels("render").inc()
                    return
                self._render(held)
            self.release.release(held.lease.job.pool, held.lease.job.tier)
        except BaseException as error:
            log.error("render_task_failed", exc_info=error)

    def _render(self, held: Held) -> None:
        lease = held.lease
        handles: list[Handle] = []
        try:
            for finished in self._finished_images(held, handles):
                self._hand_on(held, finished)
            if not held.lost.is_set():
                self._give_back_if_unfinished(lease)
        except (LeaseLost, ImageCanceled):
            log.info("render_dropped", attempt=lease.attempt)
        except BaseException as error:  # noqa: BLE001
            self._decide(lease, error)
        finally:
            for handle in handles:
                handle.cancel()
            self._note_waste(lease, handles)

    def _finished_images(self, held: Held, handles: list[Handle]) -> Iterator[FinishedImage]:
        """Give every pending image to the engine; yield each as it is done, raise what the first failing one raised."""
        ended: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()
        job = held.lease.job

        def hear(index: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:  # in the engine's thread: note it and go
                if isinstance(event, Stepped):
                    self.progress.note(job.id, Step(index, event.step, event.num_steps))
                elif isinstance(event, Finished | Failed):
                    ended.put(event)

            return on_event

        held.when_lost(lambda: [handle.cancel() for handle in handles])
        for index in held.lease.pending:
            handles.append(self.engine.submit(self._request(held.lease, index), hear(index)))
        if held.lost.is_set():
            raise LeaseLost("lost while its images were submitted")
        for _ in held.lease.pending:
            event = ended.get()
            if isinstance(event, Failed):
                raise event.error
            yield event.image

    def _request(self, lease: Lease, index: int) -> ImageRequest:
        job = lease.job
        return ImageRequest(
            id=f"{job.id}/{lease.attempt}/{index}",
            group=str(job.id),
            owner=str(job.tenant_id),
            checkpoint=checkpoint_name(job.model, job.model_version),
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            width_px=job.width_px,
            height_px=job.height_px,
            num_steps=job.num_steps,
            guidance=job.guidance,
            sampler=job.sampler,
            seed=job.seed + index,
            determinism=Determinism(job.determinism),
            bucket_rows=job.bucket_rows,
            rank=self.fleet.tiers[job.tier].rank if job.tier in self.fleet.tiers else 0,
        )

    def _hand_on(self, held: Held, finished: FinishedImage) -> None:
        """Pixels to the hand-off, the fact to Postgres, a word to the results worker; the GPU is already at its next step."""
        lease, job = held.lease, held.lease.job
        index = int(finished.request.id.rpartition("/")[2])
        _persist(lambda: self.handoff.put(job.id, index, lease.attempt, finished.pixels), HandoffUnavailable)
        _persist(lambda: self._note_hand_off(lease, index, finished), OperationalError)
        held.unrendered -= 1
        telemetry.IMAGES_RENDERED.labels(job.tier, job.model).inc()
        telemetry.DEVICE_SECONDS.labels(job.tier, job.model).inc(finished.record.device_seconds)
        try:
            self.broker.announce(queues.STORE_IMAGES, queues.results_queue(job.tier), job.id)
        except BrokerUnavailable as error:
            log.warning("announce_failed", reason=str(error))  # the sweeper looks at `store_by`

    def _note_hand_off(self, lease: Lease, index: int, finished: FinishedImage) -> None:
        record = finished.record
        rendered = Rendered(
            steps=record.num_steps,
            shared_steps=min(record.shared_forwards, record.num_steps),
            max_rows=record.max_rows,
            max_images=record.max_images,
            mean_rows=record.mean_rows,
            bucket_rows=record.bucket_rows,
            device_seconds=record.device_seconds,
            encode_s=record.encode_s,
            denoise_s=record.denoise_s,
            decode_s=record.decode_s,
            fingerprint=record.fingerprint,
            fingerprint_facts=record.fingerprint_facts,
        )
        with transaction(self.database) as session:
            leases.hand_off(session, lease, index, rendered=rendered, store_within_s=self.settings.store_within_s)

    def _give_back_if_unfinished(self, lease: Lease) -> None:
        """An image of an earlier attempt may have vanished from the hand-off while this one rendered the others."""
        try:
            with transaction(self.database) as session:
                leases.give_back(session, lease, reason="an image of an earlier attempt is to be rendered again")
        except LeaseLost:
            return  # as it should be: the last hand-off ended the lease

    def _decide(self, lease: Lease, error: BaseException) -> None:
        """What an error means for the job."""
        telemetry.RENDER_ERRORS.labels(type(error).__name__).inc()
        try:
            with transaction(self.database) as session:
                job = self._decided(session, lease, error)
        except LeaseLost:
            return
        if job.state == JobState.FAILED:
            self.news.tell_ending(job.id)
        if isinstance(error, EngineStopped):
            os.kill(os.getpid(), signal.SIGTERM)  # a worker without its device thread is of no use: the supervisor starts another

    def _decided(self, session: Session, lease: Lease, error: BaseException) -> Job:
        log.warning("render_failed", attempt=lease.attempt, exc_info=error)
        if isinstance(error, UnsupportedRequest | UnknownCheckpoint):
            return leases.fail(session, lease, code=FailureCode.UNSUPPORTED, detail=str(error))
        if isinstance(error, ImageNotFinite):
            return leases.fail(session, lease, code=FailureCode.NOT_FINITE, detail=str(error))
        if isinstance(error, EngineStopped | HandoffUnavailable):
            return leases.give_back(session, lease, reason=type(error).__name__)
        detail = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        return leases.count_error(session, lease, detail=detail[:500], max_attempts=self.settings.max_attempts)

    def _note_waste(self, lease: Lease, handles: list[Handle]) -> None:
        """Device time of images that were not finished goes on the attempt's account, not on the tenant's bill."""
        wasted_s = sum(handle.progress().device_seconds for handle in handles if not _is_finished(handle))
        if wasted_s:
            with transaction(self.database) as session:
                leases.note_waste(session, lease.job_id, lease.attempt, device_seconds=wasted_s)


def _is_finished(handle: Handle) -> bool:
    try:
        return handle.done() and handle.result(0) is not None
    except EngineError:
        return False


def _persist(act: Callable[[], Answer], passing: type[Exception]) -> Answer:
    """Do `act`, again after each wait of PATIENCE_S when it raises `passing`."""
    for wait_s in PATIENCE_S:
        try:
            return act()
        except passing as error:
            log.warning("hand_off_tried_again", reason=type(error).__name__)
            time.sleep(wait_s)
    return act()
