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
from typing import Any, NoReturn

from engine.checkpoints import LoadedCheckpoints
from engine.config import CheckpointSpec
from engine.device import Device
from engine.errors import EngineStopped, LoadFailed
from engine.hostcopies import HostCopies
from engine.inbox import Inbox
from engine.loading import LoadedCheckpoint
from engine.sidethread import LoadPace

log = logging.getLogger(__name__)

# Of turns with work, one in so many is followed by a piece of a warm-up: less than one step in a
# hundred waits for one.
TURNS_PER_PIECE = 128
# Where images wait for the checkpoint itself: soon they take turns with the others anyway.
TURNS_PER_AWAITED_PIECE = 4
ENDS_WITHIN_S = 10.0  # a read under way when the engine stops


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Seconds that a load took."""

    checkpoint: str
    read_s: float  # verify, read, build, move to the device; or copy from the host's memory
    warm_up_s: float  # the turns between its pieces included
    is_copied: bool = False  # from the host's memory


@dataclass(eq=False)
class _WarmUp:
    """A checkpoint that is read, on its way to be served."""

    loaded: LoadedCheckpoint
    done: Future[LoadTimes]
    turns_per_piece: int
    is_copied: bool
    pieces: Iterator[None] = field(default_factory=lambda: iter(()))
    began_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class _Leaving:
    """A checkpoint whose last images are on their way. may_return: see `Loads.unload`."""

    gone: Future[None]
    may_return: bool


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
        on_change: Callable[[], None],
        forget: Callable[[LoadedCheckpoint], None],
        working_bytes: Callable[[], int],
        copies: HostCopies,
    ) -> None:
        """Start without any.

        warm_up: the pieces of a checkpoint's warm-up.  on_change: goes by what is held now.
        forget: drops what was measured and remembered of one that is gone for good.  working_bytes:
        what an image needs besides the weights.  copies: of weights that may return.
        """
        self._checkpoints = checkpoints
        self._device = device
        self._inbox = inbox
        self._pace = pace
        self._warm_up = warm_up
        self._on_change = on_change
        self._drop_knowledge = forget
        self._working_bytes = working_bytes
        self._copies = copies
        self._reads: set[Future[None]] = set()
        # One at a time, as in the whole process (engine/loading.py).
        self._side = ThreadPoolExecutor(
            1, thread_name_prefix="engine-load", initializer=device.prepare_side_thread
        )
        self._asked: list[Future[LoadTimes]] = []  # loads that have not ended
        self._warm_ups: deque[_WarmUp] = deque()
        self._leaving: dict[str, _Leaving] = {}
        self._put: list[Future[None]] = []  # away, of those whose memory is not free yet
        self._away: dict[str, LoadedCheckpoint] = {}  # they were warm, and may return
        self._turns_since_piece = 0

    # --- from any thread ---

    def load(self, spec: CheckpointSpec, *, is_awaited: bool) -> Future[LoadTimes]:
        """Read a checkpoint in the side thread and have it served.

        is_awaited: images wait for it, so its warm-up has its pieces one soon after the other.
        """
        done: Future[LoadTimes] = Future()
        self._asked = [each for each in self._asked if not each.done()] + [done]
        try:
            read = self._side.submit(self._read, spec, done, is_awaited)
            self._reads = {each for each in self._reads if not each.done()} | {read}
        except RuntimeError:
            _fail_unless_done(done, EngineStopped("the engine was stopped"))
        return done

    def unload(
        self, name: str, *, at_once: Callable[[], None] | None, may_return: bool
    ) -> Future[None]:
        """Serve a checkpoint no more, and free its memory when its images have ended.

        at_once: ends them, on the device thread.  may_return: what was measured and remembered of
        it stays, and it needs no warm-up if it returns the same.  Raises `UnknownCheckpoint`.
        """
        gone: Future[None] = Future()
        self._checkpoints.withhold(name)
        leaving = _Leaving(gone, may_return)
        if not self._inbox.post(partial(self._note_leaving, name, leaving, at_once)):
            _fail_unless_done(gone, EngineStopped("the engine is not running"))
        return gone

    # --- in the side thread ---

    def _read(self, spec: CheckpointSpec, done: Future[LoadTimes], is_awaited: bool) -> None:
        """Read a checkpoint and leave it to the device thread for its warm-up."""
        try:
            with self._device.beside():
                with self._pace.kept():
                    copied = self._copies.take(spec, self._device)
                loaded = copied or self._checkpoints.read(
                    spec,
                    self._device,
                    pace=self._pace.kept,
                    working_bytes=self._working_bytes(),
                )
        except Exception as problem:  # noqa: BLE001  told to who asked for the load
            if self._device.is_lost():
                self._inbox.post(partial(_end_engine, problem))
            else:
                self._fail(spec, problem, done)
            return
        turns = TURNS_PER_AWAITED_PIECE if is_awaited else TURNS_PER_PIECE
        warm_up = _WarmUp(loaded, done, turns_per_piece=turns, is_copied=copied is not None)
        if not self._inbox.post(partial(self._begin_warm_up, warm_up)):
            _fail_unless_done(done, EngineStopped("the engine was stopped"))

    def _copy(self, loaded: LoadedCheckpoint, gone: Future[None]) -> None:
        name = loaded.spec.name
        try:
            with self._device.beside(), self._pace.kept():
                self._copies.put(loaded)
        except Exception as problem:
            if self._device.is_lost():
                self._inbox.post(partial(_end_engine, problem))  # which ends `gone`, too
                return
            log.exception("checkpoint_not_copied", extra={"checkpoint": name})
            loaded.free()
        self._device.free_cached_memory()
        log.info("checkpoint_put_away", extra={"checkpoint": name, "is_kept": name in self._copies})
        _succeed_unless_done(gone, None)

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

    def _begin_warm_up(self, warm_up: _WarmUp) -> None:
        loaded = warm_up.loaded
        try:
            self._checkpoints.add(loaded)
        except ValueError as problem:
            loaded.free()
            self._fail(loaded.spec, problem, warm_up.done)
            return
        self._on_change()
        if not self._is_back(loaded):
            warm_up.pieces = self._warm_up(loaded.spec)
        self._warm_ups.append(warm_up)

    def _is_back(self, loaded: LoadedCheckpoint) -> bool:
        """Tell whether it was here before as it is now; forget all about another of its name."""
        name = loaded.spec.name
        before = self._away.get(name)
        if before is None:
            return False
        if (before.spec, before.weights_digest) != (loaded.spec, loaded.weights_digest):
            self.forget(name)
            return False
        del self._away[name]
        return True

    def go_on(self, *, is_busy: bool) -> None:
        """Free what is to go, and do a piece of a warm-up if it is time.

        is_busy: images wait for the device.
        """
        self._finish_unloads()
        self._turns_since_piece += 1
        if not self._warm_ups:
            return
        warm_up = self._warm_ups[0]
        if is_busy and self._turns_since_piece < warm_up.turns_per_piece:
            return
        self._turns_since_piece = 0
        name = warm_up.loaded.spec.name
        try:
            next(warm_up.pieces)
        except StopIteration:
            self._warm_ups.popleft()
            self._on_change()  # its forwards may have been recorded
            self._checkpoints.serve(name)
            warm_up_s = time.perf_counter() - warm_up.began_at
            read_s = warm_up.loaded.load_s
            times = LoadTimes(
                checkpoint=name, read_s=read_s, warm_up_s=warm_up_s, is_copied=warm_up.is_copied
            )
            log.info("checkpoint_joined", extra={"checkpoint": name, "warm_up_s": warm_up_s})
            _succeed_unless_done(warm_up.done, times)
        except Exception as problem:
            if self._device.is_lost():
                raise
            self._warm_ups.popleft()
            self._take_out(name)
            self._fail(warm_up.loaded.spec, problem, warm_up.done)

    def _note_leaving(
        self, name: str, leaving: _Leaving, at_once: Callable[[], None] | None
    ) -> None:
        self._leaving[name] = leaving
        if at_once is not None:
            at_once()

    def forget(self, name: str) -> None:
        """Drop what is kept of a checkpoint that is away."""
        before = self._away.pop(name, None)
        if before is None:
            return
        self._drop_knowledge(before)
        with suppress(RuntimeError):  # it was shut down
            self._side.submit(self._copies.drop, name)

    def _finish_unloads(self) -> None:
        """Take out checkpoints that are to go and have no image left."""
        for name in [name for name in self._leaving if not self._inbox.open_images_of(name)]:
            leaving = self._leaving.pop(name)
            if leaving.may_return:
                self._put_away(name, leaving.gone)
                continue
            self._take_out(name)
            log.info("checkpoint_unloaded", extra={"checkpoint": name})
            _succeed_unless_done(leaving.gone, None)

    def _take_out(self, name: str) -> None:
        """Free the memory of a checkpoint, and forget all about it."""
        loaded = self._checkpoints.drop(name)
        self._drop_knowledge(loaded)
        self._on_change()
        loaded.free()
        self._device.free_cached_memory()

    def _put_away(self, name: str, gone: Future[None]) -> None:
        """Have the side thread free the memory of a checkpoint that may return, or copy it."""
        loaded = self._away[name] = self._checkpoints.drop(name)
        self._on_change()
        self._put = [each for each in self._put if not each.done()] + [gone]
        try:
            self._side.submit(self._copy, loaded, gone)
        except RuntimeError:
            _fail_unless_done(gone, EngineStopped("the engine was stopped"))

    def close(self) -> None:
        """Leave nobody waiting: the engine stops."""
        self._side.shutdown(wait=False, cancel_futures=True)
        # What a load changes in the whole process, such as where modules are built, is changed back
        # at its end. One that was canceled before it began has none: `wait` would not return.
        begun = [read for read in self._reads if not read.cancelled()]
        wait(begun, timeout=ENDS_WITHIN_S)
        self._warm_ups.clear()
        leaving = [each.gone for each in self._leaving.values()]
        waiting: list[Future[Any]] = [*self._asked, *leaving, *self._put]
        for future in waiting:
            _fail_unless_done(future, EngineStopped("the engine was stopped"))
        self._leaving.clear()


def _end_engine(problem: Exception) -> NoReturn:
    """End the device thread: nothing will work on its device any more."""
    raise problem


def _fail_unless_done(future: Future[Any], error: Exception) -> None:
    """End a future with an error, unless a stop or its owner, who canceled it, was first."""
    with suppress(InvalidStateError):
        future.set_exception(error)


def _succeed_unless_done(future: Future[Any], result: LoadTimes | None) -> None:
    """End a future with its result, unless its owner has canceled it."""
    with suppress(InvalidStateError):
        future.set_result(result)
