"""The checkpoints on one device: which there are, what they admit, and what decides their bits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from engine.config import CheckpointSpec
from engine.device import Device, is_out_of_memory
from engine.errors import (
    CheckpointAbsent,
    CheckpointCorrupt,
    DeviceLost,
    EngineError,
    LoadFailure,
    LoadProblem,
    NothingLoaded,
    TooLittleMemory,
    UnknownCheckpoint,
    UnsupportedRequest,
)
from engine.fingerprint import Fingerprint, fingerprint
from engine.inflight import BatchKey, InFlight
from engine.loading import LoadedCheckpoint, load_checkpoint
from engine.request import ImageRequest
from engine.validation import check_offered, check_rows, check_values

log = logging.getLogger(__name__)

MAX_FINGERPRINTS = 256  # remembered; strengths of adapters are anybody's numbers
SPEED = ("channels_last", "compile_blocks", "cuda_graphs")  # what a spec asks of `acceleration.py`


class LoadedCheckpoints(Mapping[str, LoadedCheckpoint]):
    """Checkpoints by name: those that are served.

    Others are held as well: on their way in or out. Only the device thread changes what is held;
    any thread may read.
    """

    def __init__(
        self,
        specs: Sequence[CheckpointSpec],
        *,
        max_batch_rows: int,
        may_lack_some: bool = False,
        load_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Raise `ValueError` where two have one name.

        max_batch_rows: of one forward.  may_lack_some: one that cannot be loaded does not keep the
        others from being served.  load_turn: see `Engine`.
        """
        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise ValueError("two checkpoints have one name")
        self.failures: Mapping[str, LoadFailure] = {}  # by checkpoint
        self._may_lack_some = may_lack_some
        self._load_turn = load_turn
        self.load_s = 0.0  # reading and verifying all of them, those that are gone included
        self._max_batch_rows = max_batch_rows
        # Never changed in place: other threads iterate.
        self.held: Mapping[str, LoadedCheckpoint] = {}
        self._served: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._device_facts: dict[str, Any] = {}
        self._fingerprints: dict[tuple[str, int | None, str], Fingerprint] = {}

    def __getitem__(self, name: str) -> LoadedCheckpoint:
        """Find one that is held."""
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    # --- they come and go ---

    def prepare(self, device: Device) -> None:
        """Note the device's facts once, for fingerprints."""
        self._device_facts = device.facts()

    def read(
        self,
        spec: CheckpointSpec,
        device: Device,
        *,
        pace: Callable[[], AbstractContextManager[None]] = nullcontext,
        working_bytes: int = 0,
        hash_threads: int = 1,
    ) -> LoadedCheckpoint:
        """Verify and read a checkpoint; it is not held yet. Raises as `load_checkpoint`."""
        return load_checkpoint(
            spec,
            device,
            pace=pace,
            turn=self._load_turn,
            working_bytes=working_bytes,
            hash_threads=hash_threads,
        )

    def add(self, loaded: LoadedCheckpoint) -> None:
        """Hold a checkpoint, not served yet. Raises `ValueError` where one has its name."""
        name = loaded.spec.name
        if name in self.held:
            raise ValueError(f"a checkpoint named {name!r} is loaded already; unload that first")
        self.held = {**self.held, name: loaded}
        self.load_s += loaded.load_s

    def serve(self, name: str) -> None:
        """Let callers ask for a checkpoint that is held."""
        with self._lock:
            self._served = (*self._served, name)
            self.failures = {key: one for key, one in self.failures.items() if key != name}

    def withhold(self, name: str) -> None:
        """Let callers ask for it no more. Raises `UnknownCheckpoint`."""
        with self._lock:
            self.find(name)
            self._served = tuple(served for served in self._served if served != name)

    def drop(self, name: str) -> LoadedCheckpoint:
        """Hold a checkpoint no more, and return it."""
        with self._lock:
            self._served = tuple(served for served in self._served if served != name)
        dropped = self.held[name]
        self.held = {key: one for key, one in self.held.items() if key != name}
        self._fingerprints = {
            key: one for key, one in list(self._fingerprints.items()) if key[0] != name
        }
        return dropped

    @contextmanager
    def may_fail(self, name: str, device: Device) -> Iterator[None]:
        """Drop the checkpoint and note why, if it may be lacking and the block raises.

        Raises `DeviceLost` where no checkpoint could be loaded any more, by whatever error.
        """
        try:
            yield
        except Exception as problem:
            if not isinstance(problem, EngineError) and device.is_lost():
                raise DeviceLost(f"the device was lost: {problem!r}") from problem
            if not self._may_lack_some:
                raise
            self.note_failure(name, problem)
            if name in self.held:
                self.drop(name)
        else:
            return
        # Here and not above: the error held the tensors by its traceback.
        device.free_cached_memory()

    def note_failure(self, name: str, problem: Exception) -> LoadFailure:
        """Keep and log why a checkpoint is not served."""
        failure = _failure(name, problem)
        is_planned = failure.kind is not LoadProblem.UNPLANNED
        log.error(
            "checkpoint_not_loaded",
            extra={"checkpoint": name, "problem": failure.problem},
            exc_info=None if is_planned else problem,
        )
        if name not in self._served:
            with self._lock:
                self.failures = {**self.failures, name: failure}
        return failure

    def check_any_is_loaded(self) -> None:
        """Raise `NothingLoaded` if every checkpoint failed."""
        if self.failures and not self.held:
            raise NothingLoaded(list(self.failures.values()))

    @property
    def weights_bytes(self) -> int:
        """Return the memory of all networks that are held."""
        return sum(loaded.weights_bytes for loaded in self.held.values())

    # --- what is asked of them ---

    def find(self, name: str) -> LoadedCheckpoint:
        """Give the checkpoint of that name that is served. Raises `UnknownCheckpoint`."""
        loaded = self.held.get(name)
        if loaded is None or name not in self._served:
            raise UnknownCheckpoint(name, sorted(self._served))
        return loaded

    def admit(self, request: ImageRequest) -> InFlight:
        """Check every field a caller can get wrong; give the image, submitted now.

        Raises `UnsupportedRequest`, naming the field, or `UnknownCheckpoint`.
        """
        return self._admit(request, self.find(request.checkpoint))

    def admit_before_service(self, request: ImageRequest) -> InFlight:
        """Check a request as `admit` does, also for a checkpoint that is only held: its warm-up."""
        return self._admit(request, self.held[request.checkpoint])

    def _admit(self, request: ImageRequest, loaded: LoadedCheckpoint) -> InFlight:
        check_values(request)
        check_offered(request, loaded.spec)
        if loaded.adapters is not None:
            loaded.adapters.check(request.adapters)
        loaded.family.check(request)
        rows = loaded.family.rows(request)
        check_rows(request, rows, self._max_batch_rows)
        text_length = loaded.family.text_length(request)
        key = BatchKey(request.checkpoint, request.height_px, request.width_px, text_length)
        return InFlight(
            request=request,
            batch_key=key,
            rows=rows,
            # A reproducible image computes every block, whatever the catalogue allows.
            skips_blocks=(
                loaded.block_cache is not None
                and request.may_skip_blocks
                and not request.is_reproducible
            ),
            submitted_at=time.monotonic(),
        )

    # --- what decides bits ---

    def fingerprint(self, name: str, bucket_rows: int | None = None) -> Fingerprint:
        """Give what besides a plain request can change a bit of an image of this checkpoint."""
        loaded = self._held(name)
        blocks = _block_facts(loaded) if bucket_rows is None else None
        return self._fingerprint(loaded, bucket_rows, [], blocks, "")

    def fingerprint_of(self, image: InFlight) -> Fingerprint:
        """Give what besides its request can change a bit of this image."""
        request = image.request
        loaded = self._held(request.checkpoint)
        blocks = _block_facts(loaded) if image.skips_blocks else None
        return self._fingerprint(
            loaded,
            request.pinned_rows,
            loaded.adapter_facts(request),
            blocks,
            image.origin,
        )

    def _held(self, name: str) -> LoadedCheckpoint:
        """Give a checkpoint that is served, on its way in or out. Raises `UnknownCheckpoint`."""
        loaded = self.held.get(name)
        if loaded is None:
            raise UnknownCheckpoint(name, sorted(self._served))
        return loaded

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
                speed={name: getattr(loaded.spec, name) for name in SPEED},
                device_facts=self._device_facts,
                family_facts=loaded.facts(),
            )
            if len(self._fingerprints) >= MAX_FINGERPRINTS:
                self._fingerprints.clear()
            self._fingerprints[key] = known
        return known

    def stats(self) -> dict[str, Any]:
        """Return plain numbers since the start, of all checkpoints together."""
        loaded = list(self.held.values())
        banks = [one.adapters for one in loaded if one.adapters is not None]
        block_caches = [one.block_cache for one in loaded if one.block_cache is not None]
        return {
            "loads": len(loaded),
            "load_s": self.load_s,
            "adapter_hits": sum(bank.hits for bank in banks),
            "adapter_misses": sum(bank.misses for bank in banks),
            "adapter_bytes": sum(bank.size_bytes for bank in banks),
            "block_cache_rows_skipped": sum(cache.rows_skipped for cache in block_caches),
            "block_cache_rows_computed": sum(cache.rows_computed for cache in block_caches),
        }


def _failure(name: str, problem: Exception) -> LoadFailure:
    if isinstance(problem, CheckpointCorrupt):
        return LoadFailure(name, LoadProblem.FILES, str(problem))
    if isinstance(problem, CheckpointAbsent):
        return LoadFailure(name, LoadProblem.ABSENT, str(problem))
    if isinstance(problem, UnsupportedRequest):
        return LoadFailure(name, LoadProblem.SETTINGS, str(problem))
    if isinstance(problem, TooLittleMemory):
        return LoadFailure(name, LoadProblem.MEMORY, str(problem))
    if is_out_of_memory(problem):
        text = "it does not fit into the memory that the device has left"
        return LoadFailure(name, LoadProblem.MEMORY, text)
    lines = str(problem).strip().splitlines() or [""]
    text = f"{type(problem).__name__}: {lines[0]}"[:300]
    return LoadFailure(name, LoadProblem.UNPLANNED, text)


def _block_facts(loaded: LoadedCheckpoint) -> dict[str, Any] | None:
    return None if loaded.block_cache is None else loaded.block_cache.facts()
