"""Render one job: take the lease, give its images to the engine, hand each on as it is done.

    render_job               the task: nothing without the lease
      _render_alone_if_suspect
        _render              submit the images, hand them on; how that ended is one RenderResult
          _attempt           ... of which every error becomes a part
          _settle            what becomes of the job by that result

What an error means is decided in `verdicts.py`. Nothing ever leaves a task body as an exception,
for Celery would keep its message unacknowledged.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session

from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.progress import JobSignals, Preview, ProgressWriter, Step
from edges.snapshots import STORE
from engine.errors import ImageCanceled
from engine.events import EngineEvent, Failed, Finished, Previewed, Resumed, Started, Stepped
from engine.records import FinishedImage, RenderRecord
from engine.request import AdapterUse, Determinism, ImageRequest, Picture
from engine.texts import UnreadText
from models import leases
from models.database import run_transaction
from models.leases import Lease, LeaseLost, RenderedWork
from models.tables import Job
from policy import queues, warnings
from policy.current import CurrentFleet
from policy.fleet import Fleet, ModelTier, checkpoint_name
from policy.params import PARAMS
from policy.steps import image_steps, rows_taken
from policy.workers import class_key
from settings import Settings
from tasks import verdicts
from tasks.checkpoints import Checkpoints, EarlierAttempts
from tasks.health import Health
from tasks.held import HeldLease
from tasks.inputs import InputPictures
from tasks.keeper import EXCLUSIVE_FROM, LeaseKeeper
from tasks.lacking import LackingModels
from tasks.previews import Previews
from tasks.residency import Residency
from tasks.suspicion import suspicion_of
from tasks.verdicts import Verdicts, persist
from tasks.work import End, ImageEnding, RenderResult, RenderWork, TextsUnread

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Render jobs; one per worker process, with one engine that keeps the weights loaded."""

    settings: Settings
    current: CurrentFleet
    keeper: LeaseKeeper
    residency: Residency
    checkpoints: Checkpoints
    inputs: InputPictures
    health: Health
    verdicts: Verdicts
    database: Database
    broker: Broker
    release: Release
    lacking: LackingModels
    handoff: Handoff
    progress: ProgressWriter
    previews: Previews
    signals: JobSignals

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that runs now."""
        return self.current.fleet

    def render_job(self, *, job_id: str) -> None:
        """Render one job. Harmless when delivered twice: only the lease holder works."""
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id, worker=self.keeper.identity.name)
        try:
            self._render_job(uuid.UUID(job_id))
        except verdicts.DATABASE_AWAY as error:  # the sweeper sees that nobody has the job
            log.warning("render_postponed", reason=type(error).__name__)
        except BaseException as error:
            log.error("render_task_failed", exc_info=error)
        finally:
            with suppress(ValueError):
                self.keeper.end_task(uuid.UUID(str(job_id)))

    def _render_job(self, job_id: uuid.UUID) -> None:
        if self.keeper.leaving:  # the broker was asked for it before that was known
            self.release.return_to_queue(job_id)
            return
        if self.lacking.puts_back(job_id):
            return
        with self.keeper.leased(job_id) as held:
            if held is None:
                telemetry.DUPLICATES.labels("render").inc()
                return
            telemetry.bind_request_of(held.lease.job)
            self._render_alone_if_suspect(held)
        self.release.release(held.lease.job.pool, held.lease.job.tier)

    def _render_alone_if_suspect(self, held: HeldLease) -> None:
        """Keep a job that was there when its worker died, more than once, apart from all others.

        What comes to the worker meanwhile is given back.
        """
        may_stay: AbstractContextManager[bool]
        if held.lease.job.counted_attempts < EXCLUSIVE_FROM:
            may_stay = nullcontext(not self.keeper.is_reserved(held))
        else:
            may_stay = self.keeper.exclusive(held)
        with may_stay as stays:
            if stays:
                self._render(held)
            else:
                self._give_back(held.lease, "another job has the worker to itself")

    def _render(self, held: HeldLease) -> None:
        """Render what is pending of the job; afterwards nothing of it is in the engine."""
        work = RenderWork(held)
        self.progress.begin(held.lease.job_id, held.lease.attempt)
        try:
            self._settle(work, self._attempt(work))
        finally:
            self.previews.end(held.lease.job_id)
            work.cancel()
            self._note_waste(work)

    def _attempt(self, work: RenderWork) -> RenderResult:
        """Render and hand on every pending image; say how that ended, whatever happened.

        It begins once the job's model is in the device's memory, and keeps it there.
        """
        job = work.lease.job
        checkpoint = checkpoint_name(job.model, job.model_version)
        with self.residency.using(checkpoint, work.wake) as use:
            while not use.is_ready and not work.held.is_released:
                work.wait()
            return self._attempt_with_model(work)

    def _attempt_with_model(self, work: RenderWork) -> RenderResult:
        if work.held.is_released:
            return _release_of(work.held)
        try:
            earlier = self._submit(work)
            if work.held.is_released:
                return _release_of(work.held)
            self._begin(work, earlier)
            return self._hand_on_all(work)
        except BaseException as error:  # noqa: BLE001
            return _result_of(error)

    def _settle(self, work: RenderWork, result: RenderResult) -> None:
        """Do what the job's result asks for."""
        match result.end:
            case End.RENDERED:
                pass  # the last hand-off ended the lease
            case End.LOST:
                work.drop()
                log.info("render_dropped", attempt=work.lease.attempt)
            case End.LEAVING:
                self._give_up(work)
            case End.FAILED:
                assert result.error is not None
                self.verdicts.decide(work.held, result.error)

    def _submit(self, work: RenderWork) -> EarlierAttempts:
        """Give every pending image to the engine; return what earlier attempts left of them."""
        lease = work.lease
        pictures = self.inputs.of(lease.job)
        earlier = self.checkpoints.of_earlier_attempts(lease)
        for index in lease.pending:
            handle, first_step = self.checkpoints.begin(
                earlier.kept.get(index),
                self._request(lease, index, pictures),
                self._event_handler(work, index),
                within_s=work.held.run_left_s,
            )
            work.add(index, handle, first_step=first_step)
        self.previews.begin(lease.job_id, work.handles)
        return earlier

    def _begin(self, work: RenderWork, earlier: EarlierAttempts) -> None:
        """Put on record what this attempt goes on from, and tell of its steps from now on."""
        if work.lease.attempt > 1:
            self._note_resumption(work, earlier)
        work.begin()

    def _hand_on_all(self, work: RenderWork) -> RenderResult:
        """Hand each image on as it is done, until all are, one fails, or the job is released."""
        for _ in work.lease.pending:
            ending = self._next_ending(work)
            if ending is None:
                return _release_of(work.held)
            if isinstance(ending.event, Failed):
                return _result_of(ending.event.error)
            self._hand_on(work, ending.index, ending.event.image)
        self.inputs.drop(work.lease.job)
        log.info("job_rendered", attempt=work.lease.attempt, images=len(work.handles))
        # As a rule the last hand-off has ended the lease; but one of an earlier attempt may have
        # vanished meanwhile.
        reason = "an image of an earlier attempt is to be rendered again"
        self._give_back(work.lease, reason, lacks_inputs=True)
        return RenderResult(End.RENDERED)

    def _next_ending(self, work: RenderWork) -> ImageEnding | None:
        """Wait for the next image that ends; None once the job is released."""
        while not isinstance(message := work.wait(), ImageEnding):
            if work.held.is_released:
                return None
            if message is not None:
                self._warn(work.lease, message.texts)
        return message

    def _event_handler(self, work: RenderWork, index: int) -> Callable[[EngineEvent], None]:
        """Make the function that the engine calls with the events of the job's image `index`."""
        lease = work.lease
        every = self.fleet.tier_or_retired(lease.job.tier).checkpoint_every_steps

        def on_event(event: EngineEvent) -> None:  # in the engine's thread: note it and go
            if isinstance(event, Stepped):
                self.progress.note(lease.job_id, Step(index, event.step, event.num_steps))
                if every and event.step % every == 0 and event.step < event.num_steps:
                    self.checkpoints.keep_soon(lease, index, event.request_id)
            elif isinstance(event, Previewed):
                preview = Preview(index, event.step, image_steps(lease.job), event.jpeg)
                self.progress.show(lease.job_id, preview)
                work.first_preview_at = work.first_preview_at or time.monotonic()
            elif isinstance(event, Started | Resumed) and event.unread:
                work.put(TextsUnread(event.unread))
            elif isinstance(event, Finished | Failed):
                work.put(ImageEnding(index, event))

        return on_event

    def _request(self, lease: Lease, index: int, pictures: Mapping[str, Picture]) -> ImageRequest:
        """Make the engine's request for the job's image `index`."""
        job = lease.job
        own = self.fleet.model_or_retired(job.model).tiers.get(job.tier, ModelTier())
        return ImageRequest(
            id=f"{job.id}/{lease.attempt}/{index}",
            group=str(job.id),
            owner=str(job.tenant_id),
            checkpoint=checkpoint_name(job.model, job.model_version),
            rank=self.fleet.tier_or_retired(job.tier).rank,
            may_skip_blocks=own.block_cache,
            **rendering(job, index, pictures),
        )

    def _warn(self, lease: Lease, unread: tuple[UnreadText, ...]) -> None:
        """Tell the tenant what of the job's texts has no effect: the same for all its images."""
        told = [
            warnings.unread(
                text.field,
                tokens_given=text.tokens_given,
                tokens_read=text.tokens_read,
                guidance=lease.job.guidance,
            )
            for text in unread
        ]

        def note() -> list[dict[str, Any]]:
            return run_transaction(self.database, lambda session: leases.warn(session, lease, told))

        for warning in persist(note, verdicts.DATABASE_AWAY):
            telemetry.TEXTS_UNREAD.labels(lease.job.model, warning["code"]).inc()

    def _hand_on(self, work: RenderWork, index: int, finished: FinishedImage) -> None:
        """Put the pixels into the hand-off, note it in Postgres, and ask for them to be stored.

        The GPU is at its next step already.
        """
        job = work.lease.job
        record = finished.record
        steps = record.num_steps - work.resumed[index]
        self._put_pixels(work, index, finished)
        self.progress.flush()  # or its last step is told after it was stored
        persist(
            lambda: self._note_hand_off(work, index, steps, finished),
            verdicts.DATABASE_AWAY,
        )
        work.note_handed_on(index)
        self.health.note_image()
        telemetry.IMAGES_RENDERED.labels(job.tier, job.model).inc()
        telemetry.DEVICE_SECONDS.labels(job.tier, job.model).inc(record.device_seconds)
        self._learn(job, record, steps)
        self._ask_to_store(job)

    def _learn(self, job: Job, record: RenderRecord, steps: int) -> None:
        """Note what the image took, for the estimates of jobs to come."""
        model = self.fleet.model_or_retired(job.model).of_version(job.model_version)
        rows = rows_taken(model, guidance=job.guidance, negative_prompt=job.negative_prompt)
        me = self.keeper.identity
        self.keeper.learn(
            (
                class_key(me.pool, me.terms.capacity_class),
                job.model,
                job.width_px,
                job.height_px,
            ),
            row_steps=steps * rows,
            denoise_s=record.denoise_s,
            fixed_s=record.encode_s + record.decode_s,
        )

    def _put_pixels(self, work: RenderWork, index: int, finished: FinishedImage) -> None:
        """Put the pixels into the hand-off, patiently: to render again costs more than to wait."""
        lease = work.lease
        persist(
            lambda: self.handoff.put(lease.job_id, index, lease.attempt, finished.pixels),
            HandoffUnavailable,
            patience_s=verdicts.PIXELS_PATIENCE_S,
            is_vain=lambda: work.held.is_released,
        )

    def _note_hand_off(
        self,
        work: RenderWork,
        index: int,
        steps: int,
        finished: FinishedImage,
    ) -> None:
        """Write the image's hand-off and what it took. Raises LeaseLost."""
        suspect = suspicion_of(finished.pixels)
        rendered = replace(
            _rendered(finished.record, steps, work.first_preview_at), suspect=suspect
        )

        def note(session: Session) -> Job:
            return leases.hand_off(
                session,
                work.lease,
                index,
                rendered=rendered,
                store_within_s=self.settings.store_within_s,
            )

        run_transaction(self.database, note)
        if suspect is not None:
            telemetry.IMAGES_SUSPECT.labels(work.lease.job.model, suspect).inc()
            log.warning("image_suspect", index=index, why=suspect)

    def _ask_to_store(self, job: Job) -> None:
        queue = queues.results_queue(self.fleet, job.tier)
        try:
            self.broker.announce(queues.STORE_IMAGES, queue, job.id)
        except BrokerUnavailable as error:  # the sweeper looks at `store_by`
            log.warning("announce_failed", reason=str(error))

    def _give_back(self, lease: Lease, reason: str, *, lacks_inputs: bool = False) -> None:
        """Return the job unharmed, if it is still ours."""

        def give_back(session: Session) -> Job:
            return leases.give_back(session, lease, reason=reason, lacks_inputs=lacks_inputs)

        with suppress(LeaseLost):
            run_transaction(self.database, give_back)

    def _give_up(self, work: RenderWork) -> None:
        """Hand on what is finished and return the rest with snapshots, for the worker has to go."""
        held = work.held
        lease = work.lease
        started = time.monotonic()
        try:
            left = self.checkpoints.withdraw(lease, work.open_handles())
            for index, finished in work.drain_finished():
                self._hand_on(work, index, finished)

            def preempt(session: Session) -> Job:
                return leases.preempt(session, lease, reason=held.leaving, left=left, store=STORE)

            run_transaction(self.database, preempt)
        except LeaseLost:
            return  # its last image was finished meanwhile, or it was canceled
        except BaseException as error:  # noqa: BLE001
            self.verdicts.decide(work.held, error)
            return
        for image in left:
            work.note_snapshot_left(image.index)
        telemetry.PREEMPTED.inc()
        after_s = round(time.monotonic() - started, 3)
        log.info("job_preempted", attempt=lease.attempt, snapshots=len(left), after_s=after_s)

    def _note_resumption(self, work: RenderWork, earlier: EarlierAttempts) -> None:
        """Put on record what snapshots spared this attempt, and what it does again."""
        resumed = work.resumed
        lost = sum(max(0, earlier.reached.get(index, 0) - step) for index, step in resumed.items())

        def note(session: Session) -> str | None:
            return leases.note_resumption(session, work.lease, resumed=resumed, lost_steps=lost)

        cause = run_transaction(self.database, note)
        telemetry.STEPS_RESUMED.inc(sum(resumed.values()))
        if cause is not None:
            telemetry.STEPS_LOST.labels(cause).inc(lost)

    def _note_waste(self, work: RenderWork) -> None:
        """Write down device time that bought no image: on the attempt's account, or its tenant's.

        The latter for a job that was canceled, an image that was finished by then included.
        """
        spent = {index: handle.progress() for index, handle in work.unaccounted().items()}
        wasted_s = sum(image.device_seconds for image in spent.values())
        if not wasted_s:
            return
        steps_done = {index: image.step for index, image in spent.items()}

        def note(session: Session) -> None:
            leases.note_waste(session, work.lease, device_seconds=wasted_s, steps_done=steps_done)

        persist(lambda: run_transaction(self.database, note), verdicts.DATABASE_AWAY)


