"""Bring checkpoints into a running engine, and take them out again.

A side thread verifies, reads and builds a checkpoint (engine/sidethread.py says what keeps it from
the steps). Its warm-up is done in pieces between the device thread's turns, few of them while
images wait. Then callers may ask for it. A checkpoint that goes is asked for no more at once; when
its last image has ended, its memory is free.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.checkpoints import LoadedCheckpoints
from engine.config import CheckpointSpec
from engine.device import Device
from engine.errors import EngineStopped, LoadFailed
from engine.inbox import Inbox
from engine.loading import LoadedCheckpoint
from engine.sidethread import LoadPace

log = logging.getLogger(__name__)

# Of turns with work, one in so many is followed by a piece of a warm-up: less than one step in a
# hundred waits for one.
TURNS_PER_PIECE = 128
ENDS_WITHIN_S = 10.0  # a read under way when the engine stops


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Seconds that a load took."""

    checkpoint: str
    read_s: float  # verify, read, build, move to the device
    warm_up_s: float  # the turns between its pieces included


@dataclass(eq=False)
class _WarmUp:
    """A checkpoint that is read, on its way to be served."""

    loaded: LoadedCheckpoint
    pieces: Iterator[None]
    done: Future[LoadTimes]
    began_at: float = field(default_factory=time.perf_counter)


