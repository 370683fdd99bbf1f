"""Render one job: take the lease, give its images to the engine, hand the pixels on as each is done.

What an error means is decided in `verdicts.py`. Nothing ever leaves a task body as an exception, for Celery would keep its
message unacknowledged.
"""

import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import Engine as Database

from edges import telemetry
from edges.broker import Broker, BrokerUnavailable
from edges.handoff import Handoff, HandoffUnavailable
from edges.progress import News, Preview, ProgressWriter, Step
from edges.release import Release
from edges.snapshots import STORE
from engine.errors import EngineError, ImageCanceled
from engine.events import Event, Failed, Finished, Previewed, Resumed, Started, Stepped
from engine.handle import Handle
from engine.records import FinishedImage
from engine.request import AdapterUse, Determinism, ImageRequest, Picture
from engine.texts import UnreadText
from models import leases
from models.database import run_transaction
from models.leases import Lease, LeaseLost, Rendered
from models.tables import Job
from policy import queues, warnings
from policy.catalog import checkpoint_name
from policy.fleet import Fleet
from policy.params import PARAMS
from settings import Settings
from tasks import verdicts
from tasks.checkpoints import Checkpoints, Earlier
from tasks.health import Health
from tasks.inputs import PictureDesk
from tasks.keeper import ALONE_FROM, Held, LeaseKeeper
from tasks.previews import Previews
from tasks.verdicts import Verdicts, persist

log = structlog.get_logger(__name__)

DROP_WITHIN_S = 20.0  # no step takes that long


class LetGo(Exception):
    """The job is to be let go of: its lease is lost, or the worker has to leave."""