def _rendered(record: RenderRecord, steps: int, previewed_at: float | None) -> RenderedWork:
    """Tell what rendering took.

    steps: those of this attempt alone.  previewed_at: its job's first preview, by the monotonic
    clock.
    """
    return RenderedWork(
        num_steps=record.num_steps,
        steps=steps,
        shared_steps=min(record.shared_forwards, steps),
        max_rows=record.max_rows,
        max_images=record.max_images,
        mean_rows=record.mean_rows,
        bucket_rows=record.bucket_rows,
        prompt_tokens=record.prompt.given if record.prompt else None,
        truncated_tokens=record.prompt.given - record.prompt.read if record.prompt else None,
        device_seconds=record.device_seconds,
        encode_s=record.encode_s,
        denoise_s=record.denoise_s,
        decode_s=record.decode_s,
        padding_s=record.padding_s,
        waited_s=record.waited_s,
        fingerprint=record.fingerprint,
        fingerprint_facts=record.fingerprint_facts,
        previewed_s_ago=None if previewed_at is None else time.monotonic() - previewed_at,
    )


def _result_of(error: BaseException) -> RenderResult:
    """Tell a job that is not this attempt's any more from one that failed."""
    if isinstance(error, LeaseLost | ImageCanceled):
        return RenderResult(End.LOST)
    return RenderResult(End.FAILED, error)


def _release_of(held: HeldLease) -> RenderResult:
    """Say why a released job is let go of: a lost lease outweighs a worker that leaves."""
    return RenderResult(End.LOST if held.is_lost else End.LEAVING)


def rendering(job: Job, index: int, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """Name one image's parameters as ImageRequest does; leave out those that are None."""
    given = {
        param.engine_field: getattr(job, param.name)
        for param in PARAMS
        if param.engine_field is not None and param.picture is None
    }
    given["seed"] = job.seed + index
    given["determinism"] = Determinism(job.determinism)
    given["adapters"] = tuple(AdapterUse(**adapter) for adapter in job.adapters or ())
    return {**{field: value for field, value in given.items() if value is not None}, **pictures}
