"""The engine: a queue of wishes in, finished images out, one thread that owns the device.

    engine = Engine(EngineConfig(device="cuda:0"), [CheckpointSpec(...)])
    engine.start()                                   # loads and warms up; weights stay until stop()
    image = engine.submit(ImageRequest(...)).result()

A turn of the loop is: let newcomers in, encode their prompts, advance one batch by one denoise step, settle it, decode what it
finished. Newcomers, cancels and better ranks all take effect between two turns. Every other thread only leaves a note and waits on
a condition; no thread but the engine's own calls torch.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.conditioning import ConditioningCache
from engine.config import CheckpointSpec, EngineConfig
from engine.device import Device, is_out_of_memory
from engine.errors import EngineError, EngineStopped, ImageCanceled, OutOfDeviceMemory, UnknownCheckpoint, UnsupportedRequest
from engine.events import Event, Failed, Finished, Queued, Started, Stepped
from engine.fingerprint import Fingerprint, fingerprint
from engine.handle import Handle, Progress
from engine.inflight import BatchKey, ImageState, InFlight
from engine.ledger import Ledger
from engine.loading import LoadedCheckpoint, load_checkpoint
from engine.records import FinishedImage, RenderRecord
from engine.request import Determinism, ImageRequest
from engine.runner import Runner
from engine.scheduler import Batch, Scheduler

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine", "Handle", "Progress"]

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]
RUN_AHEAD = 1  # forwards launched beyond the one a GPU is busy with: enough to keep it fed, few enough to cancel soon
PACE_MEMORY = 0.3  # weight of the newest step in an image's seconds per step


class Engine:
    """Renders images of a few checkpoints on one device."""

    def __init__(self, config: EngineConfig, checkpoints: Sequence[CheckpointSpec]) -> None:
        self.config = config
        self.load_s = 0.0  # reading and verifying all checkpoints
        self.warm_up_s = 0.0
        self._specs = {spec.name: spec for spec in checkpoints}
        if len(self._specs) != len(checkpoints):
            raise ValueError("two checkpoints have one name")
        self._device = Device(config.device, num_threads=config.num_threads)
        self._cache = ConditioningCache(config.conditioning_cache_bytes)
        self._scheduler = Scheduler(max_inflight=config.max_inflight, max_batch_rows=config.max_batch_rows)
        self._ledger = Ledger()
        self._checkpoints: dict[str, LoadedCheckpoint] = {}
        self._fingerprints: dict[tuple[str, int | None], Fingerprint] = {}
        self._device_facts: dict[str, Any] = {}
        self._runner = Runner(self._checkpoints, self._device, self._cache)
        self._outcomes: Counter[ImageState] = Counter()

        # Shared with other threads, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._arrivals: deque[InFlight] = deque()
        self._cancels: set[str] = set()
        self._open: dict[str, tuple[Handle, OnEvent | None]] = {}
        self._stopping = False
        self._accepting = False
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._start_problem: BaseException | None = None

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

    def submit(self, request: ImageRequest, on_event: OnEvent | None = None) -> Handle:
        """Take a request; it joins the running batch at the next step boundary.

        Raises `UnsupportedRequest` (naming the field), `UnknownCheckpoint` or `EngineStopped` and takes nothing then. `on_event`
        is called from the engine's thread: it must be fast and never wait for an image; its exceptions are only logged.
        """
        if not self._accepting:
            raise EngineStopped("the engine is not running")
        image = self._validated(request)
        handle = Handle(image, self._request_cancel)
        with self._changed:
            if not self._accepting:
                raise EngineStopped("the engine is not running")
            if request.id in self._open:
                raise UnsupportedRequest("id", f"an image with id {request.id!r} is already in this engine")
            self._open[request.id] = (handle, on_event)
            self._arrivals.append(image)
            self._changed.notify_all()
        return handle

    def fingerprint(self, checkpoint: str, bucket_rows: int | None = None) -> Fingerprint:
        """Everything besides the request that can change a bit of an image of this checkpoint; `.facts` and their `.sha256`."""
        loaded = self._loaded(checkpoint)
        key = (checkpoint, bucket_rows)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(
                weights_digest=loaded.weights_digest,
                family=loaded.spec.family,
                precision=loaded.spec.precision,
                bucket_rows=bucket_rows,
                device_facts=self._device_facts,
                family_facts=loaded.family.facts(),
            )
        return self._fingerprints[key]

    def stats(self) -> dict[str, Any]:
        """Plain numbers since the start; a step counts once for the batch, an image step once per image in it."""
        ledger = self._ledger
        with self._changed:
            states = Counter(image.state for image in self._scheduler.in_order())
            arriving = len(self._arrivals)
        return {
            "inflight": states[ImageState.RUNNING] + states[ImageState.DENOISED],
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
            "cache_hits": self._cache.hits,
            "cache_misses": self._cache.misses,
            "cache_bytes": self._cache.size_bytes,
            "loads": len(self._checkpoints),
            "load_s": self.load_s,
            "warm_up_s": self.warm_up_s,
        }

    def _request_cancel(self, image_id: str) -> None:
        with self._changed:
            if image_id in self._open:
                self._cancels.add(image_id)
                self._changed.notify_all()

    def _loaded(self, checkpoint: str) -> LoadedCheckpoint:
        if checkpoint not in self._checkpoints:
            raise UnknownCheckpoint(checkpoint, sorted(self._checkpoints))
        return self._checkpoints[checkpoint]

    def _validated(self, request: ImageRequest) -> InFlight:
        """Check every field a caller can get wrong, before anything is queued."""
        checkpoint = self._loaded(request.checkpoint)
        spec, family = checkpoint.spec, checkpoint.family
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(request, name))
        for name in ("width_px", "height_px", "num_steps", "seed", "rank"):
            _check_integer(name, getattr(request, name))
        if not isinstance(request.guidance, int | float) or not math.isfinite(request.guidance) or request.guidance < 0:
            raise UnsupportedRequest("guidance", f"{request.guidance!r} is not a finite number from 0 up")
        if not 0 <= request.seed < 2**63:
            raise UnsupportedRequest("seed", f"{request.seed} is not within 0..2**63-1")
        if (request.width_px, request.height_px) not in spec.sizes:
            sizes = ", ".join(f"{width}x{height}" for width, height in spec.sizes)
            raise UnsupportedRequest("width_px", f"{request.width_px}x{request.height_px} is none of {sizes}")
        if request.sampler not in spec.samplers:
            raise UnsupportedRequest("sampler", f"{request.sampler!r} is none of {', '.join(spec.samplers)}")
        family.check(request)
        rows = family.rows(request)
        self._check_rows(request, rows)
        key = BatchKey(request.checkpoint, request.height_px, request.width_px, family.text_length(request))
        return InFlight(request=request, batch_key=key, rows=rows, submitted_at=time.monotonic())

    def _check_rows(self, request: ImageRequest, rows: int) -> None:
        most = self.config.max_batch_rows
        if request.determinism not in tuple(Determinism):
            raise UnsupportedRequest("determinism", f"{request.determinism!r} is none of {', '.join(Determinism)}")
        if request.determinism == Determinism.REPRODUCIBLE:
            if request.bucket_rows is None:
                raise UnsupportedRequest("bucket_rows", "a reproducible image needs one")
            _check_integer("bucket_rows", request.bucket_rows)
            if not rows <= request.bucket_rows <= most:
                raise UnsupportedRequest("bucket_rows", f"{request.bucket_rows} is not within {rows}..{most}")
        elif rows > most:
            raise UnsupportedRequest("guidance", f"takes {rows} rows of a forward; this engine makes {most}")

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
        last_word = "the engine was stopped"
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as problem:
            log.exception("engine_died")
            last_word = f"the engine died: {problem!r}"
        finally:
            self._fail_everyone(last_word)

    def _prepare(self) -> None:
        """Load every checkpoint once, and render one small image per size, so that the first caller does not pay for it."""
        self._device.prepare()
        for spec in self._specs.values():
            self._checkpoints[spec.name] = load_checkpoint(spec, self._device)
        self.load_s = sum(checkpoint.load_s for checkpoint in self._checkpoints.values())
        self._device_facts = self._device.facts()
        started = time.perf_counter()
        for spec in self._specs.values():
            if not spec.samplers or not spec.sizes:
                raise UnsupportedRequest("samplers" if spec.sizes else "sizes", f"checkpoint {spec.name} offers none")
            for width_px, height_px in spec.sizes:
                self._warm_up(spec, width_px, height_px)
        self.warm_up_s = time.perf_counter() - started

    def _warm_up(self, spec: CheckpointSpec, width_px: int, height_px: int) -> None:
        request = ImageRequest(
            id="warm-up",
            group="warm-up",
            checkpoint=spec.name,
            prompt="",
            width_px=width_px,
            height_px=height_px,
            num_steps=2,
            guidance=2.0 if self.config.max_batch_rows > 1 else 1.0,
            sampler=spec.default_sampler or spec.samplers[0],
            seed=0,
        )
        for sampler in spec.samplers:
            self._validated(replace(request, sampler=sampler))  # a sampler nobody could use stops the start, by name
        image = self._validated(request)
        self._runner.encode(image)
        while not image.is_denoised:
            self._runner.advance(image, self._runner.predict(Batch.alone(image))[0])
            image.step += 1
        self._runner.decode(image)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do and take in what others left; False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._arrivals or self._cancels or len(self._scheduler)):
                self._changed.wait()
            arrivals = list(self._arrivals)
            self._arrivals.clear()
            for image in arrivals:
                self._scheduler.add(image)
            if self._stopping:
                return False
            canceled = [image for image in map(self._scheduler.get, self._cancels) if image is not None]
            self._cancels.clear()
        for image in arrivals:
            self._tell(image, Queued(request_id=image.id))
        for image in canceled:
            self._fail(image, ImageCanceled(f"image {image.id} was canceled at step {image.step} of {image.num_steps}"))
        return True

    def _turn(self) -> None:
        """Encode newcomers, advance one batch by one denoise step, decode what is finished."""
        for image in self._scheduler.next_encodes(self.config.max_encodes_per_turn):
            self._encode(image)
        batch = self._scheduler.next_batch()
        if batch is not None:
            self._denoise(batch)
            self._settle(batch)
        for image in self._scheduler.next_decodes():
            self._decode(image)

    def _encode(self, image: InFlight) -> None:
        watch = self._device.stopwatch()
        try:
            self._runner.encode(image)
        except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
            self._fail(image, _in_our_words(problem, "encode"))
            return
        watch.stop()
        self._ledger.enter_encode(image, watch)
        image.state = ImageState.RUNNING
        self._tell(image, Started(request_id=image.id))

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
        for image, prediction in zip(batch, predictions, strict=True):
            try:
                self._runner.advance(image, prediction)
            except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
                self._fail(image, _in_our_words(problem, "denoise"))
        watch.stop()
        self._ledger.enter_forward(batch, watch)
        self._ledger.book(RUN_AHEAD)

    def _predict(self, batch: Batch) -> list[Tensor] | None:
        """Run the forward. None when it failed: an image that was alone in it has failed then, several are to be tried apart.

        The exception ends here, for its traceback would keep the failed forward's tensors while the images are tried apart.
        """
        try:
            return self._runner.predict(batch)
        except Exception as problem:
            if is_out_of_memory(problem):
                self._device.free_cached_memory()
                if not batch.is_pinned and len(batch) > 1:
                    self._scheduler.cap_rows(batch.key, batch.used_rows // 2)
            if len(batch) == 1:
                self._fail(batch.images[0], _in_our_words(problem, "denoise"))
            else:
                log.warning("forward_failed", extra={"images": len(batch), "rows": batch.bucket_rows}, exc_info=True)
            return None

    def _settle(self, batch: Batch) -> None:
        """Count the step and tell everyone who took it."""
        now = time.monotonic()
        self._scheduler.settle(batch)
        for image in batch:
            if image.id not in self._scheduler:
                continue
            since = image.last_step_at or image.first_step_at or now
            newest = now - since
            known = image.seconds_per_step
            image.seconds_per_step = newest if known is None else known + PACE_MEMORY * (newest - known)
            image.last_step_at = now
            image.eta_s = (image.num_steps - image.step) * image.seconds_per_step + self._ledger.mean_decode_s
            self._tell(image, Stepped(request_id=image.id, step=image.step, num_steps=image.num_steps, eta_s=image.eta_s))

    def _decode(self, image: InFlight) -> None:
        if image.id in self._cancels:
            return  # the next turn drops it; its decode would be for nobody
        watch = self._device.stopwatch()
        try:
            pixels = self._runner.decode(image)
        except Exception as problem:  # noqa: BLE001  one image's trouble must not become its neighbours'
            self._fail(image, _in_our_words(problem, "decode"))
            return
        watch.stop()
        self._ledger.book_decode(image, watch)
        finished = FinishedImage(request=image.request, pixels=pixels, record=self._record(image))
        self._close(image, ImageState.FINISHED, finished)

    def _record(self, image: InFlight) -> RenderRecord:
        account = image.account
        bits = self.fingerprint(image.request.checkpoint, image.request.pinned_rows)
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
        image.drop_tensors()
        self._outcomes[state] += 1
        if isinstance(outcome, FinishedImage):
            self._tell(image, Finished(request_id=image.id, image=outcome))
        else:
            self._tell(image, Failed(request_id=image.id, error=outcome))
        with self._changed:
            self._scheduler.remove(image.id)
            self._cancels.discard(image.id)
            handle, _ = self._open.pop(image.id)
        handle.resolve(outcome)

    def _tell(self, image: InFlight, event: Event) -> None:
        _, on_event = self._open[image.id]
        if on_event is None:
            return
        try:
            on_event(event)
        except Exception:
            log.exception("on_event_failed", extra={"image_id": image.id, "event_type": type(event).__name__})

    def _fail_everyone(self, last_word: str) -> None:
        with self._changed:
            self._accepting = False
            left = [*self._scheduler.in_order(), *self._arrivals]
            self._arrivals.clear()
        for image in left:
            self._fail(image, EngineStopped(last_word))


def _in_our_words(problem: Exception, stage: str) -> EngineError:
    """Turn whatever was raised into an error of our tree, the original attached as its cause."""
    if isinstance(problem, EngineError):
        return problem
    error: EngineError
    if is_out_of_memory(problem):
        error = OutOfDeviceMemory(f"the device ran out of memory in {stage}")
    else:
        error = EngineError(f"{stage} failed: {type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise UnsupportedRequest(field, "is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnsupportedRequest(field, "is not valid Unicode") from None


def _check_integer(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedRequest(field, f"{value!r} is not an integer")
