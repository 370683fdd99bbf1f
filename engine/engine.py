"""The engine: a queue of wishes in, finished images out, one thread that owns the device.

    engine = Engine(EngineConfig(device="cuda:0"), [CheckpointSpec(...)])
    engine.start()                                   # loads and warms up; weights stay until stop()
    image = engine.submit(ImageRequest(...)).result()

A turn of the loop does one piece of work that the scheduler chose: encode a newcomer, advance one batch by one denoise step, or decode
what is finished. Newcomers, cancels, snapshots and better ranks all take effect between two turns. Every other thread only leaves a
note and waits on a condition; no thread but the engine's own touches the device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from engine.conditioning import ConditioningCache
from engine.config import CheckpointSpec, EngineConfig
from engine.costs import CostModel
from engine.curves import load_curves
from engine.device import Device, is_out_of_memory
from engine.errors import (
    DeadlinePassed,
    EngineDied,
    EngineError,
    EngineStopped,
    ImageCanceled,
    OutOfDeviceMemory,
    SnapshotRefused,
    UnknownCheckpoint,
    UnsupportedRequest,
)
from engine.events import Event, Failed, Finished, Parked, Previewed, Queued, Resumed, Started, Stepped
from engine.families.contract import State
from engine.fingerprint import Fingerprint, fingerprint
from engine.handle import Handle, Progress
from engine.inflight import BatchKey, ImageState, InFlight
from engine.keptlatents import Kept, KeptLatents, check_fork, digest_of_latents
from engine.ledger import Ledger
from engine.loading import LoadedCheckpoint, load_checkpoint
from engine.previews import Pace, jpeg
from engine.records import FinishedImage, RenderRecord
from engine.request import ImageRequest
from engine.runner import Developing, Runner
from engine.scheduler import Batch, Decode, Encode, Scheduler
from engine.snapshots import Snapshot, check_fingerprint, from_bytes, request_digest, to_bytes
from engine.validation import check_integer, check_offered, check_rows, check_seconds, check_values
from engine.warmup import warm_up

__all__ = ["Engine", "Handle", "Progress"]

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]
Launched = TypeVar("Launched")
RUN_AHEAD = 1  # forwards launched beyond the one a GPU is busy with: enough to keep it fed, few enough to cancel soon
NOTHING_YET = State({})
MOST_FINGERPRINTS = 256  # remembered; strengths of adapters are anybody's numbers
PACE_MEMORY = 0.3  # weight of the newest step in an image's seconds per step


@dataclass(eq=False)
class _Open:
    """An image that has not ended: whom to tell of it, and how it comes to its latents."""

    image: InFlight
    handle: Handle
    on_event: OnEvent | None
    begin: Callable[[InFlight], None] | None  # None once it has begun
    waiting: State | None  # what a snapshot holds before that: nothing of a newcomer; None for a fork, which cannot be had again
    pace: Pace
    due_at: float  # on the monotonic clock; infinity: whenever it is done


class Engine:
    """Renders images of a few checkpoints on one device."""

    def __init__(self, config: EngineConfig, checkpoints: Sequence[CheckpointSpec]) -> None:
        self.config = config
        self.load_s = 0.0  # reading and verifying all checkpoints
        self.warm_up_s = 0.0
        self._specs = {spec.name: spec for spec in checkpoints}
        if len(self._specs) != len(checkpoints):
            raise ValueError("two checkpoints have one name")
        self._device = Device(config.device, num_threads=config.num_threads, attention=config.attention)
        self._cache = ConditioningCache(config.conditioning_cache_bytes)
        self._kept = KeptLatents(config.latent_cache_bytes)
        self.costs = CostModel()
        self._scheduler = Scheduler(
            self.costs,
            max_inflight=config.max_inflight,
            max_batch_rows=config.max_batch_rows,
            max_encodes_between_steps=config.max_encodes_between_steps,
            row_buckets=config.row_buckets,
            rank_shares=config.rank_shares,
            share_patience_s=config.share_patience_s,
            growth_ceiling=config.growth_ceiling,
            max_adapters=min((spec.adapter_slots for spec in checkpoints), default=1),
        )
        self._ledger = Ledger(self._scheduler.charge)
        self._checkpoints: dict[str, LoadedCheckpoint] = {}
        self._fingerprints: dict[tuple[str, int | None, str], Fingerprint] = {}
        self._device_facts: dict[str, Any] = {}
        self._runner = Runner(self._checkpoints, self._device, self._cache)
        self._outcomes: Counter[ImageState] = Counter()
        self._previews = 0
        self._parks = 0
        self._developing: deque[tuple[Decode, Developing]] = deque()  # decodes launched, in their order

        # Shared with other threads, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._arrivals: deque[InFlight] = deque()
        self._cancels: set[str] = set()
        self._notes: deque[Callable[[], None]] = deque()  # what else to do between two turns, on the engine's thread
        self._open: dict[str, _Open] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap of (due_at, image id); an image that has ended stays in it until then
        self._stopping = False
        self._accepting = False
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._start_problem: BaseException | None = None
        self._turn_began_at: float | None = None  # on the monotonic clock; None between two turns

    # --- from any thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the device thread; return when every checkpoint is loaded and warm. Raises what stopped it from getting there."""
        if self._thread is not None:
            raise RuntimeError("an engine is started once")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._start_problem is not None:
            self._thread.join()
            raise self._start_problem

    def stop(self) -> None:
        """Stop after the turn in progress; whatever is not finished fails with `EngineStopped`. Harmless when repeated."""
        with self._changed:
            self._stopping = True
            self._accepting = False
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Does it take requests?"""
        return self._accepting

    @property
    def turn_s(self) -> float:
        """Seconds that the turn in progress has taken; 0 between two turns. A turn that does not end is a device that hangs."""
        began_at = self._turn_began_at
        return time.monotonic() - began_at if began_at is not None else 0.0

    def submit(self, request: ImageRequest, on_event: OnEvent | None = None, *, within_s: float | None = None) -> Handle:
        """Take a request; it joins the running batch at the next step boundary, and fails at one if not finished `within_s` from now.

        Raises `UnsupportedRequest` (naming the field), `UnknownCheckpoint` or `EngineStopped` and takes nothing then. `on_event`
        is called from the engine's thread: it must be fast and never wait for an image; its exceptions are only logged.
        """
        image = self._admitted(request)
        if request.fork is None:
            return self._take_in(image, self._runner.start, on_event, within_s=within_s)
        kept = self._kept.find(request.owner, request.fork)
        digest = self._loaded(request.checkpoint).weights_digest
        check_fork(request, kept.request, digest, kept.weights_digest, kept.step)
        image.step, image.origin = kept.step, digest_of_latents(kept.latents)
        return self._take_in(image, partial(self._runner.fork, latents=kept.latents), on_event, waiting=None, within_s=within_s)

    def restore(
        self, blob: bytes, on_event: OnEvent | None = None, *, request: ImageRequest | None = None, within_s: float | None = None
    ) -> Handle:
        """Go on with an image from a snapshot, at its step and with the bits it would have had where it came from.

        request: the same wish under another id, group or rank.  within_s: as for `submit`, counted from now.  Raises as `submit`, and
        `SnapshotRefused` for a blob that is damaged, of another wish, or made where a bit could come out differently.
        """
        snapshot = from_bytes(blob)
        wanted = request or snapshot.request
        if request_digest(wanted) != request_digest(snapshot.request):
            raise SnapshotRefused("it is of another request")
        image = self._admitted(wanted)
        image.origin = snapshot.fingerprint_facts.get("fork", "")
        check_fingerprint(snapshot, self._fingerprint_of(image))
        if not snapshot.tensors:  # taken before the image had started
            return self._take_in(image, self._runner.start, on_event, within_s=within_s)
        image.step, image.num_steps = snapshot.step, snapshot.num_steps
        image.is_denoised = image.step >= image.num_steps
        state = State(snapshot.tensors, snapshot.facts)
        return self._take_in(image, partial(self._runner.restore, state=state), on_event, waiting=state, within_s=within_s)

    def fork(self, blob: bytes, request: ImageRequest, on_event: OnEvent | None = None) -> Handle:
        """Start a new wish from the latents of a snapshot: another prompt from that step on. Raises as `submit` and `restore`.

        The caller answers for both being of one owner.
        """
        snapshot = from_bytes(blob)
        image = self._admitted(request)
        if "latents" not in snapshot.tensors:
            raise SnapshotRefused("it holds no latents to start from")
        digest = self._loaded(request.checkpoint).weights_digest
        check_fork(request, snapshot.request, digest, snapshot.fingerprint_facts["weights"], snapshot.step)
        latents = snapshot.tensors["latents"]
        image.step, image.origin = snapshot.step, digest_of_latents(latents)
        return self._take_in(image, partial(self._runner.fork, latents=latents), on_event, waiting=None)

    def cancel(self, image_id: str) -> None:
        """Drop the image at the next step boundary. Harmless at any moment."""
        with self._changed:
            if image_id in self._open:
                self._cancels.add(image_id)
                self._changed.notify_all()

    def set_rank(self, image_id: str, rank: int) -> None:
        """Serve the image at this rank from the next step boundary on. Raises `UnsupportedRequest` for what is no integer."""
        check_integer("rank", rank)

        def note() -> None:
            self._scheduler.set_rank(image_id, rank)

        self._leave(note)

    def watch(self, image_id: str, watched: bool) -> None:
        """Send previews of the image from its next step on, or no more."""

        def note() -> None:
            image = self._scheduler.get(image_id)
            if image is not None:
                image.is_watched = watched

        self._leave(note)

    def snapshot(self, image_id: str) -> Future[bytes]:
        """A snapshot of the image at the next step boundary; the future raises `SnapshotRefused` when there is no such image by then."""
        return self._ask_for_snapshot(image_id, leaves=False)

    def withdraw(self, image_id: str) -> Future[bytes]:
        """As `snapshot`, but the image leaves in the same moment, as if canceled: no step of it is computed for nothing.

        When the future has its result, the image's end has been told. An image of which no snapshot can be made goes on.
        """
        return self._ask_for_snapshot(image_id, leaves=True)

    def _ask_for_snapshot(self, image_id: str, *, leaves: bool) -> Future[bytes]:
        wanted: Future[bytes] = Future()

        def note() -> None:
            if not wanted.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                blob = self._snapshot_of(image_id)
            except Exception as problem:  # noqa: BLE001  the asker's trouble, not the engine's
                wanted.set_exception(_in_our_words(problem, "snapshot"))
                return
            if leaves:
                image = self._open[image_id].image
                self._fail(image, _canceled(image))
            wanted.set_result(blob)

        if not self._leave(note):
            wanted.set_exception(EngineStopped("the engine is not running"))
        return wanted

    def fingerprint(self, checkpoint: str, bucket_rows: int | None = None) -> Fingerprint:
        """Everything besides a plain request that can change a bit of an image of this checkpoint; `.facts` and their `.sha256`."""
        return self._fingerprint(self._loaded(checkpoint), bucket_rows, [], None, "")

    def stats(self) -> dict[str, Any]:
        """Plain numbers since the start; a step counts once for the batch, an image step once per image in it."""
        ledger = self._ledger
        with self._changed:
            states = Counter(image.state for image in self._scheduler.in_order())
            arriving = len(self._arrivals)
        banks = [loaded.adapters for loaded in self._checkpoints.values() if loaded.adapters is not None]
        block_caches = [loaded.block_cache for loaded in self._checkpoints.values() if loaded.block_cache is not None]
        return {
            "inflight": states[ImageState.RUNNING] + states[ImageState.DENOISED],
            "parked": states[ImageState.PARKED],
            "parks": self._parks,
            "waiting": states[ImageState.QUEUED] + arriving,
            "finished": self._outcomes[ImageState.FINISHED],
            "failed": self._outcomes[ImageState.FAILED],
            "canceled": self._outcomes[ImageState.CANCELED],
            "steps": ledger.forwards,
            "image_steps": ledger.image_steps,
            "rows": ledger.used_rows,
            "padded_rows": ledger.padded_rows,
            "mean_rows_per_forward": ledger.used_rows / ledger.forwards if ledger.forwards else 0.0,
            "seconds_per_forward_by_rows": {rows: totals.mean_s for rows, totals in sorted(dict(ledger.by_rows).items())},
            "encode_s": ledger.encode_s,
            "forward_s": ledger.forward_s,
            "decode_s": ledger.decode_s,
            "seconds_by_rank": dict(sorted(dict(ledger.seconds_by_rank).items())),
            "previews": self._previews,
            "cache_hits": self._cache.hits,
            "cache_misses": self._cache.misses,
            "cache_bytes": self._cache.size_bytes,
            "latent_cache_hits": self._kept.hits,
            "latent_cache_misses": self._kept.misses,
            "latent_cache_bytes": self._kept.size_bytes,
            "adapter_hits": sum(bank.hits for bank in banks),
            "adapter_misses": sum(bank.misses for bank in banks),
            "adapter_bytes": sum(bank.size_bytes for bank in banks),
            "block_cache_rows_skipped": sum(cache.rows_skipped for cache in block_caches),
            "block_cache_rows_computed": sum(cache.rows_computed for cache in block_caches),
            "loads": len(self._checkpoints),
            "load_s": self.load_s,
            "warm_up_s": self.warm_up_s,
        }

    def _take_in(
        self,
        image: InFlight,
        begin: Callable[[InFlight], None],
        on_event: OnEvent | None,
        waiting: State | None = NOTHING_YET,
        within_s: float | None = None,
    ) -> Handle:
        handle, due_at = Handle(image, self), math.inf
        if within_s is not None:
            check_seconds("within_s", within_s)
            due_at = image.submitted_at + within_s
        with self._changed:
            if not self._accepting:
                raise EngineStopped("the engine is not running")
            if image.id in self._open:
                raise UnsupportedRequest("id", f"an image with id {image.id!r} is already in this engine")
            self._open[image.id] = _Open(image, handle, on_event, begin, waiting, Pace(self.config.previews_per_s), due_at)
            if within_s is not None:
                heappush(self._deadlines, (due_at, image.id))
            self._arrivals.append(image)
            self._changed.notify_all()
        return handle

    def _leave(self, note: Callable[[], None]) -> bool:
        """Have `note` called on the engine's thread between two turns; False when that thread takes no more of them."""
        with self._changed:
            if not self._accepting:
                return False
            self._notes.append(note)
            self._changed.notify_all()
        return True

    def _loaded(self, checkpoint: str) -> LoadedCheckpoint:
        if checkpoint not in self._checkpoints:
            raise UnknownCheckpoint(checkpoint, sorted(self._checkpoints))
        return self._checkpoints[checkpoint]

    def _admitted(self, request: ImageRequest) -> InFlight:
        if not self._accepting:
            raise EngineStopped("the engine is not running")
        return self._validated(request)

    def _validated(self, request: ImageRequest) -> InFlight:
        """Check every field a caller can get wrong, before anything is queued."""
        loaded = self._loaded(request.checkpoint)
        check_values(request)
        check_offered(request, loaded.spec)
        if loaded.adapters is not None:
            loaded.adapters.check(request.adapters)
        loaded.family.check(request)
        rows = loaded.family.rows(request)
        check_rows(request, rows, self.config.max_batch_rows)
        key = BatchKey(request.checkpoint, request.height_px, request.width_px, loaded.family.text_length(request))
        return InFlight(request=request, batch_key=key, rows=rows, submitted_at=time.monotonic())

    def _fingerprint_of(self, image: InFlight) -> Fingerprint:
        request, loaded = image.request, self._loaded(image.request.checkpoint)
        blocks = loaded.block_cache.facts() if loaded.block_cache is not None and request.block_cache else None
        return self._fingerprint(loaded, request.pinned_rows, loaded.adapter_facts(request), blocks, image.origin)

    def _fingerprint(
        self,
        loaded: LoadedCheckpoint,
        bucket_rows: int | None,
        adapters: list[dict[str, Any]],
        block_cache: dict[str, Any] | None,
        fork: str,
    ) -> Fingerprint:
        key = (loaded.spec.name, bucket_rows, repr((adapters, block_cache, fork)))
        known = self._fingerprints.get(key)
        if known is None:
            known = fingerprint(
                weights_digest=loaded.weights_digest,
                family=loaded.spec.family,
                precision=loaded.spec.precision,
                bucket_rows=bucket_rows,
                adapters=adapters,
                block_cache=block_cache,
                fork=fork,
                speed={name: getattr(loaded.spec, name) for name in ("channels_last", "compile_blocks", "cuda_graphs")},
                device_facts=self._device_facts,
                family_facts=loaded.family.facts(),
            )
            if len(self._fingerprints) >= MOST_FINGERPRINTS:
                self._fingerprints.clear()
            self._fingerprints[key] = known
        return known

    # --- on the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The device thread's life: load, warm up, turn until stopped, and leave nobody waiting."""
        try:
            self._prepare()
        except BaseException as problem:  # noqa: BLE001  start() raises it in the caller's thread
            self._start_problem = problem
            self._ready.set()
            return
        self._accepting = not self._stopping
        self._ready.set()
        last_word: Callable[[], EngineStopped] = partial(EngineStopped, "the engine was stopped")
        try:
            while self._wait_for_work():
                self._turn_began_at = time.monotonic()
                self._turn()
                self._turn_began_at = None
        except BaseException as problem:
            log.exception("engine_died")
            last_word = partial(EngineDied, f"the engine died: {problem!r}")
        finally:
            self._turn_began_at = None
            self._fail_everyone(last_word)

    def _prepare(self) -> None:
        """Load every checkpoint once and warm it up, so that the first caller does not pay for it and the curves are known."""
        self._device.prepare()
        self._device_facts = self._device.facts()
        for spec in self._specs.values():
            self._checkpoints[spec.name] = load_checkpoint(spec, self._device)
        self.load_s = sum(checkpoint.load_s for checkpoint in self._checkpoints.values())
        started = time.perf_counter()
        for spec in self._specs.values():
            if self.config.curves_folder:
                load_curves(self.costs, Path(self.config.curves_folder), spec.name, self.fingerprint(spec.name))
            warm_up(
                spec,
                validated=self._validated,
                runner=self._runner,
                device=self._device,
                costs=self.costs,
                max_batch_rows=self.config.max_batch_rows,
                row_buckets=self.config.row_buckets,
                repeats=self.config.warm_up_repeats,
            )
        self._scheduler.memory_budget_bytes = self._device.memory_budget_bytes()
        self.warm_up_s = time.perf_counter() - started

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do and take in what others left; False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._arrivals or self._cancels or self._notes or len(self._scheduler)):
                self._changed.wait()
            arrivals = list(self._arrivals)
            self._arrivals.clear()
            for image in arrivals:
                self._scheduler.add(image, time.monotonic())
            if self._stopping:
                return False
            leaving: dict[InFlight, EngineError] = {image: _too_late(image) for image in self._take_late()}
            leaving |= {image: _canceled(image) for image in map(self._scheduler.get, self._cancels) if image is not None}
            self._cancels.clear()
            notes = list(self._notes)
            self._notes.clear()
        for image in arrivals:
            self._tell(image, Queued(request_id=image.id))
        for image, error in leaving.items():
            self._fail(image, error)
        for note in notes:
            note()
        return True

    def _take_late(self) -> list[InFlight]:
        """The images whose deadline has passed. No deadline needs to wake this thread: it never sleeps while an image is here."""
        late, now = [], time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self._open.get(heappop(self._deadlines)[1])
            if entry is not None and entry.due_at <= now:  # not another of that id
                late.append(entry.image)
        return late

    def _turn(self) -> None:
        """Do the piece of work that the scheduler puts first."""
        self._finish_developed()
        work = self._scheduler.next_work(time.monotonic())
        for image in self._scheduler.take_parked():
            self._parks += 1
            self._tell(image, Parked(request_id=image.id, step=image.step))
        for image in self._scheduler.take_resumed():
            self._tell(image, Resumed(request_id=image.id, step=image.step))
        if isinstance(work, Encode):
            self._encode(work)
        elif isinstance(work, Batch):
            self._denoise(work)
        elif isinstance(work, Decode):
            self._decode(work)
        else:
            self._finish_developed(wait=True)  # nothing else is to do

    def _encode(self, work: Encode) -> None:
        image, entry = work.image, self._open[work.image.id]
        first_step, is_new = image.step, entry.begin == self._runner.start
        begin = entry.begin
        assert begin is not None, f"image {image.id} has begun already"

        def launch() -> None:
            self._runner.release(image)  # of a first try that ran out of memory
            begin(image)

        watch = self._device.stopwatch()
        try:
            self._with_room(launch)
            unread = self._runner.unread(image)
        except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
            self._fail(image, _in_our_words(problem, "encode"))
            return
        watch.stop()
        entry.begin = entry.waiting = None  # what it began with need not be kept
        image.state = ImageState.DENOISED if image.is_denoised else ImageState.RUNNING
        self._scheduler.settle(work)
        self._ledger.enter_encode(work, watch)
        if is_new:
            self._tell(image, Started(request_id=image.id, unread=unread))
        else:
            self._tell(image, Resumed(request_id=image.id, step=first_step, unread=unread))

    def _denoise(self, batch: Batch) -> None:
        """Move every image of the batch on by one step. An image that cannot be moved fails alone; the others do not notice."""
        watch = self._device.stopwatch()
        now = time.monotonic()
        for image in batch:
            image.first_step_at = image.first_step_at or now
        predictions = self._predict(batch)
        if predictions is None:
            if len(batch) > 1:  # somebody's row broke the forward for all: without the others it can only break its own
                for image in batch:
                    self._denoise(Batch.alone(image))
            return
        steps_before = [image.step for image in batch]
        for image, prediction in zip(batch, predictions, strict=True):
            try:
                self._runner.advance(image, prediction)
            except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
                self._fail(image, _in_our_words(problem, "denoise"))
        watch.stop()
        self._scheduler.settle(batch)
        self._ledger.enter_forward(batch, watch)
        self._ledger.book(RUN_AHEAD)
        for image, step_before in zip(batch, steps_before, strict=True):
            if image.id in self._scheduler and image.step > step_before:
                self._after_step(image)

    def _predict(self, batch: Batch) -> list[Any] | None:
        """Run the forward. None when it failed: an image that was alone in it has failed then, several are to be tried apart.

        The exception ends here, for its traceback would keep the failed forward's tensors while the images are tried apart.
        """
        try:
            if len(batch) == 1:
                return self._with_room(lambda: self._runner.predict(batch))
            return self._runner.predict(batch)
        except Exception as problem:
            if is_out_of_memory(problem):
                _forget_locals(problem)
                self._device.free_cached_memory()
                if not batch.is_pinned and len(batch) > 1:
                    self._scheduler.cap_rows(batch.key, batch.used_rows // 2)
            if len(batch) == 1:
                self._fail(batch.images[0], _in_our_words(problem, "denoise"))
            else:
                log.warning("forward_failed", extra={"images": len(batch), "rows": batch.bucket_rows}, exc_info=True)
            return None

    def _after_step(self, image: InFlight) -> None:
        """Tell of the step, keep its latents for a fork where that was asked for, show it where somebody watches."""
        now = time.monotonic()
        since = image.last_step_at or image.first_step_at or now
        newest = now - since
        known = image.seconds_per_step
        image.seconds_per_step = newest if known is None else known + PACE_MEMORY * (newest - known)
        image.last_step_at = now
        image.eta_s = (image.num_steps - image.step) * image.seconds_per_step + self._ledger.mean_decode_s
        self._tell(image, Stepped(request_id=image.id, step=image.step, num_steps=image.num_steps, eta_s=image.eta_s))
        if image.step in image.request.keep_steps:
            digest = self._checkpoints[image.request.checkpoint].weights_digest
            try:
                self._kept.keep(Kept(image.request, digest, image.step, self._runner.latents(image)))
            except Exception:  # a courtesy, too: the image goes on without
                log.exception("latents_not_kept", extra={"image_id": image.id})
        if image.is_watched and self._open[image.id].pace.may_show(now):
            self._show(image)

    def _show(self, image: InFlight) -> None:
        try:
            pixels = self._runner.preview(image)
            if pixels is not None:
                self._previews += 1
                self._tell(image, Previewed(request_id=image.id, step=image.step, jpeg=jpeg(pixels)))
        except Exception:  # a preview is a courtesy: the image goes on without
            log.exception("preview_failed", extra={"image_id": image.id})
            image.is_watched = False

    def _decode(self, work: Decode) -> None:
        """Launch a decode; on a CPU it is over then."""
        image = work.image
        with self._changed:
            if image.id in self._cancels:
                return  # before the next turn it is dropped; its decode would be for nobody
        try:
            developing = self._with_room(lambda: self._runner.decode(image))
        except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
            self._fail(image, _in_our_words(problem, "decode"))
            return
        self._scheduler.settle(work)
        self._developing.append((work, developing))
        self._finish_developed()

    def _with_room(self, launch: Callable[[], Launched]) -> Launched:
        """Do `launch`, and once more when the device is out of memory, after all that can be given back has been."""
        try:
            return launch()
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            _forget_locals(problem)
        self._finish_developed(wait=True)
        self._device.free_cached_memory()
        return launch()

    def _finish_developed(self, wait: bool = False) -> None:
        """Hand out the images whose pixels have arrived; with `wait`, all that are on their way."""
        while self._developing and (wait or self._developing[0][1].is_ready):
            work, developing = self._developing.popleft()
            image = work.image
            if self._scheduler.get(image.id) is not image:
                continue  # canceled meanwhile
            try:
                pixels = developing.pixels()
            except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
                self._fail(image, _in_our_words(problem, "decode"))
                continue
            self._ledger.book_decode(work, developing.watch.seconds())
            finished = FinishedImage(request=image.request, pixels=pixels, record=self._record(image))
            self._close(image, ImageState.FINISHED, finished)

    def _snapshot_of(self, image_id: str) -> bytes:
        image = self._scheduler.get(image_id)
        if image is None:
            raise SnapshotRefused(f"image {image_id} is not (or no longer) in this engine")
        bits = self._fingerprint_of(image)
        state = self._open[image_id].waiting if image.state is ImageState.QUEUED else self._runner.save(image)
        if state is None:
            raise SnapshotRefused(f"image {image_id} is a fork that has not started yet")
        return to_bytes(
            Snapshot(
                request=image.request,
                family=self._specs[image.request.checkpoint].family,
                fingerprint=bits.sha256,
                fingerprint_facts=bits.facts,
                step=image.step,
                num_steps=image.num_steps,
                tensors=state.tensors,
                facts=state.facts,
            )
        )

    def _record(self, image: InFlight) -> RenderRecord:
        account = image.account
        bits = self._fingerprint_of(image)
        return RenderRecord(
            num_steps=image.num_steps,
            device_seconds=account.device_seconds,
            encode_s=account.encode_s,
            denoise_s=account.denoise_s,
            decode_s=account.decode_s,
            waited_s=(image.first_step_at or image.submitted_at) - image.submitted_at,
            forwards=account.forwards,
            shared_forwards=account.shared_forwards,
            max_rows=account.max_rows,
            max_images=account.max_images,
            mean_rows=account.rows_total / account.forwards if account.forwards else 0.0,
            bucket_rows=image.request.pinned_rows,
            fingerprint=bits.sha256,
            fingerprint_facts=deepcopy(bits.facts),
        )

    def _fail(self, image: InFlight, error: EngineError) -> None:
        state = ImageState.CANCELED if isinstance(error, ImageCanceled) else ImageState.FAILED
        if state is ImageState.FAILED and not isinstance(error, EngineStopped):
            log.warning("image_failed", extra={"image_id": image.id, "step": image.step}, exc_info=error)
        self._close(image, state, error)

    def _close(self, image: InFlight, state: ImageState, outcome: FinishedImage | EngineError) -> None:
        """The image's end, whatever it is: off the device, its last event told, its handle resolved."""
        image.state = state
        image.eta_s = 0.0 if state is ImageState.FINISHED else None
        try:
            self._runner.release(image)
        except Exception:  # whoever waits for the image must hear of its end all the same
            log.exception("release_failed", extra={"image_id": image.id})
        self._outcomes[state] += 1
        if isinstance(outcome, FinishedImage):
            self._tell(image, Finished(request_id=image.id, image=outcome))
        else:
            self._tell(image, Failed(request_id=image.id, error=outcome))
        with self._changed:
            self._scheduler.remove(image.id)
            self._cancels.discard(image.id)
            self._open.pop(image.id).handle.resolve(outcome)  # before its id is free for another

    def _tell(self, image: InFlight, event: Event) -> None:
        on_event = self._open[image.id].on_event
        if on_event is None:
            return
        try:
            on_event(event)
        except Exception:
            log.exception("on_event_failed", extra={"image_id": image.id, "event_type": type(event).__name__})

    def _fail_everyone(self, last_word: Callable[[], EngineStopped]) -> None:
        with self._changed:
            self._accepting = False
            left = [entry.image for entry in self._open.values()]  # not the scheduler's word: its books may be what broke
            self._arrivals.clear()
            notes = list(self._notes)
            self._notes.clear()
        for image in left:
            self._fail(image, last_word())
        for note in notes:
            note()


def _forget_locals(problem: Exception) -> None:
    """Let go of what the frames of a traceback hold: the tensors of a failed forward, which would live as long as the error."""
    traceback.clear_frames(problem.__traceback__)


def _canceled(image: InFlight) -> ImageCanceled:
    return ImageCanceled(f"image {image.id} was canceled at step {image.step} of {image.num_steps}")


def _too_late(image: InFlight) -> DeadlinePassed:
    return DeadlinePassed(f"the time of image {image.id} was up at step {image.step} of {image.num_steps}")


def _in_our_words(problem: Exception, stage: str) -> EngineError:
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
