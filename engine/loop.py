"""The device thread: schedule, denoise, settle, decode, over and over.

A turn does one piece of work that the scheduler chose: encode a newcomer, advance one batch by one
denoise step, or decode what is finished. What callers leave in the inbox (newcomers, cancels,
snapshots, better ranks) takes effect between two turns. No other thread touches the device. It does
not know who submitted what, nor why one rank goes before another.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from engine.checkpoints import LoadedCheckpoints
from engine.conditioning import ConditioningCache
from engine.config import CheckpointSpec, EngineConfig
from engine.costs import CostModel
from engine.curves import load_curves
from engine.device import Device, Stopwatch, is_out_of_memory
from engine.errors import (
    DeadlinePassed,
    DeviceLost,
    EngineDied,
    EngineError,
    EngineStopped,
    ImageCanceled,
    OutOfDeviceMemory,
    SnapshotRefused,
    UnknownCheckpoint,
)
from engine.events import (
    EngineEvent,
    Failed,
    Finished,
    Parked,
    Previewed,
    Queued,
    Resumed,
    Started,
    Stepped,
)
from engine.fetches import Fetches
from engine.hostcopies import HostCopies
from engine.inbox import Inbox
from engine.inflight import InFlight, RenderState
from engine.keptlatents import KeptLatents, StepLatents
from engine.ledger import Ledger
from engine.loading import LoadedCheckpoint
from engine.loads import Loads
from engine.previews import jpeg
from engine.records import FinishedImage, render_record
from engine.runner import PendingDecode, Runner
from engine.scheduler import Batch, Decode, Encode, Scheduler, Work
from engine.sidethread import LoadPace
from engine.snapshots import Snapshot, to_bytes
from engine.walltime import IDLE, LOADS, TURNS, WallTime
from engine.warmup import warm_up

log = logging.getLogger(__name__)

Launched = TypeVar("Launched")
# Forwards launched beyond the one a GPU is busy with: it stays fed, and a cancel is soon.
RUN_AHEAD = 1
HASH_THREADS = min(4, os.cpu_count() or 1)  # while nothing is rendered yet
ENDED = frozenset({RenderState.FINISHED, RenderState.FAILED, RenderState.CANCELED})


class DeviceLoop:
    """What happens on the device thread, from loading to the last image's end."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        device: Device,
        checkpoints: LoadedCheckpoints,
        runner: Runner,
        scheduler: Scheduler,
        costs: CostModel,
        ledger: Ledger,
        kept_latents: KeptLatents,
        conditioning: ConditioningCache,
        inbox: Inbox,
    ) -> None:
        self.warm_up_s = 0.0
        self._config = config
        self._device = device
        self._checkpoints = checkpoints
        self._runner = runner
        self._scheduler = scheduler
        self._costs = costs
        self._ledger = ledger
        self._kept_latents = kept_latents
        self._conditioning = conditioning
        self._inbox = inbox
        self._pace = LoadPace()
        self._wall = WallTime()
        self.loads = Loads(
            checkpoints=checkpoints,
            device=device,
            inbox=inbox,
            pace=self._pace,
            warm_up=partial(self._warm_up, is_brief=True),
            on_change=self._note_change,
            forget=self._forget,
            working_bytes=self._working_bytes,
            copies=HostCopies(config.host_copy_bytes),
        )
        self._memory_bytes: int | None = None  # of the device; None: nobody divides it
        self._refusals = 0  # of memory, that were told
        self._recordings = 0  # of forwards, whose memory is spoken for
        self._pending_decodes: deque[tuple[Decode, PendingDecode]] = deque()  # as launched
        self._fetches = Fetches()  # of previews and latents to keep
        self._telling = threading.RLock()  # one event at a time, whichever thread tells it
        self.is_compiling = False  # a piece of a warm-up in which blocks may be compiled
        self._turn_began_at: float | None = None  # on the monotonic clock; None between two turns
        self.is_device_lost = False
        self._outcomes: Counter[RenderState] = Counter()
        self._previews = 0
        self._parks = 0

    # --- read by any thread ---

    @property
    def turn_s(self) -> float:
        """Return the seconds that the turn in progress has taken; 0 between two turns.

        What callers ask for belongs to the turn before which it is done, as a snapshot does; a
        piece of a warm-up and an unload to the turn that they follow. Before the first turn each
        piece of a warm-up is one.
        """
        began_at = self._turn_began_at
        return time.monotonic() - began_at if began_at is not None else 0.0

    @property
    def load_silent_s(self) -> float:
        """Return the seconds since a load beside the turns last moved; 0 without one."""
        return self._pace.silent_s

    def stats(self) -> dict[str, Any]:
        """Return plain numbers since the start: how images ended, and the other events they had."""
        return {
            "finished": self._outcomes[RenderState.FINISHED],
            "failed": self._outcomes[RenderState.FAILED],
            "canceled": self._outcomes[RenderState.CANCELED],
            "parks": self._parks,
            "previews": self._previews,
            "warm_up_s": self.warm_up_s,
            **{f"{doing}_s": seconds for doing, seconds in self._wall.seconds().items()},
        }

    # --- the thread's life ---

    def prepare(self) -> None:
        """Load every checkpoint and warm it up, so that the first caller does not pay for it."""
        try:
            self._prepare()
        except DeviceLost:
            self.is_device_lost = True
            raise
        finally:
            self._turn_began_at = None

    def _prepare(self) -> None:
        self._turn_began_at = time.monotonic()
        self._device.prepare()
        self._turn_began_at = None
        self._checkpoints.prepare(self._device)
        specs = self._checkpoints.specs
        for name, spec in specs.items():
            with self._checkpoints.may_fail(name, self._device):
                loaded = self._checkpoints.read(
                    spec, self._device, pace=self._pace.kept, hash_threads=HASH_THREADS
                )
                self._checkpoints.add(loaded)
        self._checkpoints.check_any_is_loaded()
        started = time.perf_counter()
        for name in tuple(self._checkpoints.held):
            with self._checkpoints.may_fail(name, self._device):
                self._turn_began_at = time.monotonic()
                for _ in self._warm_up(specs[name]):
                    self._turn_began_at = time.monotonic()
                self._checkpoints.serve(name)
        self._checkpoints.check_any_is_loaded()
        self._memory_bytes = self._device.memory_budget_bytes()
        self._note_change()
        self.warm_up_s = time.perf_counter() - started

    def _warm_up(self, spec: CheckpointSpec, *, is_brief: bool = False) -> Iterator[None]:
        """Iterate over the pieces of a checkpoint's warm-up."""
        if self._config.curves_folder:
            bits = self._checkpoints.fingerprint(spec.name)
            load_curves(self._costs, Path(self._config.curves_folder), spec.name, bits)
        pieces = warm_up(
            spec,
            validated=self._checkpoints.admit_before_service,
            runner=self._runner,
            device=self._device,
            costs=self._costs,
            max_batch_rows=self._config.max_batch_rows,
            row_buckets=self._config.buckets,
            repeats=self._config.warm_up_repeats,
            weights_bytes=self._checkpoints.weights_bytes,
            is_brief=is_brief,
        )
        try:
            self.is_compiling = spec.compile_blocks
            for _ in pieces:
                self.is_compiling = False
                yield
                self.is_compiling = spec.compile_blocks
        finally:
            self.is_compiling = False

    def _forget(self, gone: LoadedCheckpoint) -> None:
        """Drop all that was measured and remembered of a checkpoint."""
        name = gone.spec.name
        self._scheduler.forget(name)
        self._costs.forget(name)
        self._conditioning.forget(gone.conditioning_prefix)
        self._kept_latents.forget(gone.weights_digest)

    def _note_change(self) -> None:
        """Go by the checkpoints that are held now."""
        self._runner.keep_only(self._checkpoints.held)
        held = self._checkpoints.held.values()
        self._scheduler.max_adapters = min((one.spec.adapter_slots for one in held), default=1)
        self._recordings = self._device.recordings
        if self._memory_bytes is not None:
            room_bytes = max(self._checkpoints.weights_bytes, self._config.weights_room_bytes)
            kept_bytes = self._device.recorded_bytes() + self._thread_bytes()
            self._scheduler.memory_budget_bytes = self._memory_bytes - room_bytes - kept_bytes

    def _thread_bytes(self) -> int:
        """Return what the threads of images whose pipelines are called keep of the memory."""
        held = self._checkpoints.held.values()
        if all(one.family.follows_stream for one in held):
            return 0
        return self._config.max_inflight * self._device.thread_bytes()

    def _working_bytes(self) -> int:
        """Return what a load leaves free for images; those leave room for it, where that is set."""
        return 0 if self._config.weights_room_bytes else self._costs.working_bytes()

    def run(self) -> None:
        """Take turns until it is time to stop, and leave nobody waiting."""
        why = "the engine was stopped"
        shutdown_error: Callable[[], EngineStopped] = partial(EngineStopped, why)
        try:
            while self._take_in():
                self._pace.begin_turn()
                self._turn()
                self._pace.end_turn()
                self._wall.begin(LOADS)
                self.loads.go_on(is_busy=len(self._scheduler) > 0)
                self._turn_began_at = None
        except BaseException as problem:
            log.exception("engine_died")
            shutdown_error = partial(EngineDied, f"the engine died: {problem!r}")
            self.is_device_lost = self._device.is_lost()
            if self.is_device_lost:
                shutdown_error = partial(DeviceLost, f"the device was lost: {problem!r}")
        finally:
            self._turn_began_at = None
            self._wall.begin(None)
            self._pace.end_turn()
            self._fail_everyone(shutdown_error)
            self._fetches.close()
            self.loads.close()

    def _take_in(self) -> bool:
        """Wait for work and do what callers asked for; False when it is time to stop."""
        self._wall.begin(IDLE)
        taken = self._inbox.take(may_wait=not self.loads.has_warm_up)
        self._wall.begin(TURNS)
        if taken is None:
            return False
        self._turn_began_at = time.monotonic()
        for image in taken.arrivals:
            self._tell(image, Queued(request_id=image.id))
        leaving: dict[InFlight, EngineError] = {
            image: self._unknown(image)
            for image in taken.arrivals
            if image.request.checkpoint not in self._checkpoints.held  # it went meanwhile
        }
        leaving |= {image: _too_late(image) for image in taken.late}
        leaving |= {image: _canceled(image) for image in taken.canceled}
        for image, error in leaving.items():
            self._fail(image, error)
        for note in taken.notes:
            note()
        return True

    def _turn(self) -> None:
        """Do the piece of work that the scheduler puts first."""
        self._collect_decoded()
        work = self._schedule()
        if isinstance(work, Encode):
            self._encode(work)
        elif isinstance(work, Batch):
            self._denoise(work)
        elif isinstance(work, Decode):
            self._decode(work)
        else:
            self._collect_decoded(wait=True)  # nothing else is to do

    # --- schedule ---

    def _schedule(self) -> Work | None:
        """Choose what comes next, and tell those who lost or regained their seat by that."""
        work = self._scheduler.next_work(time.monotonic())
        for image in self._scheduler.take_parked():
            self._parks += 1
            self._tell(image, Parked(request_id=image.id, step=image.step))
        for image in self._scheduler.take_resumed():
            self._tell(image, Resumed(request_id=image.id, step=image.step))
        return work

    # --- encode ---

    def _encode(self, work: Encode) -> None:
        """Give an image its conditioning, its sampler and the latents that it begins with."""
        image = work.image
        entry = self._inbox[image.id]
        begin = entry.begin
        assert begin is not None, f"image {image.id} has begun already"
        first_step = image.step
        watch = self._device.stopwatch()
        try:
            self._with_room(lambda: self._begin(image, begin))
            texts = self._runner.read_texts(image)
        except Exception as problem:  # noqa: BLE001  not its neighbours' trouble
            self._fail(image, self._error_of_image(problem, "encode"))
            return
        watch.stop()
        entry.begin = entry.unstarted = None  # what it began with need not be kept
        image.prompt = texts.prompt
        image.state = RenderState.DENOISED if image.is_denoised else RenderState.RUNNING
        self._scheduler.settle(work)
        self._ledger.enter_encode(work, watch)
        if entry.is_new:
            self._tell(image, Started(request_id=image.id, unread=texts.unread))
        else:
            told = Resumed(request_id=image.id, step=first_step, unread=texts.unread)
            self._tell(image, told)

    def _begin(self, image: InFlight, begin: Callable[[InFlight], None]) -> None:
        self._runner.release(image)  # of a first try that ran out of memory
        begin(image)

    # --- denoise ---

    def _denoise(self, batch: Batch) -> None:
        """Move every image of the batch on by one step.

        An image that cannot be moved fails alone; the others do not notice.
        """
        watch = self._device.stopwatch()
        now = time.monotonic()
        for image in batch:
            image.first_step_at = image.first_step_at or now
        predictions = self._predict(batch)
        if predictions is None:
            self._denoise_apart(batch)
            return
        parts = zip(batch, predictions, strict=True)
        moved = [image for image, part in parts if self._advance(image, part)]
        watch.stop()
        self._settle(batch, watch)
        for image in moved:
            self._after_step(image)

    def _denoise_apart(self, batch: Batch) -> None:
        """Move each image on by itself after a forward of all failed.

        Somebody's row broke it for all; without the others it can only break its own.
        """
        if len(batch) > 1:
            for image in batch:
                self._denoise(Batch.alone(image))

    def _predict(self, batch: Batch) -> list[Any] | None:
        """Run the forward. None when it failed: an image that was alone in it has failed then.

        The exception ends here, for its traceback would keep the failed forward's tensors while the
        images are tried apart.
        """
        try:
            if len(batch) == 1:
                return self._with_room(lambda: self._runner.predict(batch))
            return self._runner.predict(batch)
        except Exception as problem:
            self._free_after(problem)
            if is_out_of_memory(problem) and not batch.is_pinned and len(batch) > 1:
                self._scheduler.cap_rows(batch.key, batch.used_rows // 2)
            if len(batch) == 1:
                self._fail(batch.images[0], self._error_of_image(problem, "denoise"))
            else:
                self._raise_if_device_is_lost(problem)
                found = {"images": len(batch), "rows": batch.bucket_rows}
                log.warning("forward_failed", extra=found, exc_info=True)
            return None

    def _advance(self, image: InFlight, prediction: Any) -> bool:
        """Move one image on by its part of the prediction; False when it failed."""
        step_before = image.step
        try:
            self._runner.advance(image, prediction)
        except Exception as problem:  # noqa: BLE001  not its neighbours' trouble
            self._fail(image, self._error_of_image(problem, "denoise"))
            return False
        return image.step > step_before

    # --- settle ---

    def _settle(self, batch: Batch, watch: Stopwatch) -> None:
        """Count the step for the batch's images, and its seconds once the device passed them."""
        self._scheduler.settle(batch)
        if self._device.recordings != self._recordings:
            self._note_change()  # a forward was recorded, and keeps its memory
        is_beside_decode = bool(self._pending_decodes)
        self._ledger.enter_forward(batch, watch, is_beside_decode=is_beside_decode)
        self._ledger.book(RUN_AHEAD)

    def _after_step(self, image: InFlight) -> None:
        """Tell of the step, keep its latents where asked for, show it where somebody watches."""
        now = time.monotonic()
        image.note_step(now, decode_s=self._ledger.mean_decode_s)
        stepped = Stepped(
            request_id=image.id,
            step=image.step,
            num_steps=image.num_steps,
            eta_s=image.eta_s,
        )
        self._tell(image, stepped)
        if image.step in image.request.keep_steps:
            self._keep_latents(image)
        if image.is_watched and self._inbox[image.id].pace.may_show(now):
            self._show(image)

    def _keep_latents(self, image: InFlight) -> None:
        """Launch a copy of the image's latents, which are kept once they have arrived."""
        digest = self._checkpoints[image.request.checkpoint].weights_digest
        told = partial(StepLatents, image.request, digest, image.step)
        try:
            fetched = self._runner.latents(image)
            self._fetches.add(
                image.id, fetched, lambda latents: self._kept_latents.keep(told(latents))
            )
        except Exception as problem:  # a courtesy: the image goes on without
            log.exception("latents_not_kept", extra={"image_id": image.id})
            self._free_after(problem)

    def _show(self, image: InFlight) -> None:
        """Launch a preview, which is packed and told of once it has arrived."""
        try:
            fetched = self._runner.preview(image)
            if fetched is not None:
                tell = partial(self._tell_preview, image, image.step)
                self._fetches.add(image.id, fetched, tell)
        except Exception as problem:  # a courtesy, too
            log.exception("preview_failed", extra={"image_id": image.id})
            self._free_after(problem)
            image.is_watched = False

    def _tell_preview(self, image: InFlight, step: int, pixels: Tensor) -> None:
        """Pack a preview and tell of it, unless the image has ended. Not on the device thread."""
        packed = jpeg(pixels.numpy())
        with self._telling:
            if image.state not in ENDED:
                self._previews += 1
                self._tell(image, Previewed(request_id=image.id, step=step, jpeg=packed))

    # --- decode ---

    def _decode(self, work: Decode) -> None:
        """Launch a decode; on a CPU it is over then."""
        image = work.image
        if self._inbox.is_canceled(image.id):
            return  # dropped before the next turn: its decode would be for nobody
        try:
            pending = self._with_room(lambda: self._runner.decode(image))
        except Exception as problem:  # noqa: BLE001  not its neighbours' trouble
            self._fail(image, self._error_of_image(problem, "decode"))
            return
        self._scheduler.settle(work)
        self._pending_decodes.append((work, pending))
        self._collect_decoded()

    def _collect_decoded(self, wait: bool = False) -> None:
        """Hand out the images whose pixels have arrived; with `wait`, all that are on their way."""
        while self._pending_decodes and (wait or self._pending_decodes[0][1].is_ready):
            work, pending = self._pending_decodes.popleft()
            if self._scheduler.get(work.image.id) is work.image:  # not canceled meanwhile
                self._finish(work, pending)

    def _finish(self, work: Decode, pending: PendingDecode) -> None:
        image = work.image
        try:
            pixels = pending.pixels()
        except Exception as problem:  # noqa: BLE001  not its neighbours' trouble
            self._fail(image, self._error_of_image(problem, "decode"))
            return
        self._ledger.book_decode(work, pending.watch.span())
        self._fetches.finish(image.id)  # the device has passed them all
        record = render_record(image, self._checkpoints.fingerprint_of(image))
        finished = FinishedImage(request=image.request, pixels=pixels, record=record)
        self._close(image, RenderState.FINISHED, finished)
        self._tell_refusals()

    def _tell_refusals(self) -> None:
        """Log that memory was refused since the last image.

        No error need have come of it, but kernels with other bits may have been taken for good.
        """
        refusals = self._device.refusals()
        if refusals > self._refusals:
            log.warning("device_memory_refused", extra={"times": refusals - self._refusals})
        self._refusals = refusals

    def _with_room(self, launch: Callable[[], Launched]) -> Launched:
        """Do `launch`, and once more when the device is out of memory, having freed all it can."""
        try:
            return launch()
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            _forget_locals(problem)
        self._collect_decoded(wait=True)
        self._device.free_cached_memory()
        return launch()

    # --- between two turns, as notes of the inbox ---

    def set_rank(self, image_id: str, rank: int) -> None:
        """Serve the image at this rank from now on. Harmless when it is not here."""
        self._scheduler.set_rank(image_id, rank)

    def watch(self, image_id: str, watched: bool) -> None:
        """Send previews of the image from its next step on, or no more."""
        image = self._scheduler.get(image_id)
        if image is not None:
            image.is_watched = watched

    def answer_snapshot(self, image_id: str, wanted: Future[bytes], *, leaves: bool) -> None:
        """Resolve `wanted` with a snapshot of the image; where it `leaves`, end it just before."""
        if not wanted.set_running_or_notify_cancel():
            return  # nobody waits for it any more
        try:
            blob = self._snapshot_of(image_id)
        except Exception as problem:  # noqa: BLE001  the asker's trouble, not the engine's
            self._free_after(problem)
            wanted.set_exception(_as_engine_error(problem, "snapshot"))
            return
        if leaves:
            image = self._inbox[image_id].image
            self._fail(image, _canceled(image))
        wanted.set_result(blob)

    def _snapshot_of(self, image_id: str) -> bytes:
        image = self._scheduler.get(image_id)
        if image is None:
            raise SnapshotRefused(f"image {image_id} is not (or no longer) in this engine")
        bits = self._checkpoints.fingerprint_of(image)
        is_queued = image.state is RenderState.QUEUED
        state = self._inbox[image_id].unstarted if is_queued else self._runner.save(image)
        if state is None:
            raise SnapshotRefused(f"image {image_id} is a fork that has not started yet")
        return to_bytes(
            Snapshot(
                request=image.request,
                family=self._checkpoints[image.request.checkpoint].spec.family,
                fingerprint=bits.sha256,
                fingerprint_facts=bits.facts,
                step=image.step,
                num_steps=image.num_steps,
                tensors=state.tensors,
                facts=state.facts,
            )
        )

    def end_images_of(self, checkpoint: str) -> None:
        """End the images of a checkpoint: another worker can render them."""
        for image in self._inbox.open_images_of(checkpoint):
            self._fail(image, self._unknown(image))

    # --- an image's end ---

    def _error_of_image(self, problem: Exception, stage: str) -> EngineError:
        """Return what the image fails of; raise `problem` where the device is lost, which ends all.

        No image is to blame for that.
        """
        self._raise_if_device_is_lost(problem)
        error = _as_engine_error(problem, stage)
        self._free_after(problem)
        return error

    def _free_after(self, problem: Exception) -> None:
        """Free what can be if the device was out of memory.

        What comes next may be pinned to its bits, and short of memory kernels are others.
        """
        if is_out_of_memory(problem):
            _forget_locals(problem)
            self._device.free_cached_memory()

    def _raise_if_device_is_lost(self, problem: Exception) -> None:
        """Raise `problem` anew if nothing will work on the device any more."""
        if not isinstance(problem, EngineError) and self._device.is_lost():
            raise problem

    def _unknown(self, image: InFlight) -> UnknownCheckpoint:
        return UnknownCheckpoint(image.request.checkpoint, sorted(self._checkpoints))

    def _fail(self, image: InFlight, error: EngineError) -> None:
        state = RenderState.CANCELED if isinstance(error, ImageCanceled) else RenderState.FAILED
        if state is RenderState.FAILED and not isinstance(error, EngineStopped):
            where = {"image_id": image.id, "step": image.step}
            log.warning("image_failed", extra=where, exc_info=error)
        self._close(image, state, error)

    def _close(
        self,
        image: InFlight,
        state: RenderState,
        outcome: FinishedImage | EngineError,
    ) -> None:
        """End the image: off the device, its last event told, its handle resolved."""
        image.state = state
        image.eta_s = 0.0 if state is RenderState.FINISHED else None
        self._fetches.forget(image.id)
        try:
            self._runner.release(image)
        except Exception:  # whoever waits for the image must hear of its end all the same
            log.exception("release_failed", extra={"image_id": image.id})
        self._outcomes[state] += 1
        if isinstance(outcome, FinishedImage):
            self._tell(image, Finished(request_id=image.id, image=outcome))
        else:
            self._tell(image, Failed(request_id=image.id, error=outcome))
        self._inbox.resolve(image.id, outcome)

    def _tell(self, image: InFlight, event: EngineEvent) -> None:
        on_event = self._inbox[image.id].on_event
        if on_event is None:
            return
        try:
            with self._telling:
                on_event(event)
        except Exception:
            what = {"image_id": image.id, "event_type": type(event).__name__}
            log.exception("on_event_failed", extra=what)

    def _fail_everyone(self, shutdown_error: Callable[[], EngineStopped]) -> None:
        left, notes = self._inbox.shut()
        for image in left:
            self._fail(image, shutdown_error())
        for note in notes:
            try:
                note()
            except Exception:  # such as a load's that found the device lost, too; the others wait
                log.exception("note_failed_at_the_end")


def _forget_locals(problem: Exception) -> None:
    """Let go of what the frames of a traceback hold: the tensors of a failed forward."""
    traceback.clear_frames(problem.__traceback__)


def _canceled(image: InFlight) -> ImageCanceled:
    return ImageCanceled(f"image {image.id} was canceled at step {image.step} of {image.num_steps}")


def _too_late(image: InFlight) -> DeadlinePassed:
    at = f"at step {image.step} of {image.num_steps}"
    return DeadlinePassed(f"the time of image {image.id} was up {at}")


def _as_engine_error(problem: Exception, stage: str) -> EngineError:
    """Turn whatever was raised into an error of our tree, the original attached as its cause."""
    if isinstance(problem, EngineError):
        return problem
    _forget_locals(problem)
    error: EngineError
    if is_out_of_memory(problem):
        error = OutOfDeviceMemory(f"the device ran out of memory in {stage}")
    else:
        error = EngineError(f"{stage} failed: {type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error
