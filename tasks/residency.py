"""Have the checkpoints that jobs ask for in the device's memory.

A job that needs a checkpoint holds it by `using`, and waits there while it is loaded; its lease is
renewed meanwhile. One thread loads and unloads, beside the images that run. What is loaded next,
and what gives way, is decided in `policy/residency.py`.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import structlog

from edges import telemetry
from engine.config import CheckpointSpec
from engine.engine import Engine
from engine.errors import EngineStopped, LoadFailed, LoadFailure, LoadProblem, UnknownCheckpoint
from policy.residency import GB, Awaited, ResidencyRule, Resident, Swap, next_swap, that_fit
from tasks.engines import sizes_of

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.25  # while a job waits: its patience may be over, or a checkpoint held long enough


@dataclass(eq=False)
class Use:
    """A job's need of a checkpoint. wake: called once it is ready, if that was not at once."""

    checkpoint: str
    wake: Callable[[], None]
    since: float
    is_ready: bool = False


@dataclass
class _Loaded:
    size_bytes: int
    loaded_at: float
    load_s: float
    used_at: float


class Residency:
    """Knows which checkpoints a worker serves, and which of them are loaded."""

    def __init__(
        self,
        engine: Engine,
        specs: Mapping[str, CheckpointSpec],
        rule: ResidencyRule,
        *,
        explain: Callable[[LoadFailure], str],
        on_change: Callable[["Residency"], None],
        give_up: Callable[[str], None],
    ) -> None:
        """Know the engine as it was started.

        specs: all that the worker's pool offers.  explain: says why one is not served.  on_change:
        is told, in this object's thread, that something was loaded, left, or failed.  give_up: is
        told why nothing can be loaded any more.
        """
        self.failed: dict[str, str] = {}  # why, by checkpoint
        self.weights: dict[str, str] = {}  # digests, of all that were loaded once
        self._engine = engine
        self._specs = dict(specs)
        self._rule = rule
        self._explain = explain
        self._on_change = on_change
        self._give_up = give_up
        self._sizes: dict[str, int] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._uses: list[Use] = []
        self._closed: frozenset[str] = frozenset()  # loaded, but about to give way
        self._ahead: list[str] = []  # to be loaded before anybody asks, if they fit
        self._leaving: dict[str, Future[None] | None] = {}  # for good; None: not begun
        self._is_over = False
        self._changed = threading.Condition()
        for name in engine.checkpoints:
            self._note_loaded(name, engine.read_s(name))
        for failure in engine.failures:
            self._note_failure(failure)
        self._learn_sizes(specs, sizes_of(specs.values()))
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)

    # --- from any thread ---

    @property
    def serves(self) -> frozenset[str]:
        """Name the checkpoints of whose models jobs are taken: loaded, or loaded when asked for."""
        with self._changed:
            return frozenset(self._specs.keys() - self.failed.keys())

    @property
    def loaded(self) -> tuple[str, ...]:
        """Name the checkpoints in the device's memory."""
        with self._changed:
            return tuple(self._loaded)

    @property
    def absent(self) -> frozenset[str]:
        """Name the checkpoints that would be loaded for a job that comes, and for nobody else."""
        with self._changed:
            at_hand = self._loaded.keys() | {use.checkpoint for use in self._uses}
            return frozenset(self._specs.keys() - self.failed.keys() - at_hand)

    def start(self) -> None:
        """Begin to load what is asked for."""
        self._thread.start()

    def close(self) -> None:
        """Load nothing any more. Who waits goes on, and hears from the engine that it is not there.

        Harmless when repeated.
        """
        with self._changed:
            self._end()

    @contextmanager
    def using(self, checkpoint: str, wake: Callable[[], None]) -> Iterator[Use]:
        """Keep a checkpoint in memory for the length of the block, once it is ready.

        One that cannot be loaded is ready, too: the engine says that it does not serve it.
        """
        use = Use(checkpoint, wake, time.monotonic())
        with self._changed:
            self._grant(use)
            self._uses.append(use)
            if not use.is_ready:
                self._changed.notify_all()
        try:
            yield use
        finally:
            with self._changed:
                self._uses.remove(use)
                if not all(other.is_ready for other in self._uses):
                    self._changed.notify_all()

    def go_by(self, specs: Mapping[str, CheckpointSpec], drawn: Sequence[str]) -> None:
        """Offer these checkpoints from now on; return when those that are gone have left.

        drawn: those that are loaded before anybody asks, as far as they fit: they are there then.
        """
        new = {name: spec for name, spec in specs.items() if self._specs.get(name) != spec}
        sizes = sizes_of(new.values())
        with self._changed:
            for name in self._specs.keys() - specs.keys():
                self._leaving[name] = None
                self._forget(name)
            for name in new.keys() & self.failed.keys():  # its files have come since
                self._forget(name)
            self._specs = dict(specs)
            self._learn_sizes(new, sizes)
            self._ahead = [name for name in drawn if name not in self._loaded]
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_over or not (self._leaving or self._ahead))

    # --- with the lock ---

    def _forget(self, name: str) -> None:
        for known in (self._sizes, self.weights, self.failed):
            known.pop(name, None)

    def _learn_sizes(self, names: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Note how much memory checkpoints take, and which of them the budget never holds."""
        self._sizes = {**sizes, **self._sizes}
        most = self._rule.device_bytes
        for name in names:
            size_bytes = self._sizes.get(name, 0)
            if most is not None and size_bytes > most:
                told = f"its weights take {size_bytes / GB:.3g} GB of memory, and the pool's"
                reason = f"{told} device_memory_gb is {most / GB:.3g}"
                self._note_failure(LoadFailure(name, LoadProblem.MEMORY, reason))

    def _note_failure(self, failure: LoadFailure) -> None:
        sentence = self._explain(failure)
        log.error("model_not_served", problem=sentence)
        self.failed[failure.checkpoint] = sentence

    def _note_loaded(self, name: str, load_s: float) -> None:
        now = time.monotonic()
        self._sizes[name] = self._engine.weights_bytes(name)
        self._loaded[name] = _Loaded(self._sizes[name], now, load_s, now)
        self.weights[name] = self._engine.fingerprint(name).facts["weights"]

    def _grant(self, use: Use) -> None:
        """Note that a use need not wait, if it need not."""
        name = use.checkpoint
        found = self._loaded.get(name)
        is_here = found is not None and name not in self._closed
        is_vain = self._is_over or name not in self._specs or name in self.failed
        use.is_ready = is_here or is_vain
        if found is not None and is_here:
            found.used_at = time.monotonic()

    def _wake_the_ready(self) -> None:
        for use in self._uses:
            if use.is_ready:
                continue
            self._grant(use)
            if use.is_ready:
                telemetry.LOAD_WAIT_SECONDS.observe(time.monotonic() - use.since)
                use.wake()

    def _end(self) -> None:
        self._is_over = True
        self._wake_the_ready()
        self._changed.notify_all()

    def _num_jobs(self, name: str) -> int:
        return sum(use.is_ready and use.checkpoint == name for use in self._uses)

    def _next(self) -> Swap | None:
        """Choose what is loaded next, for those who wait, or else ahead of them."""
        if self._leaving:  # the room that they take is free then
            return None
        residents = [
            Resident(
                name=name,
                size_bytes=one.size_bytes,
                loaded_at=one.loaded_at,
                load_s=one.load_s,
                used_at=one.used_at,
                jobs=self._num_jobs(name),
            )
            for name, one in self._loaded.items()
        ]
        awaited: dict[str, Awaited] = {}
        for use in self._uses:
            name = use.checkpoint
            if not use.is_ready and name not in self._loaded:
                awaited.setdefault(name, Awaited(name, self._sizes.get(name, 0), use.since))
        if awaited:
            if self._rule.device_bytes is not None:
                self._ahead = []  # what is asked for decides
            return next_swap(residents, list(awaited.values()), self._rule, now=time.monotonic())
        ahead = [name for name in self._ahead if name in self._specs and name not in self.failed]
        taken_bytes = sum(one.size_bytes for one in residents)
        fitting = that_fit(ahead, self._sizes, taken_bytes=taken_bytes, rule=self._rule)
        self._ahead = [name for name in fitting if name not in self._loaded]
        return Swap(self._ahead[0]) if self._ahead else None

    # --- in its thread ---

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._take_turn()
        except EngineStopped:
            log.info("residency_ended", reason="the engine was stopped")
            if self._engine.is_device_lost:  # maybe with no job in hand that would tell
                self._give_up("its device was lost")
        except Exception:
            log.exception("residency_failed")
            self._give_up("its models can be neither loaded nor unloaded any more")
        finally:
            self.close()

    def _take_turn(self) -> None:
        """Carry out what is next, or wait until something is."""
        self._see_off()
        with self._changed:
            if self._is_over:
                return
            swap = self._next()
            evicted = swap.evicted if swap is not None else ()
            self._closed = frozenset(evicted)
            self._wake_the_ready()
            if swap is None or any(map(self._num_jobs, evicted)):
                self._changed.notify_all()  # whoever waits for a revision to be followed
                is_idle = all(use.is_ready for use in self._uses) and not self._leaving
                self._changed.wait(None if is_idle else LOOK_EVERY_S)
                return
        self._carry_out(swap)

    def _carry_out(self, swap: Swap) -> None:
        started = time.monotonic()
        for name in swap.evicted:
            self._evict(name)
        self._load(swap.loaded)
        if swap.evicted:
            telemetry.LOAD_SECONDS.labels("swap").observe(time.monotonic() - started)

    def _load(self, name: str) -> None:
        with self._changed:
            spec = self._specs.get(name)
            is_awaited = any(use.checkpoint == name for use in self._uses)
        if spec is None:  # a new revision took it away
            return
        try:
            times = self._engine.load(spec, is_awaited=is_awaited).result()
        except LoadFailed as error:
            with self._changed:
                if name in self._specs:
                    self._note_failure(error.failure)
        else:
            with self._changed:
                self._note_loaded(name, times.read_s + times.warm_up_s)
                self._wake_the_ready()
            phase = "copy" if times.is_copied else "read"
            telemetry.LOAD_SECONDS.labels(phase).observe(times.read_s)
            telemetry.LOAD_SECONDS.labels("warm_up").observe(times.warm_up_s)
            told = {"read_s": round(times.read_s, 3), "warm_up_s": round(times.warm_up_s, 3)}
            log.info("checkpoint_joined", checkpoint=name, **told)
        self._on_change(self)

    def _evict(self, name: str) -> None:
        started = time.monotonic()
        with suppress(UnknownCheckpoint):  # a new revision took it away
            self._engine.unload(name, may_return=True).result()
        unload_s = time.monotonic() - started
        telemetry.LOAD_SECONDS.labels("unload").observe(unload_s)
        log.info("checkpoint_evicted", checkpoint=name, unload_s=round(unload_s, 3))
        self._note_gone(name)

    def _see_off(self) -> None:
        """Begin to unload what is gone for good, and note what has left. Waits for no image."""
        with self._changed:
            leaving = dict(self._leaving)
        for name, gone in leaving.items():
            if gone is None:
                self._leaving[name] = self._begin_unload(name)
            elif gone.done():
                gone.result()
                log.info("checkpoint_left", checkpoint=name)
                with self._changed:
                    self._forget(name)  # its load may have ended since the revision came
                self._note_gone(name)
                with self._changed:
                    del self._leaving[name]
                    self._changed.notify_all()

    def _begin_unload(self, name: str) -> Future[None]:
        try:
            return self._engine.unload(name)
        except UnknownCheckpoint:  # it is not loaded
            self._engine.forget(name)
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing

    def _note_gone(self, name: str) -> None:
        with self._changed:
            self._loaded.pop(name, None)
            self._changed.notify_all()
        self._on_change(self)
