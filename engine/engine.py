"""The engine as its callers see it: requests in, finished images out, from any thread.

    engine = Engine(EngineConfig(device="cuda:0"), [CheckpointSpec(...)])
    engine.start()                             # loads and warms up; weights stay until stop()
    image = engine.submit(ImageRequest(...)).result()

Every method only checks what it is given and leaves it in the inbox; one thread owns the device and
does the work (`loop.py`). A newcomer, a cancel, a snapshot or a better rank takes effect between
two of its turns.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.capabilities import Capabilities
from engine.checkpoints import LoadedCheckpoints
from engine.conditioning import ConditioningCache
from engine.config import CheckpointSpec, EngineConfig
from engine.costs import CostModel
from engine.device import Device
from engine.errors import EngineStopped, LoadFailure, SnapshotRefused
from engine.events import OnEvent
from engine.families.contract import State
from engine.fingerprint import Fingerprint
from engine.handle import Handle
from engine.inbox import Inbox, OpenImage
from engine.inflight import InFlight
from engine.keptlatents import KeptLatents, check_fork, digest_of_latents
from engine.ledger import Ledger
from engine.loads import LoadTimes
from engine.loop import DeviceLoop
from engine.previews import Pace
from engine.request import ImageRequest
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.shares import Shares
from engine.slowforwards import SlowForwards
from engine.snapshots import check_fingerprint, from_bytes, request_digest
from engine.validation import check_integer, check_seconds

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

NOTHING_YET = State({})


class Engine:
    """Renders images of a few checkpoints on one device.

    Every method may be called by any thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoints: Sequence[CheckpointSpec],
        *,
        load_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Put the parts together; nothing is loaded before `start`.

        load_turn: surrounds the part of each load that needs the host's memory for a while beside
        what is kept; it may wait for other processes.  Raises `ValueError` where two checkpoints
        have one name or the config contradicts itself.
        """
        self.config = config
        self.costs = CostModel()
        max_rows = config.max_batch_rows
        self._checkpoints = LoadedCheckpoints(
            checkpoints,
            max_batch_rows=max_rows,
            may_lack_some=config.may_lack_checkpoints,
            load_turn=load_turn,
        )
        device = Device(
            config.device,
            num_threads=config.num_threads,
            attention=config.attention,
            fp16_accumulation=config.fp16_accumulation,
            blas_workspaces=config.blas_workspaces,
        )
        self._cache = ConditioningCache(config.conditioning_cache_bytes)
        self._kept = KeptLatents(config.latent_cache_bytes)
        self._scheduler = _scheduler(config, checkpoints, self.costs)
        self._slow = SlowForwards(self.costs, self._scheduler.charge)
        self._ledger = Ledger(self._slow.charge)
        self._runner = Runner(self._checkpoints, device, self._cache)
        self._inbox = Inbox(self._scheduler)
        self._loop = DeviceLoop(
            config,
            device=device,
            checkpoints=self._checkpoints,
            runner=self._runner,
            scheduler=self._scheduler,
            costs=self.costs,
            ledger=self._ledger,
            kept_latents=self._kept,
            conditioning=self._cache,
            inbox=self._inbox,
        )
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._start_problem: BaseException | None = None

    # --- its life ---

    def start(self) -> None:
        """Start the device thread; return when every checkpoint is loaded and warm.

        Raises what stopped it from getting there. With `may_lack_checkpoints` a checkpoint that
        cannot be loaded does not: `failures` says why it is not served.
        """
        if self._thread is not None:
            raise RuntimeError("an engine is started once")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._start_problem is not None:
            self._thread.join()
            raise self._start_problem

    def _run(self) -> None:
        try:
            self._loop.prepare()
        except BaseException as problem:  # noqa: BLE001  start() raises it in the caller's thread
            self._start_problem = problem
            self._ready.set()
            return
        self._inbox.start_accepting()
        self._ready.set()
        self._loop.run()

    def stop(self, within_s: float | None = None) -> None:
        """Stop after the turn in progress; what is not finished fails with `EngineStopped`.

        within_s: return after so many seconds, whatever the turn does: on a device that hangs it
        does not end; None: wait for it.  Harmless when repeated.
        """
        self._inbox.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(within_s)
            if self._thread.is_alive():
                log.critical("engine_not_stopped", extra={"turn_s": self.turn_s})

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Tell whether the engine takes requests."""
        return self._inbox.is_accepting

    @property
    def turn_s(self) -> float:
        """Return the seconds that the turn in progress has taken; 0 between two turns.

        A turn that does not end means that the device hangs.
        """
        return self._loop.turn_s

    @property
    def is_device_lost(self) -> bool:
        """Tell whether the engine ended because nothing will work on its device any more."""
        return self._loop.is_device_lost

    @property
    def is_compiling(self) -> bool:
        """Tell whether the turn in progress is a piece of a warm-up that compiles blocks."""
        return self._loop.is_compiling

    @property
    def load_silent_s(self) -> float:
        """Return the seconds since a load that brings weights to the device last moved.

        0 without one. A load that does not move means that the device hangs, too, or the disk.
        """
        return self._loop.load_silent_s

    # --- checkpoints come and go ---

    def load(self, spec: CheckpointSpec, *, is_awaited: bool = False) -> Future[LoadTimes]:
        """Load one more checkpoint while the others render; no step waits for it.

        When the future has its result, the checkpoint is served. It raises `LoadFailed`, which
        names checkpoint, folder and reason, or `EngineStopped`. One that is loaded already has to
        be unloaded first, so give versions names of their own.  is_awaited: images wait for it, so
        it is warmed up sooner, for a few steps of the others that take longer.
        """
        if not self._inbox.is_accepting:
            raise EngineStopped("the engine is not running")
        return self._loop.loads.load(spec, is_awaited=is_awaited)

    def unload(
        self, checkpoint: str, *, at_once: bool = False, may_return: bool = False
    ) -> Future[None]:
        """Serve a checkpoint no more: from now on `submit` raises `UnknownCheckpoint` for it.

        Its images in flight are finished first.  at_once: they end with `UnknownCheckpoint`; who
        wants their snapshots withdraws them before. When the future has its result, weights,
        adapters and all that was remembered are gone.  may_return: what was measured stays, and a
        later load of the same files has no warm-up; `forget` ends that. Raises `UnknownCheckpoint`.
        """
        end_images = partial(self._loop.end_images_of, checkpoint) if at_once else None
        loads = self._loop.loads
        return loads.unload(checkpoint, at_once=end_images, may_return=may_return)

    def forget(self, checkpoint: str) -> None:
        """Drop what is kept of a checkpoint that is unloaded and will not return."""
        self._inbox.post(partial(self._loop.loads.forget, checkpoint))

    def set_rank_shares(self, rank_shares: Mapping[int, float]) -> None:
        """Owe ranks these parts of the device's seconds from the next step boundary on.

        Raises `ValueError` for shares that leave nothing to other ranks.
        """
        Shares(rank_shares)  # refused here, not on the device thread
        self.config = replace(self.config, rank_shares=rank_shares)
        self._inbox.post(partial(self._scheduler.set_shares, rank_shares))

    # --- an image comes in ---

    def submit(
        self,
        request: ImageRequest,
        on_event: OnEvent | None = None,
        *,
        within_s: float | None = None,
    ) -> Handle:
        """Take a request; it joins the running batch at the next step boundary.

        within_s: seconds from now; not finished by then, it fails at a step boundary.  on_event: is
        called from the device thread, so it must be fast and never wait for an image; its
        exceptions are only logged.  Raises `UnsupportedRequest` (naming the field),
        `UnknownCheckpoint` or `EngineStopped`, and takes nothing then.
        """
        image = self._admitted(request)
        if request.fork is None:
            return self._take_in(image, on_event, within_s=within_s)
        kept = self._kept.find(request.owner, request.fork)
        digest = self._checkpoints.find(request.checkpoint).weights_digest
        check_fork(request, kept.request, digest, kept.weights_digest, kept.step)
        return self._take_in_fork(image, kept.latents, kept.step, on_event, within_s=within_s)

    def restore(
        self,
        blob: bytes,
        on_event: OnEvent | None = None,
        *,
        request: ImageRequest | None = None,
        within_s: float | None = None,
    ) -> Handle:
        """Go on with an image from a snapshot, at its step and with the bits it would have had.

        request: the same request under another id, group or rank.  within_s: as for `submit`,
        counted from now.  Raises as `submit`, and `SnapshotRefused` for a blob that is damaged, of
        another request, or made where a bit could come out differently.
        """
        snapshot = from_bytes(blob)
        wanted = request or snapshot.request
        if request_digest(wanted) != request_digest(snapshot.request):
            raise SnapshotRefused("it is of another request")
        image = self._admitted(wanted)
        image.origin = snapshot.fingerprint_facts.get("fork", "")
        check_fingerprint(snapshot, self._checkpoints.fingerprint_of(image))
        if not snapshot.tensors:  # taken before the image had started
            return self._take_in(image, on_event, within_s=within_s)
        image.step = snapshot.step
        image.num_steps = snapshot.num_steps
        image.is_denoised = image.step >= image.num_steps
        state = State(snapshot.tensors, snapshot.facts)
        begin = partial(self._runner.restore, state=state)
        return self._take_in(image, on_event, begin=begin, unstarted=state, within_s=within_s)

    def fork(
        self,
        blob: bytes,
        request: ImageRequest,
        on_event: OnEvent | None = None,
    ) -> Handle:
        """Start a new request from the latents of a snapshot: another prompt from that step on.

        For iterative edits; nothing of the product calls it yet. The caller answers for both being
        of one owner. Raises as `submit` and `restore`.
        """
        snapshot = from_bytes(blob)
        image = self._admitted(request)
        if "latents" not in snapshot.tensors:
            raise SnapshotRefused("it holds no latents to start from")
        digest = self._checkpoints.find(request.checkpoint).weights_digest
        origin_digest = snapshot.fingerprint_facts["weights"]
        check_fork(request, snapshot.request, digest, origin_digest, snapshot.step)
        return self._take_in_fork(image, snapshot.tensors["latents"], snapshot.step, on_event)

    def _admitted(self, request: ImageRequest) -> InFlight:
        if not self._inbox.is_accepting:
            raise EngineStopped("the engine is not running")
        return self._checkpoints.admit(request)

    def _take_in_fork(
        self,
        image: InFlight,
        latents: Tensor,
        step: int,
        on_event: OnEvent | None,
        *,
        within_s: float | None = None,
    ) -> Handle:
        """Leave an image in the inbox that begins with latents from elsewhere, after `step`."""
        image.step = step
        image.origin = digest_of_latents(latents)
        begin = partial(self._runner.fork, latents=latents)
        return self._take_in(image, on_event, begin=begin, unstarted=None, within_s=within_s)

    def _take_in(
        self,
        image: InFlight,
        on_event: OnEvent | None,
        *,
        begin: Callable[[InFlight], None] | None = None,
        unstarted: State | None = NOTHING_YET,
        within_s: float | None = None,
    ) -> Handle:
        """Leave an image in the inbox; without `begin` it starts with noise of its own."""
        due_at = math.inf
        if within_s is not None:
            check_seconds("within_s", within_s)
            due_at = image.submitted_at + within_s
        entry = OpenImage(
            image=image,
            handle=Handle(image, self),
            on_event=on_event,
            begin=begin or self._runner.start,
            is_new=begin is None,
            unstarted=unstarted,
            pace=Pace(self.config.previews_per_s),
            due_at=due_at,
        )
        self._inbox.put(entry)
        return entry.handle

    # --- an image in flight ---

    def cancel(self, image_id: str) -> None:
        """Drop the image at the next step boundary. Harmless at any moment."""
        self._inbox.cancel(image_id)

    def set_rank(self, image_id: str, rank: int) -> None:
        """Serve the image at this rank from the next step boundary on.

        For a job whose urgency changes in flight. Workers give a rank with the request and do not
        change it: only `Handle.set_rank` calls this. Raises `UnsupportedRequest` for what is no
        integer.
        """
        check_integer("rank", rank)
        self._inbox.post(partial(self._loop.set_rank, image_id, rank))

    def watch(self, image_id: str, watched: bool) -> None:
        """Send previews of the image from its next step on, or no more."""
        self._inbox.post(partial(self._loop.watch, image_id, watched))

    def snapshot(self, image_id: str) -> Future[bytes]:
        """Ask for a snapshot of the image, taken at the next step boundary.

        The future raises `SnapshotRefused` when there is no such image by then.
        """
        return self._ask_for_snapshot(image_id, leaves=False)

    def withdraw(self, image_id: str) -> Future[bytes]:
        """Ask for a snapshot with which the image leaves, as if canceled: no step is wasted.

        When the future has its result, the image's end has been told. An image of which no snapshot
        can be made goes on.
        """
        return self._ask_for_snapshot(image_id, leaves=True)

    def _ask_for_snapshot(self, image_id: str, *, leaves: bool) -> Future[bytes]:
        wanted: Future[bytes] = Future()
        note = partial(self._loop.answer_snapshot, image_id, wanted, leaves=leaves)
        if not self._inbox.post(note):
            wanted.set_exception(EngineStopped("the engine is not running"))
        return wanted

    # --- what it knows of itself ---

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Return the names of the checkpoints that this engine serves."""
        return tuple(self._checkpoints)

    @property
    def failures(self) -> Sequence[LoadFailure]:
        """Return why other checkpoints that it was started with are not served."""
        return tuple(self._checkpoints.failures.values())

    @property
    def load_s(self) -> float:
        """Return the seconds that reading and verifying all checkpoints took."""
        return self._checkpoints.load_s

    @property
    def warm_up_s(self) -> float:
        """Return the seconds that warming up all checkpoints took."""
        return self._loop.warm_up_s

    def weights_bytes(self, checkpoint: str) -> int:
        """Return the device memory of a checkpoint's weights. Raises `UnknownCheckpoint`."""
        return self._checkpoints.find(checkpoint).weights_bytes

    def read_s(self, checkpoint: str) -> float:
        """Return the seconds that reading a checkpoint took. Raises `UnknownCheckpoint`."""
        return self._checkpoints.find(checkpoint).load_s

    def capabilities(self, checkpoint: str) -> Capabilities:
        """Tell what may be asked of this checkpoint. Raises `UnknownCheckpoint`."""
        return self._checkpoints.find(checkpoint).capabilities

    def fingerprint(self, checkpoint: str, bucket_rows: int | None = None) -> Fingerprint:
        """Give what besides a plain request can change a bit of an image of this checkpoint."""
        return self._checkpoints.fingerprint(checkpoint, bucket_rows)

    def stats(self) -> dict[str, Any]:
        """Give plain numbers since the start, each as the part that counts it says."""
        return {
            **self._inbox.stats(),
            **self._loop.stats(),
            **self._ledger.stats(),
            "slow_forwards": self._slow.count,
            **self._cache.stats(),
            **self._kept.stats(),
            **self._checkpoints.stats(),
        }


def _scheduler(
    config: EngineConfig,
    checkpoints: Sequence[CheckpointSpec],
    costs: CostModel,
) -> Scheduler:
    slots = [spec.adapter_slots for spec in checkpoints]
    return Scheduler(
        costs,
        max_inflight=config.max_inflight,
        max_batch_rows=config.max_batch_rows,
        max_encodes_between_steps=config.max_encodes_between_steps,
        row_buckets=config.buckets,
        rank_shares=config.rank_shares,
        share_patience_s=config.share_patience_s,
        growth_ceiling=config.growth_ceiling,
        max_adapters=min(slots, default=1),
    )
