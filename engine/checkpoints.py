"""The checkpoints on one device: which there are, what they admit, and what decides their bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engine.config import CheckpointSpec
from engine.device import Device, is_out_of_memory
from engine.errors import (
    CheckpointCorrupt,
    LoadFailure,
    LoadProblem,
    NothingLoaded,
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
    """Checkpoints by name.

    Empty until `load`, which the device thread calls; any thread may read.
    """

    def __init__(
        self, specs: Sequence[CheckpointSpec], *, max_batch_rows: int, may_lack_some: bool = False
    ) -> None:
        """Raise `ValueError` where two have one name.

        max_batch_rows: of one forward.  may_lack_some: one that cannot be loaded does not keep the
        others from being served.
        """
        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise ValueError("two checkpoints have one name")
        self.failures: dict[str, LoadFailure] = {}  # by checkpoint
        self._may_lack_some = may_lack_some
        self.load_s = 0.0  # reading and verifying all of them
        self._max_batch_rows = max_batch_rows
        self._loaded: dict[str, LoadedCheckpoint] = {}
        self._device_facts: dict[str, Any] = {}
        self._fingerprints: dict[tuple[str, int | None, str], Fingerprint] = {}

    def __getitem__(self, name: str) -> LoadedCheckpoint:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, device: Device) -> None:
        """Verify and read every checkpoint once.

        Raises as `load_checkpoint`; if some may be lacking, `NothingLoaded` when all are.
        """
        self._device_facts = device.facts()
        for spec in self.specs.values():
            with self.may_fail(spec.name, device):
                self._loaded[spec.name] = load_checkpoint(spec, device)
        self.check_any_is_loaded()
        self.load_s = sum(loaded.load_s for loaded in self._loaded.values())

    @contextmanager
    def may_fail(self, name: str, device: Device) -> Iterator[None]:
        """Drop the checkpoint and note why, if it may be lacking and the block raises."""
        try:
            yield
        except Exception as problem:
            if not self._may_lack_some:
                raise
            failure = _failure(name, problem)
            is_planned = failure.kind is not LoadProblem.UNPLANNED
            log.error(
                "checkpoint_not_loaded",
                extra={"checkpoint": name, "problem": failure.problem},
                exc_info=None if is_planned else problem,
            )
            self.failures[name] = failure
            self._loaded.pop(name, None)
        else:
            return
        # Here and not above: the error held the tensors by its traceback.
        device.free_cached_memory()

    def check_any_is_loaded(self) -> None:
        """Raise `NothingLoaded` if every checkpoint failed."""
        if self.failures and not self._loaded:
            raise NothingLoaded(list(self.failures.values()))

    def find(self, name: str) -> LoadedCheckpoint:
        """Give the checkpoint of that name. Raises `UnknownCheckpoint`."""
        if name not in self._loaded:
            raise UnknownCheckpoint(name, sorted(self._loaded))
        return self._loaded[name]

    def admit(self, request: ImageRequest) -> InFlight:
        """Check every field a caller can get wrong; give the image, submitted now.

        Raises `UnsupportedRequest`, naming the field, or `UnknownCheckpoint`.
        """
        loaded = self.find(request.checkpoint)
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
        loaded = self.find(name)
        blocks = _block_facts(loaded) if bucket_rows is None else None
        return self._fingerprint(loaded, bucket_rows, [], blocks, "")

    def fingerprint_of(self, image: InFlight) -> Fingerprint:
        """Give what besides its request can change a bit of this image."""
        request = image.request
        loaded = self.find(request.checkpoint)
        blocks = _block_facts(loaded) if image.skips_blocks else None
        return self._fingerprint(
            loaded,
            request.pinned_rows,
            loaded.adapter_facts(request),
            blocks,
            image.origin,
        )

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
                family_facts=loaded.family.facts(),
            )
            if len(self._fingerprints) >= MAX_FINGERPRINTS:
                self._fingerprints.clear()
            self._fingerprints[key] = known
        return known

    def stats(self) -> dict[str, Any]:
        """Return plain numbers since the start, of all checkpoints together."""
        loaded = list(self._loaded.values())
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
    if isinstance(problem, UnsupportedRequest):
        return LoadFailure(name, LoadProblem.SETTINGS, str(problem))
    if is_out_of_memory(problem):
        text = "it does not fit into the memory that the device has left"
        return LoadFailure(name, LoadProblem.MEMORY, text)
    lines = str(problem).strip().splitlines() or [""]
    text = f"{type(problem).__name__}: {lines[0]}"[:300]
    return LoadFailure(name, LoadProblem.UNPLANNED, text)


def _block_facts(loaded: LoadedCheckpoint) -> dict[str, Any] | None:
    return None if loaded.block_cache is None else loaded.block_cache.facts()
