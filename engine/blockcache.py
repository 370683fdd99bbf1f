"""Skip most of a transformer for those rows of a batch that it would tell little news.

From one denoise step to the next a transformer often adds nearly the same to its input. The first
block always runs; where its residual changed little since the step that was last computed in full,
what all the other blocks added then is added again, and they are not run. As in `FirstBlockCache`
of diffusers, but decided row by row and remembered by image, never by place in the batch: rows that
need computing go on together as a smaller batch, and images may join and leave at every step.

Approximate by design, so for best-effort images of a checkpoint whose spec sets a threshold
(`block_cache_threshold` in fleet.toml). The smaller batch gives the *other* rows different last
bits as well: a forward with a reproducible image in it must stay outside of `rows()` altogether.
Outside of it the network is untouched.

For SD3 and FLUX transformers; UNets are refused: their later blocks take what earlier ones left for
them, so there is no one residual to remember. Each forward waits once for the device, as the
decision shapes the calls that follow: regional compilation of the blocks goes along with that, a
CUDA graph or a compiled whole network does not. It does not know requests, nor what a row was made
from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from engine.errors import EngineError, UnsupportedRequest
from engine.transfers import to_device

# These stand in the order in which a network runs them.
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
# Arguments of a block with one entry per row.
PER_ROW = frozenset({"hidden_states", "encoder_hidden_states", "temb"})
# Arguments that all rows share, by class of block; each returns the two hidden states, text
# first.
SHARED: dict[str, frozenset[str]] = {
    "JointTransformerBlock": frozenset(),  # SD3; its last one returns no text
    "FluxTransformerBlock": frozenset({"image_rotary_emb"}),
    "FluxSingleTransformerBlock": frozenset({"image_rotary_emb"}),
}

Streams = tuple[Tensor | None, Tensor]
"""Hidden states of the text and of the image, each [rows, tokens, width]."""


@dataclass(frozen=True, kw_only=True)
class RowKey:
    """Whose row it is, and where in its schedule that image stands."""

    image_id: str
    row: int  # within the image: 0 and 1 with guidance
    step: int  # denoise steps behind it
    num_steps: int


@dataclass(frozen=True)
class Memory:
    """What one row left behind when it was last computed in full.

    In memory of its own, not a view of the batch.
    """

    step: int
    first: Tensor  # what the first block added to the image stream, [tokens, width]
    first_size: Tensor  # its mean magnitude
    text: Tensor | None  # what the other blocks added to the text, where the last one returns it
    image: Tensor  # what they added to the image stream

    @property
    def size_bytes(self) -> int:
        """Return the memory it takes on the device."""
        return sum(
            tensor.nbytes
            for tensor in (self.first, self.first_size, self.text, self.image)
            if tensor is not None
        )


@dataclass(frozen=True)
class FirstBlock:
    """What the first block gave for every row, and whom it was the last for."""

    added: Tensor  # to the image stream
    text: Tensor
    image: Tensor
    skipped: dict[int, Memory]  # by row
    computed: list[int]  # rows that the other blocks run for
    index: Tensor | None  # the same on the device; None: every row


@dataclass
class Forward:
    """One forward under way."""

    keys: Sequence[RowKey | None]
    narrow: Callable[[list[int] | None], None]
    # The call of each block, kept while the cache replaces it.
    calls_before: list[Any] = field(default_factory=list)
    first: FirstBlock | None = None


class BlockCache:
    """The first-block cache of one transformer.

    Used by the engine's thread only; the counters may be read from any.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        threshold: float,
        max_bytes: int,
        warmup_steps: int = 2,
        last_steps: int = 1,
    ) -> None:
        """Look for the blocks; nothing is changed on the network until `rows()`.

        threshold: a row is skipped while the first block's residual differs by less than this share
        of its own mean magnitude; 0 skips nothing.  max_bytes: of memories on the device, about 51
        MiB per row of FLUX at 1024 px.  warmup_steps, last_steps: of each image, always computed in
        full.  Raises `UnsupportedRequest` for a network without the blocks this module knows.
        """
        self._blocks = _blocks_of(transformer)
        self.threshold = threshold
        self.max_bytes = max_bytes
        self.warmup_steps = warmup_steps
        self.last_steps = last_steps
        self.rows_computed = 0  # in full; like the next, of rows with a key
        self.rows_skipped = 0
        self._memories: LRUCache[tuple[str, int], Memory] = LRUCache(  # by image and row
            max_bytes,
            getsizeof=lambda memory: memory.size_bytes,
        )

    @property
    def size_bytes(self) -> int:
        """Return the memory of all remembered rows on the device."""
        return int(self._memories.currsize)

    @property
    def rows_remembered(self) -> int:
        """Count the rows that may be skipped at their next step.

        This is not `__len__`: an empty cache would count as false.
        """
        return len(self._memories)

    def facts(self) -> dict[str, Any]:
        """Tell what of it can change a bit, as plain JSON values."""
        return {
            "threshold": self.threshold,
            "warmup_steps": self.warmup_steps,
            "last_steps": self.last_steps,
        }

    @contextmanager
    def rows(
        self,
        keys: Sequence[RowKey | None],
        *,
        narrow: Callable[[list[int] | None], None] | None = None,
    ) -> Iterator[None]:
        """Let the next forward, of `len(keys)` rows, skip blocks within this context.

        Any forward after that one runs as without a cache.

        A row whose key is None is computed in full and not remembered, but its last bits depend on
        how many rows are computed with it (see the module).  narrow: called with the rows that the
        coming blocks hold, in their order, whenever some are left out, and with None when all are
        back. It serves whatever else works row by row, such as adapters.

        Raises `EngineError` within the forward when its rows are not those of `keys`, and
        `UnsupportedRequest` when its blocks are given arguments that this module knows neither as
        shared nor as per row. Either way the network is left unchanged.
        """
        for key in keys:
            if key is not None:
                self._memories.get((key.image_id, key.row))  # used now: others go before it
        forward = Forward(keys, narrow or (lambda rows: None))
        self._step_in(forward)
        try:
            yield
        finally:
            self._step_out(forward)

    def forget(self, image_id: str) -> None:
        """Give back what is remembered of an image. Harmless when there is nothing."""
        for place in [place for place in self._memories if place[0] == image_id]:
            del self._memories[place]

    def close(self) -> None:
        """Forget every image. Harmless when repeated."""
        self._memories.clear()

    # --- one forward ---

    def _step_in(self, forward: Forward) -> None:
        """Stand between the network and its blocks."""
        # A module's __call__ delegates to this attribute where it is set. `compile()` puts a
        # compiled block there, which stays in use. A replaced `forward` would be traced into the
        # compiled block, which would be lost at the first decision.
        forward.calls_before = [block._compiled_call_impl for block in self._blocks]
        steps = [self._run_first, *[self._run_between] * (len(self._blocks) - 2), self._run_last]
        for block, before, step in zip(self._blocks, forward.calls_before, steps, strict=True):
            block._compiled_call_impl = partial(
                step, forward, before or block._call_impl, SHARED[type(block).__name__]
            )

    def _step_out(self, forward: Forward) -> None:
        """Let the network call its blocks directly again, with all rows. Harmless when repeated."""
        for block, before in zip(self._blocks, forward.calls_before, strict=False):
            block._compiled_call_impl = before
        if forward.calls_before and forward.first is not None and forward.first.index is not None:
            forward.narrow(None)
        forward.calls_before = []

    def _run_first(
        self,
        forward: Forward,
        block: Callable[..., Streams],
        shared: frozenset[str],
        /,
        **arguments: Any,
    ) -> Streams:
        """Run the first block for all rows, and decide whom it was the last for."""
        _check_arguments(arguments, shared)
        before = arguments["hidden_states"]
        if len(before) != len(forward.keys):
            raise EngineError(
                f"a forward of {len(before)} rows "
                f"where the block cache was told of {len(forward.keys)}"
            )
        text, image = block(**arguments)
        assert text is not None, "only a last block returns no text"
        added = image - before
        skipped = self._skippable(forward.keys, added)
        computed = [row for row in range(len(before)) if row not in skipped]
        self.rows_skipped += len(skipped)
        self.rows_computed += sum(forward.keys[row] is not None for row in computed)
        index = None
        if skipped:
            index = to_device(torch.tensor(computed, dtype=torch.int64), image.device)
        forward.first = FirstBlock(added, text, image, skipped, computed, index)
        if index is None:
            return text, image
        forward.narrow(computed)
        return text[index], image[index]

    def _run_between(
        self,
        forward: Forward,
        block: Callable[..., Streams],
        shared: frozenset[str],
        /,
        **arguments: Any,
    ) -> Streams:
        """Run a block for the rows that are computed, if there are any."""
        first = forward.first
        if first is None or len(arguments["hidden_states"]) != len(first.computed):
            raise EngineError(
                "the first block was left out, "
                "or rows were changed after it, as by a control network"
            )
        if not first.computed:
            return arguments["encoder_hidden_states"], arguments["hidden_states"]
        if first.index is not None:
            arguments["temb"] = arguments["temb"][first.index]
        return block(**arguments)

    def _run_last(
        self,
        forward: Forward,
        block: Callable[..., Streams],
        shared: frozenset[str],
        /,
        **arguments: Any,
    ) -> Streams:
        """Run the last block for the computed rows, and put the skipped ones into their places.

        Remembers what all blocks added.
        """
        text, image = self._run_between(forward, block, shared, **arguments)
        self._step_out(forward)
        first = forward.first
        assert first is not None
        self._remember(forward.keys, first, text, image)
        if first.index is None:
            return text, image
        return _with_skipped(first, first.index, text, image)

    # --- what is remembered ---

    def _is_full(self, key: RowKey) -> bool:
        """Tell whether this step must be computed in full, whatever changed."""
        return key.step < self.warmup_steps or self._is_last(key)

    def _is_last(self, key: RowKey) -> bool:
        return key.step >= key.num_steps - self.last_steps

    def _skippable(self, keys: Sequence[RowKey | None], added: Tensor) -> dict[int, Memory]:
        """Return the rows that may be skipped, with what is remembered of them.

        To those rows the first block added nearly what it added when they were last computed.
        """
        known: dict[int, Memory] = {}
        for row, key in enumerate(keys):
            memory = (
                None
                if key is None or self._is_full(key)
                else self._memories.get((key.image_id, key.row))
            )
            # A memory of this step or a later one comes from a step that is now repeated, or from
            # another run of the image.
            if key is not None and memory is not None and memory.step < key.step:
                known[row] = memory
        if not known:
            return {}
        changes = [
            (added[row] - memory.first).abs().mean() / memory.first_size
            for row, memory in known.items()
        ]
        # The one wait for the device.
        changed = dict(zip(known, torch.stack(changes).tolist(), strict=True))
        return {row: memory for row, memory in known.items() if changed[row] < self.threshold}

    def _remember(
        self, keys: Sequence[RowKey | None], first: FirstBlock, text: Tensor | None, image: Tensor
    ) -> None:
        """Remember the rows just computed in full, to compare and complete later ones.

        It keeps what the first block added, and what the blocks after it added.  text, image:
        [computed rows, tokens, width] after the last block.
        """
        for nth, row in enumerate(first.computed):
            key = keys[row]
            if key is None:
                continue
            place = (key.image_id, key.row)
            self._memories.pop(place, None)
            if self._is_last(key):
                continue  # no step of this image will ask again
            added_first = first.added[row].clone()
            added_text = None if text is None else text[nth] - first.text[row]
            added_image = image[nth] - first.image[row]
            size = added_first.abs().mean()
            memory = Memory(key.step, added_first, size, added_text, added_image)
            if memory.size_bytes <= self.max_bytes:
                self._memories[place] = memory