@dataclass
class Work:
    """A job's images in this worker's engine, by index, and their endings as they come.

    Among these: what one has to tell of its texts, and None: look up, something changed.
    """

    held: Held
    handles: dict[int, Handle] = field(default_factory=dict)
    resumed: dict[int, int] = field(default_factory=dict)  # the step at which a snapshot let it begin
    left: set[int] = field(default_factory=set)  # withdrawn: another attempt goes on
    handed_on: set[int] = field(default_factory=set)
    endings: "queue.SimpleQueue[Finished | Failed | tuple[UnreadText, ...] | None]" = field(default_factory=queue.SimpleQueue)

    def open_handles(self) -> dict[int, Handle]:
        """The images that have not ended."""
        return {index: handle for index, handle in list(self.handles.items()) if not handle.done()}

    def look_up(self) -> None:
        """Wake whoever waits for an ending; a lost lease stops the images at their next step whatever that one is busy with."""
        if self.held.lost.is_set():
            for handle in list(self.handles.values()):
                handle.cancel()
        self.endings.put(None)

    def steps(self) -> dict[int, int]:
        """Tell how far each image that has not ended has come."""
        return {index: handle.progress().step for index, handle in self.open_handles().items()}

    def expected_s(self) -> float | None:
        """Seconds until the last image's pixels; None while an image has not begun."""
        etas = [handle.progress().eta_s for handle in self.open_handles().values()]
        return max((eta for eta in etas if eta is not None), default=0.0) if all(eta is not None for eta in etas) else None


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """What rendering needs, made once per worker process: the weights stay in `engine` from task to task."""

    settings: Settings
    fleet: Fleet
    keeper: LeaseKeeper
    checkpoints: Checkpoints
    desk: PictureDesk
    health: Health
    verdicts: Verdicts
    database: Database
    broker: Broker
    release: Release
    handoff: Handoff
    progress: ProgressWriter
    previews: Previews
    news: News

    def render_job(self, *, job_id: str) -> None:
        """Render one job. Harmless when delivered twice: only the lease holder works."""
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id, worker=self.keeper.identity.name)
        try:
            if self.keeper.leaving:  # the broker was asked for it before that was known
                self.release.pass_on(uuid.UUID(job_id))
                return
            with self.keeper.leased(uuid.UUID(job_id)) as held:
                if held is None:
                    telemetry.DUPLICATES.labels("render").inc()
                    return
                self._render_in_due_company(held)
            self.release.release(held.lease.job.pool, held.lease.job.tier)
        except verdicts.DATABASE_AWAY as error:  # the job waits on: the sweeper sees that nobody has it
            log.warning("render_postponed", reason=type(error).__name__)
        except BaseException as error:
            log.error("render_task_failed", exc_info=error)
        finally:
            with suppress(ValueError):
                self.keeper.end_task(uuid.UUID(str(job_id)))

    def _render_in_due_company(self, held: Held) -> None:
        """A job that was there when its worker died, more than once, shares it with nobody; what comes meanwhile goes elsewhere."""
        if held.lease.job.counted_attempts < ALONE_FROM:
            may_stay = nullcontext(not self.keeper.is_reserved(held))
        else:
            may_stay = self.keeper.alone(held)
        with may_stay as stays:
            if stays:
                self._render(held)
            else:
                self._give_back(held.lease, "another job has the worker to itself")

    def _render(self, held: Held) -> None:
        work = Work(held)
        self.progress.begin(held.lease.job_id, held.lease.attempt)
        try:
            for finished in self._finished_images(work):
                self._hand_on(work, finished)
            self.desk.drop(held.lease.job)
            # As a rule the last hand-off has ended the lease; but one of an earlier attempt may have vanished meanwhile.
            self._give_back(held.lease, "an image of an earlier attempt is to be rendered again", lacks_inputs=True)
        except LetGo:
            self._let_go(work)
        except (LeaseLost, ImageCanceled):
            self._drop(work)
        except BaseException as error:  # noqa: BLE001
            if self.verdicts.decide(held, error):
                self.desk.drop(held.lease.job)
        finally:
            self.previews.end(held.lease.job_id)
            for handle in work.handles.values():
                handle.cancel()
            self._note_waste(work)

    def _finished_images(self, work: Work) -> Iterator[FinishedImage]:
        """Give every pending image to the engine; yield each as it is done, raise what the first failing one raised.

        Raises LetGo between two of them when the job is to be let go of.
        """
        held, lease = work.held, work.held.lease
        held.when_to_let_go(work.look_up)
        pictures = self.desk.of(lease.job)
        earlier = self.checkpoints.of_earlier_attempts(lease)
        for index in lease.pending:
            request, on_event = self._request(lease, index, pictures), self._hearer(work, index)
            begun = self.checkpoints.begin(earlier.kept.get(index), request, on_event, within_s=held.run_left_s)
            work.handles[index], work.resumed[index] = begun
        self.previews.begin(lease.job_id, work.handles)
        held.expected_s = work.expected_s
        if held.lost.is_set() or held.leaving:
            raise LetGo
        if lease.attempt > 1:
            self._note_resumption(work, earlier)
        held.steps = work.steps  # only now: until then the rows say how far the attempts before had come
        for _ in lease.pending:
            while not isinstance(event := work.endings.get(), Finished | Failed):
                if held.lost.is_set() or held.leaving:
                    raise LetGo
                if event is not None:
                    self._warn(lease, event)
            if isinstance(event, Failed):
                raise event.error
            yield event.image

    def _hearer(self, work: Work, index: int) -> Callable[[Event], None]:
        lease = work.held.lease
        every = self.fleet.tiers[lease.job.tier].checkpoint_every_steps if lease.job.tier in self.fleet.tiers else 0

        def on_event(event: Event) -> None:  # in the engine's thread: note it and go
            if isinstance(event, Stepped):
                self.progress.note(lease.job_id, Step(index, event.step, event.num_steps))
                if every and event.step % every == 0 and event.step < event.num_steps:
                    self.checkpoints.keep_soon(lease, index, event.request_id)
            elif isinstance(event, Previewed):
                self.progress.show(lease.job_id, Preview(index, event.step, lease.job.num_steps, event.jpeg))
            elif isinstance(event, Started | Resumed) and event.unread:
                work.endings.put(event.unread)
            elif isinstance(event, Finished | Failed):
                work.endings.put(event)

        return on_event

    def _warn(self, lease: Lease, unread: tuple[UnreadText, ...]) -> None:
        """Tell the tenant what of the job's texts has no effect. All images of a job have the same."""

        def note() -> list[dict[str, Any]]:
            return run_transaction(self.database, lambda session: leases.warn(session, lease, told))

        counted = [(text.field, text.tokens_given, text.tokens_read) for text in unread]
        told = [warnings.unread(name, tokens_given=given, tokens_read=read, guidance=lease.job.guidance) for name, given, read in counted]
        for warning in persist(note, verdicts.DATABASE_AWAY):
            telemetry.TEXTS_UNREAD.labels(lease.job.model, warning["code"]).inc()

    def _request(self, lease: Lease, index: int, pictures: Mapping[str, Picture]) -> ImageRequest:
        job = lease.job
        return ImageRequest(
            id=f"{job.id}/{lease.attempt}/{index}",
            group=str(job.id),
            owner=str(job.tenant_id),
            checkpoint=checkpoint_name(job.model, job.model_version),
            rank=self.fleet.tiers[job.tier].rank if job.tier in self.fleet.tiers else 0,
            **_rendering(job, index, pictures),
        )

    def _hand_on(self, work: Work, finished: FinishedImage) -> None:
        """Pixels to the hand-off, the fact to Postgres, a word to the results worker; the GPU is already at its next step."""
        lease, job, record = work.held.lease, work.held.lease.job, finished.record
        index = int(finished.request.id.rpartition("/")[2])
        steps = record.num_steps - work.resumed[index]
        persist(
            lambda: self.handoff.put(job.id, index, lease.attempt, finished.pixels),
            HandoffUnavailable,
            patience_s=verdicts.PIXELS_PATIENCE_S,
            is_vain=lambda: work.held.lost.is_set() or bool(work.held.leaving),
        )
        persist(lambda: self._note_hand_off(lease, index, steps, finished), verdicts.DATABASE_AWAY)
        work.handed_on.add(index)
        work.held.unrendered -= 1
        self.health.note_image()
        telemetry.IMAGES_RENDERED.labels(job.tier, job.model).inc()
        telemetry.DEVICE_SECONDS.labels(job.tier, job.model).inc(record.device_seconds)
        self.keeper.learn(
            (job.pool, job.model, job.width_px, job.height_px),
            row_steps=steps * (2 if finished.request.is_guided else 1),
            denoise_s=record.denoise_s,
            fixed_s=record.encode_s + record.decode_s,
        )
        try:
            self.broker.announce(queues.STORE_IMAGES, queues.results_queue(self.fleet, job.tier), job.id)
        except BrokerUnavailable as error:
            log.warning("announce_failed", reason=str(error))  # the sweeper looks at `store_by`

    def _note_hand_off(self, lease: Lease, index: int, steps: int, finished: FinishedImage) -> None:
        record = finished.record
        rendered = Rendered(
            num_steps=record.num_steps,
            steps=steps,
            shared_steps=min(record.shared_forwards, steps),
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
        told = {"rendered": rendered, "store_within_s": self.settings.store_within_s}
        run_transaction(self.database, lambda session: leases.hand_off(session, lease, index, **told))

    def _give_back(self, lease: Lease, reason: str, *, lacks_inputs: bool = False) -> None:
        told = {"reason": reason, "lacks_inputs": lacks_inputs}
        with suppress(LeaseLost):
            run_transaction(self.database, lambda session: leases.give_back(session, lease, **told))

    def _let_go(self, work: Work) -> None:
        """A lost lease: nothing more is written. A worker that leaves: hand on what is finished, give the rest up with snapshots."""
        held, lease = work.held, work.held.lease
        started = time.monotonic()
        if held.lost.is_set():
            self._drop(work)
            return
        try:
            left = self.checkpoints.withdraw(lease, work.open_handles())
            for finished in _drained(work):
                self._hand_on(work, finished)
            told = {"reason": held.leaving, "left": left, "store": STORE}
            run_transaction(self.database, lambda session: leases.preempt(session, lease, **told))
            work.left = {image.index for image in left}
            telemetry.PREEMPTED.inc()
            log.info("job_preempted", attempt=lease.attempt, snapshots=len(left), after_s=round(time.monotonic() - started, 3))
        except LeaseLost:
            return  # its last image was finished meanwhile, or it was canceled
        except BaseException as error:  # noqa: BLE001
            self.verdicts.decide(held, error)

    def _drop(self, work: Work) -> None:
        """Stop the images at their next step and wait until they have: their last account is then complete, their slots free."""
        for handle in work.handles.values():
            handle.cancel()
        for handle in work.handles.values():
            with suppress(EngineError, TimeoutError):
                handle.result(DROP_WITHIN_S)
        log.info("render_dropped", attempt=work.held.lease.attempt)

    def _note_resumption(self, work: Work, earlier: Earlier) -> None:
        """Put on record what snapshots spared this attempt, and what it does again."""
        lost = {index: max(0, earlier.reached.get(index, 0) - step) for index, step in work.resumed.items()}
        told = {"resumed": work.resumed, "lost_steps": sum(lost.values())}
        cause = run_transaction(self.database, lambda session: leases.note_resumption(session, work.held.lease, **told))
        telemetry.STEPS_RESUMED.inc(sum(work.resumed.values()))
        if cause is not None:
            telemetry.STEPS_LOST.labels(cause).inc(sum(lost.values()))

    def _note_waste(self, work: Work) -> None:
        """Device time of images that were not handed on goes on the attempt's account; of a job that was canceled, on its tenant's.

        An image that was finished when its job was canceled is one of them, too.
        """
        spent = {index: handle.progress() for index, handle in work.handles.items() if index not in work.left | work.handed_on}
        wasted_s = sum(image.device_seconds for image in spent.values())
        if wasted_s:
            told = {"device_seconds": wasted_s, "steps_done": {index: image.step for index, image in spent.items()}}
            lease = work.held.lease
            persist(
                lambda: run_transaction(self.database, lambda session: leases.note_waste(session, lease, **told)), verdicts.DATABASE_AWAY
            )


def _rendering(job: Job, index: int, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """Name the parameters of one image as ImageRequest does; what is None is left to its defaults."""
    given = {param.engine_field: getattr(job, param.name) for param in PARAMS if param.engine_field is not None and param.picture is None}
    given["seed"] = job.seed + index
    given["determinism"] = Determinism(job.determinism)
    given["adapters"] = tuple(AdapterUse(**adapter) for adapter in job.adapters or ())
    return {**{field: value for field, value in given.items() if value is not None}, **pictures}


def _drained(work: Work) -> Iterator[FinishedImage]:
    """The images that were finished before they could be withdrawn."""
    while not work.endings.empty():
        if isinstance(event := work.endings.get(), Finished):
            yield event.image