class Loads:
    """Checkpoints that come and go while the engine works."""

    def __init__(
        self,
        *,
        checkpoints: LoadedCheckpoints,
        device: Device,
        inbox: Inbox,
        pace: LoadPace,
        warm_up: Callable[[CheckpointSpec], Iterator[None]],
        on_change: Callable[[LoadedCheckpoint | None], None],
        working_bytes: Callable[[], int],
    ) -> None:
        """Start without any.

        warm_up: the pieces of a checkpoint's warm-up.  on_change: goes by what is held now, and
        forgets one that is gone.  working_bytes: what an image needs besides the weights.
        """
        self._checkpoints = checkpoints
        self._device = device
        self._inbox = inbox
        self._pace = pace
        self._warm_up = warm_up
        self._on_change = on_change
        self._working_bytes = working_bytes
        self._reads: set[Future[None]] = set()
        # One at a time, as in the whole process (engine/loading.py).
        self._side = ThreadPoolExecutor(
            1, thread_name_prefix="engine-load", initializer=device.prepare_side_thread
        )
        self._asked: list[Future[LoadTimes]] = []  # loads that have not ended
        self._warm_ups: deque[_WarmUp] = deque()
        self._leaving: dict[str, Future[None]] = {}
        self._turns_since_piece = 0

    # --- from any thread ---

    def load(self, spec: CheckpointSpec) -> Future[LoadTimes]:
        """Read a checkpoint in the side thread and have it served."""
        done: Future[LoadTimes] = Future()
        self._asked = [each for each in self._asked if not each.done()] + [done]
        try:
            read = self._side.submit(self._read, spec, done)
            self._reads = {each for each in self._reads if not each.done()} | {read}
        except RuntimeError:
            _fail_unless_done(done, EngineStopped("the engine was stopped"))
        return done

    def unload(self, name: str, *, at_once: Callable[[], None] | None) -> Future[None]:
        """Serve a checkpoint no more, and free its memory when its images have ended.

        at_once: ends them, on the device thread.  Raises `UnknownCheckpoint`.
        """
        gone: Future[None] = Future()
        self._checkpoints.withhold(name)
        if not self._inbox.post(partial(self._note_leaving, name, gone, at_once)):
            _fail_unless_done(gone, EngineStopped("the engine is not running"))
        return gone

    # --- in the side thread ---

    def _read(self, spec: CheckpointSpec, done: Future[LoadTimes]) -> None:
        """Read a checkpoint and leave it to the device thread for its warm-up."""
        try:
            with self._device.beside():
                loaded = self._checkpoints.read(
                    spec,
                    self._device,
                    pace=self._pace.kept,
                    working_bytes=self._working_bytes(),
                )
        except Exception as problem:  # noqa: BLE001  told to who asked for the load
            self._fail(spec, problem, done)
            return
        if not self._inbox.post(partial(self._begin_warm_up, loaded, done)):
            _fail_unless_done(done, EngineStopped("the engine was stopped"))

    def _fail(self, spec: CheckpointSpec, problem: Exception, done: Future[LoadTimes]) -> None:
        failure = self._checkpoints.note_failure(spec.name, problem)
        error = LoadFailed(failure, spec.path)
        error.__cause__ = problem
        _fail_unless_done(done, error)
        self._device.free_cached_memory()

    # --- in the device thread, between two turns ---

    @property
    def has_warm_up(self) -> bool:
        """Tell whether a warm-up waits to go on."""
        return bool(self._warm_ups)

    def _begin_warm_up(self, loaded: LoadedCheckpoint, done: Future[LoadTimes]) -> None:
        try:
            self._checkpoints.add(loaded)
        except ValueError as problem:
            loaded.free()
            self._fail(loaded.spec, problem, done)
            return
        self._on_change(None)
        self._warm_ups.append(_WarmUp(loaded, self._warm_up(loaded.spec), done))

    def go_on(self, *, is_busy: bool) -> None:
        """Free what is to go, and do a piece of a warm-up if it is time.

        is_busy: images wait for the device.
        """
        self._finish_unloads()
        self._turns_since_piece += 1
        if not self._warm_ups or (is_busy and self._turns_since_piece < TURNS_PER_PIECE):
            return
        self._turns_since_piece = 0
        warm_up = self._warm_ups[0]
        name = warm_up.loaded.spec.name
        try:
            next(warm_up.pieces)
        except StopIteration:
            self._warm_ups.popleft()
            self._checkpoints.serve(name)
            warm_up_s = time.perf_counter() - warm_up.began_at
            read_s = warm_up.loaded.load_s
            times = LoadTimes(checkpoint=name, read_s=read_s, warm_up_s=warm_up_s)
            log.info("checkpoint_joined", extra={"checkpoint": name, "warm_up_s": warm_up_s})
            _succeed_unless_done(warm_up.done, times)
        except Exception as problem:  # noqa: BLE001  told to who asked for the load
            self._warm_ups.popleft()
            self._take_out(name)
            self._fail(warm_up.loaded.spec, problem, warm_up.done)

    def _note_leaving(
        self, name: str, gone: Future[None], at_once: Callable[[], None] | None
    ) -> None:
        self._leaving[name] = gone
        if at_once is not None:
            at_once()

    def _finish_unloads(self) -> None:
        """Free the memory of checkpoints that are to go and have no image left."""
        for name in [name for name in self._leaving if not self._inbox.open_images_of(name)]:
            gone = self._leaving.pop(name)
            self._take_out(name)
            log.info("checkpoint_unloaded", extra={"checkpoint": name})
            _succeed_unless_done(gone, None)

    def _take_out(self, name: str) -> None:
        loaded = self._checkpoints.drop(name)
        self._on_change(loaded)
        loaded.free()
        self._device.free_cached_memory()

    def close(self) -> None:
        """Leave nobody waiting: the engine stops."""
        self._side.shutdown(wait=False, cancel_futures=True)
        # What a load changes in the whole process, such as where modules are built, is changed back
        # at its end.
        wait(list(self._reads), timeout=ENDS_WITHIN_S)
        self._warm_ups.clear()
        waiting: list[Future[Any]] = [*self._asked, *self._leaving.values()]
        for future in waiting:
            _fail_unless_done(future, EngineStopped("the engine was stopped"))
        self._leaving.clear()


def _fail_unless_done(future: Future[Any], error: Exception) -> None:
    """End a future with an error, unless a stop or its owner, who canceled it, was first."""
    with suppress(InvalidStateError):
        future.set_exception(error)


def _succeed_unless_done(future: Future[Any], result: LoadTimes | None) -> None:
    """End a future with its result, unless its owner has canceled it."""
    with suppress(InvalidStateError):
        future.set_result(result)