def _blocks_of(transformer: nn.Module) -> list[Any]:
    """List the transformer's blocks in the order it runs them. Raises `UnsupportedRequest`."""
    lists = [
        module
        for name in BLOCK_LISTS
        if isinstance(module := getattr(transformer, name, None), nn.ModuleList)
    ]
    found: list[Any] = [block for blocks in lists for block in blocks]
    unknown = sorted({type(block).__name__ for block in found} - SHARED.keys())
    if len(found) < 2 or unknown:
        has = (
            f"blocks of class {', '.join(unknown)}" if unknown else "no transformer blocks in a row"
        )
        raise UnsupportedRequest(
            "block_cache", f"{type(transformer).__name__} has {has}, which it cannot skip"
        )
    return found


def _check_arguments(arguments: Mapping[str, Any], shared: frozenset[str]) -> None:
    """Raise `UnsupportedRequest` for an argument of which it is not known whose row is what."""
    unknown = arguments.keys() - PER_ROW - shared
    strange = sorted(
        name for name in unknown if isinstance(arguments[name], Tensor) or arguments[name]
    )
    if strange:
        raise UnsupportedRequest(
            "block_cache", f"whose row is what in {', '.join(strange)} is not known"
        )


def _with_skipped(first: FirstBlock, index: Tensor, text: Tensor | None, image: Tensor) -> Streams:
    """Give all rows: the computed ones, at `index`, and what is remembered of the others."""
    # The first block's output may be overwritten: the next blocks were given a copy of some of its
    # rows.
    skipped = first.skipped
    added_to_image = {row: memory.image for row, memory in skipped.items()}
    image = _filled(first.image, index, image, added_to_image)
    added_to_text = {row: memory.text for row, memory in skipped.items() if memory.text is not None}
    if text is None or not added_to_text:
        return None, image
    return _filled(first.text, index, text, added_to_text), image


def _filled(whole: Tensor, index: Tensor, computed: Tensor, added: dict[int, Tensor]) -> Tensor:
    """Replace the rows `index` of `whole` by computed ones, in place.

    To each other row it adds what is remembered for it.
    """
    whole[index] = computed
    for row, remembered in added.items():
        whole[row] += remembered
    return whole
