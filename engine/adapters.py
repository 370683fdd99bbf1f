"""Apply other adapters to every row of one forward.

Images with different LoRAs, other strengths, several adapters or none share a batch.

A bank keeps the adapters of one checkpoint in host memory and some of them in *slots* on the
device. Every layer that an adapter changes has the weights of all slots stacked, zeros in slot 0,
and a forward hook that picks each row's slots by an index and adds two batched matmuls (for a
convolution: one grouped convolution and a matmul). It knows rows of a forward, not images, and
never who asked.

Why a row's bits do not depend on its neighbours' adapters: all shapes follow from the number of
rows and the bank's rank, to which every adapter is padded with zeros (so it is one of the `facts`),
and rows never mix. A neighbour with more adapters makes another pair of matmuls run, which adds an
exact zero to a row that has no more. A layer that nobody's adapter changes is left alone.

Against diffusers with peft, one adapter for all rows, the result agrees within rounding, not bit
for bit: alpha / rank is folded into the weights, and the strength is applied where the rank is, not
at full width, which in bf16 can cost more than the matmuls.

For `torch.compile`: hooks and weights stay on the layers from construction to `close()`, because a
compiled network does not look for hooks that come later. The hook is one for all layers and breaks
no graph: without adapters a regionally compiled network needs no compilation more than without a
bank, with them one of each kind of block for every number of rows and of most adapters per row (so
give both a few fixed values, and the compiler room for them). Slots and strengths lie in buffers
that stay, one pair for each number of rows and of adapters, as a CUDA graph would need them.

Nothing here waits for the device: what a forward wears is written behind the forwards launched
before, and so are the weights of an adapter that had no slot, from pinned memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn
from torch.nn import functional

from engine.capabilities import AdapterFacts
from engine.config import AdapterSpec
from engine.errors import CheckpointCorrupt, EngineError, UnsupportedRequest
from engine.inspection import trigger_words
from engine.request import AdapterUse
from engine.transfers import to_device

MAX_STRENGTH = 10.0

LayerName = tuple[str, str]
"""A layer: the name of its network, and its own name within that."""


@dataclass(frozen=True)
class ForwardAdapters:
    """What the rows of one forward wear.

    Every row has as many adapters as the richest; those it does not have are slot 0.

    slots and strengths: one tensor per adapter of a row.
    """

    slots: tuple[Tensor, ...]  # of every row: [rows]
    # Each row's strength: [rows, 1, 1], fp32 whatever the checkpoint is in, so that 0.7 is 0.7.
    strengths: tuple[Tensor, ...]
    changes: list[bool]  # by layer: does an adapter in use change it?


class AdapterBank:
    """The adapters of one checkpoint, over all its networks.

    But for `check` and the plain facts, used by the engine's thread only.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        specs: Sequence[AdapterSpec],
        *,
        slots: int = 8,
        max_rank: int = 64,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Read and verify every file, and put hooks on the layers they change.

        networks: by the names diffusers gives their folders.  slots: different adapters in one
        forward.  dtype: the checkpoint's. Raises `CheckpointCorrupt` for a file that is missing,
        altered or broken, and `UnsupportedRequest` for one that is sound but not for these
        networks, of too high a rank, or no plain LoRA. Both name the adapter.
        """
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError("two adapters have one name")
        self._files = {
            spec.name: read_adapter(spec, networks, max_rank=max_rank, dtype=dtype)
            for spec in specs
        }
        if device.type == "cuda":
            self._files = {name: file.pinned() for name, file in self._files.items()}
        self.slots = min(slots, len(specs))
        self.rank = max((file.rank for file in self._files.values()), default=0)
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._device = device
        # Adapter -> its slot, least recently used first.
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        # Slots and strengths of a forward, by their shape: adapters of a row, rows.
        self._buffers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._whole_call: ForwardAdapters | None = None  # with all rows
        self._call: ForwardAdapters | None = None  # with those the coming layers hold
        self._layers: dict[LayerName, Any] = {}
        self._hooks: list[Any] = []
        self._hook_layers(networks, dtype)
        self._changes = {
            name: np.array([place in file.updates for place in self._layers])
            for name, file in self._files.items()
        }

    def _hook_layers(self, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        """Give every layer that an adapter changes its slots and a hook.

        Raises `ValueError` for a layer under another bank.
        """
        for place in sorted({place for file in self._files.values() for place in file.updates}):
            layer: Any = networks[place[0]].get_submodule(place[1])
            name = ".".join(place)
            if hasattr(layer, "adapter_slots"):
                raise ValueError(f"another bank lies over {name}")
            layer.adapter_slots = Slots(
                name, layer, len(self._layers), self.slots, self.rank, self._device, dtype
            )
            self._layers[place] = layer
            self._hooks.append(layer.register_forward_hook(self._after))

    @property
    def size_bytes(self) -> int:
        """Return the memory of the slots on the device, whether full or not."""
        return sum(layer.adapter_slots.size_bytes for layer in self._layers.values())

    def names(self) -> list[str]:
        """Return the names of all adapters that may be used."""
        return list(self._files)

    def describe(self) -> dict[str, AdapterFacts]:
        """Tell of each adapter what its file says of it."""
        return {
            name: AdapterFacts(rank=file.rank, trigger_words=file.trigger_words)
            for name, file in self._files.items()
        }

    def digest(self, name: str) -> str:
        """Give the sha256 of the adapter's file, hex."""
        return self._files[name].sha256

    def facts(self, uses: Sequence[AdapterUse]) -> list[dict[str, Any]]:
        """Return the facts of these adapters that can change a bit, as plain JSON values.

        They are in the order in which the adapters are added up.
        """
        return [
            {
                "name": use.name,
                "sha256": self.digest(use.name),
                "strength": float(use.strength),
                "padded_rank": self.rank,
            }
            for use in uses
        ]

    def check(self, uses: Sequence[AdapterUse]) -> None:
        """Raise `UnsupportedRequest` for what no row can wear. Any thread; no tensors."""
        for use in uses:
            if use.name not in self._files:
                raise UnsupportedRequest(
                    "adapters", f"{use.name!r} is none of {', '.join(self._files)}"
                )
            if not abs(use.strength) <= MAX_STRENGTH:  # put so that NaN is refused too
                raise UnsupportedRequest(
                    "adapters",
                    f"{use.name!r} has strength {use.strength}, which is not within -10..10",
                )
        if len({use.name for use in uses}) != len(uses):
            raise UnsupportedRequest("adapters", "one of them is named twice")
        if len(uses) > self.slots:
            raise UnsupportedRequest(
                "adapters", f"{len(uses)} are more than the {self.slots} that fit at once"
            )

    @contextmanager
    def rows(self, per_row: Sequence[tuple[AdapterUse, ...]]) -> Iterator[None]:
        """Apply the adapters `per_row[i]` to row i of every forward made within this context.

        `len(per_row)` is the number of rows of those forwards; () is no adapter. Adapters are
        applied in their order. Those without a slot are copied to the device, in place of those
        unused for longest. When no row wears any, the networks compute what they compute without a
        bank. Raises what `check` raises, and `EngineError` when the rows ask for more different
        adapters than there are slots. A forward of another number of rows raises `EngineError` at
        the first layer it would change.
        """
        for uses in set(per_row):
            self.check(uses)
        if any(per_row):
            self._whole_call = self._arrange(per_row)
        self._call = self._whole_call
        try:
            yield
        finally:
            self._whole_call = self._call = None

    def narrow(self, rows: Sequence[int] | None) -> None:
        """Tell the bank that the coming layers hold only these rows, in this order; None: all
        again.

        For code that skips rows on the way. Without effect outside of `rows()`, and at its end.
        """
        whole = self._whole_call
        if whole is None or rows is None:
            self._call = whole
            return
        chosen = to_device(torch.tensor(rows, dtype=torch.int64), self._device)
        self._call = replace(
            whole,
            slots=tuple(slots[chosen] for slots in whole.slots),
            strengths=tuple(strengths[chosen] for strengths in whole.strengths),
        )

    def close(self) -> None:
        """Take hooks and slots off the layers: the networks are as they were.

        Harmless when repeated.
        """
        for hook, layer in zip(self._hooks, self._layers.values(), strict=True):
            hook.remove()
            del layer.adapter_slots
        self._hooks.clear()
        self._layers.clear()

    def _arrange(self, per_row: Sequence[tuple[AdapterUse, ...]]) -> ForwardAdapters:
        """Load the adapters of a forward, and say which slots each row wears at which strength."""
        names = list(dict.fromkeys(use.name for uses in per_row for use in uses))
        self._fill_slots(names)
        slots = np.zeros((max(len(uses) for uses in per_row), len(per_row)), dtype=np.int64)
        strengths = np.zeros(slots.shape, dtype=np.float32)
        for row, uses in enumerate(per_row):
            for nth, use in enumerate(uses):
                slots[nth, row] = self._slot_of[use.name]
                strengths[nth, row] = use.strength
        slots_buffer, strengths_buffer = self._buffers_of(slots.shape)
        slots_buffer.copy_(to_device(torch.from_numpy(slots), self._device))
        strengths_buffer.copy_(to_device(torch.from_numpy(strengths), self._device))
        return ForwardAdapters(
            slots=slots_buffer.unbind(),
            strengths=strengths_buffer[..., None, None].unbind(),
            changes=np.logical_or.reduce([self._changes[name] for name in names]).tolist(),
        )

    def _buffers_of(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the buffers for slots and strengths of this shape."""
        if shape not in self._buffers:
            zeros = partial(torch.zeros, shape, device=self._device)
            with torch.inference_mode(False):  # else they could be written in that mode alone
                self._buffers[shape] = zeros(dtype=torch.int64), zeros(dtype=torch.float32)
        return self._buffers[shape]

    def _fill_slots(self, names: Sequence[str]) -> None:
        """See that every one of these adapters has a slot."""
        if len(names) > self.slots:
            raise EngineError(
                f"a forward asks for {len(names)} different adapters, {self.slots} fit at once"
            )
        loaded = [name for name in names if name in self._slot_of]
        missing = [name for name in names if name not in self._slot_of]
        self.hits += len(loaded)
        self.misses += len(missing)
        for name in loaded:
            self._slot_of.move_to_end(name)  # behind all that may be evicted
        for name in missing:
            slot = self._free_slot()
            self._load(name, slot)
            self._slot_of[name] = slot

    def _free_slot(self) -> int:
        if len(self._slot_of) < self.slots:
            return min(set(range(1, self.slots + 1)) - set(self._slot_of.values()))
        self.evictions += 1
        return self._slot_of.popitem(last=False)[1]

    @torch.inference_mode()
    def _load(self, name: str, slot: int) -> None:
        # On a GPU the copies are queued behind the forwards already launched, so those still use
        # the old weights.
        for place, layer in self._layers.items():
            layer.adapter_slots.fill(slot, self._files[name].updates.get(place))

    def _after(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to each row of a layer's output what the row's adapters change.

        This is the hook of every adapted layer.
        """
        call = self._call
        if call is None:
            return output
        slots: Slots = layer.adapter_slots
        # Compiled code must not depend on which layer it is; there an unchanged layer adds zeros.
        if not torch.compiler.is_compiling() and not call.changes[slots.ordinal]:
            return output
        rows = inputs[0]
        for chosen, strengths in zip(call.slots, call.strengths, strict=True):
            if len(rows) != len(chosen):
                raise EngineError(
                    f"adapters lie over {len(chosen)} rows, but {slots.name} was given {len(rows)}"
                )
            down = slots.down.index_select(0, chosen)
            up = slots.up.index_select(0, chosen)
            output = slots.add(layer, rows, output, down, up, strengths)
        return output


@dataclass(frozen=True)
class Update:
    """What an adapter of strength 1 adds to one layer, laid out as the layer multiplies by it.

    `up` has alpha / rank folded in.
    """

    down: Tensor  # linear: [in, rank].  convolution: [rank, in, kernel_h, kernel_w]
    up: Tensor  # linear: [rank, out].  convolution: [out, rank]
    rank: int


class Slots:
    """The weights of every slot at one layer.

    Slot 0 is zeros, and ranks below the bank's are padded with zeros.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        ordinal: int,
        slots: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.ordinal = ordinal
        self.add: Callable[[Any, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        if isinstance(layer, nn.Conv2d):
            self.add = _add_to_pixels if _is_pointwise(layer) else _add_to_convolution
            self.down = zeros((slots + 1, rank, layer.in_channels, *layer.kernel_size))
            self.up = zeros((slots + 1, layer.out_channels, rank))
        else:
            self.add = _add_to_linear
            self.down = zeros((slots + 1, layer.in_features, rank))
            self.up = zeros((slots + 1, rank, layer.out_features))

    @property
    def size_bytes(self) -> int:
        """Return the memory of all slots."""
        return self.down.nbytes + self.up.nbytes

    def fill(self, slot: int, update: Update | None) -> None:
        """Put an adapter's part into a slot; None: the adapter leaves this layer as it is."""
        self.down[slot].zero_()  # enough: where `down` gives zeros, what is left in `up` has no say
        if update is not None:
            for stack, part in ((self.down, update.down), (self.up, update.up)):
                stack[slot][tuple(slice(size) for size in part.shape)].copy_(
                    part, non_blocking=True
                )


# Each function returns the output with every row's own update added, in place where possible.
# rows, output: [b, ...].  down, up: [b, ...], as in `Update`.  strengths: [b, 1, 1].


def _add_to_linear(
    layer: nn.Linear, rows: Tensor, output: Tensor, down: Tensor, up: Tensor, strengths: Tensor
) -> Tensor:
    """Add to the output of a linear layer.  rows: [b, ..., in].  output: [b, ..., out]."""
    inner = torch.bmm(rows.reshape(len(rows), -1, layer.in_features), down).mul_(strengths)
    return output.reshape(len(rows), -1, layer.out_features).baddbmm_(inner, up).view(output.shape)


def _add_to_pixels(
    layer: nn.Conv2d, rows: Tensor, output: Tensor, down: Tensor, up: Tensor, strengths: Tensor
) -> Tensor:
    """Add to the output of a 1x1 convolution.  rows, output: [b, c, h, w]."""
    inner = torch.bmm(down.flatten(2), rows.flatten(2)).mul_(strengths)
    return output.add_(torch.bmm(up, inner).view(output.shape))


def _add_to_convolution(
    layer: nn.Conv2d, rows: Tensor, output: Tensor, down: Tensor, up: Tensor, strengths: Tensor
) -> Tensor:
    """Turn rows into groups of one convolution, so that each meets a kernel of its own.

    rows, output: [b, c, h, w].
    """
    grouped = rows.reshape(1, -1, *rows.shape[2:])
    kernels = down.flatten(0, 1)
    inner = functional.conv2d(
        grouped, kernels, None, layer.stride, layer.padding, layer.dilation, groups=len(rows)
    )
    inner = inner.reshape(len(rows), down.shape[1], -1).mul_(strengths)
    return output.add_(torch.bmm(up, inner).view(output.shape))


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


@dataclass(frozen=True)
class AdapterFile:
    """One adapter, verified and taken apart by layer.

    In memory of its own, so what becomes of the file changes nothing.
    """

    sha256: str
    updates: Mapping[LayerName, Update]
    trigger_words: tuple[str, ...] = ()

    def pinned(self) -> AdapterFile:
        """Give the same in pinned memory.

        All in one block, for torch rounds each block up to a power of two.
        """
        halves = [half for update in self.updates.values() for half in (update.down, update.up)]
        block = torch.cat([half.flatten() for half in halves]).pin_memory()
        parts = block.split([half.numel() for half in halves])
        views = iter(part.view(half.shape) for part, half in zip(parts, halves, strict=True))
        updates = {
            place: Update(next(views), next(views), update.rank)
            for place, update in self.updates.items()
        }
        return replace(self, updates=updates)

    @property
    def rank(self) -> int:
        """Return its largest rank."""
        return max((update.rank for update in self.updates.values()), default=0)


def read_adapter(
    spec: AdapterSpec, networks: Mapping[str, nn.Module], *, max_rank: int, dtype: torch.dtype
) -> AdapterFile:
    """Read one safetensors file, in the words of diffusers and peft or of kohya.

    Nothing else is ever unpacked. Every tensor in it must belong to a layer of `networks`. Raises
    as `AdapterBank` does.
    """
    data, sha256 = _verified(spec)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as problem:
        raise CheckpointCorrupt(
            spec.path, f"adapter {spec.name!r} is no safetensors file: {problem}"
        ) from problem
    try:
        updates = _updates(tensors, _training_facts(data), networks, max_rank, dtype)
    except ValueError as problem:
        raise UnsupportedRequest("adapters", f"{spec.name!r} {problem}") from problem
    _check_finite(spec, updates, dtype)
    return AdapterFile(sha256, updates, trigger_words(_header_facts(data)))


def _verified(spec: AdapterSpec) -> tuple[bytes, str]:
    """Read the file; give its content and sha256.

    Raises `CheckpointCorrupt` where it cannot be read, or is not the file that `spec` lists.
    """
    try:
        data = Path(spec.path).read_bytes()
    except OSError as problem:
        raise CheckpointCorrupt(
            spec.path, f"adapter {spec.name!r} cannot be read: {problem.strerror}"
        ) from problem
    sha256 = hashlib.sha256(data).hexdigest()
    if spec.sha256 and sha256 != spec.sha256.lower():
        raise CheckpointCorrupt(
            spec.path, f"adapter {spec.name!r} has sha256 {sha256}, not {spec.sha256.lower()}"
        )
    return data, sha256


def _check_finite(
    spec: AdapterSpec, updates: Mapping[LayerName, Update], dtype: torch.dtype
) -> None:
    for place, update in updates.items():
        if not (torch.isfinite(update.down).all() and torch.isfinite(update.up).all()):
            raise CheckpointCorrupt(
                spec.path,
                f"adapter {spec.name!r} holds NaN or infinity for {'.'.join(place)}, as {dtype}",
            )


ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
# What may stand before a denoiser's own names: nothing, what peft writes for a bare network, what
# ComfyUI and its trainers write.
DENOISER_PREFIXES = ("", "base_model.model.", "diffusion_model.")
KOHYA_NETWORKS = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
}


def _updates(
    tensors: dict[str, Tensor],
    facts: Mapping[str, Any],
    networks: Mapping[str, nn.Module],
    max_rank: int,
    dtype: torch.dtype,
) -> dict[LayerName, Update]:
    """Find the layer of every tensor.

    Raises `ValueError` for what cannot be laid over these networks.
    """
    spellings = _spellings(networks)
    updates: dict[LayerName, Update] = {}
    for stem, parts in _by_stem(tensors).items():
        pieces = {stem: parts} if stem in spellings else _converted(stem, parts, networks)
        if not pieces or not pieces.keys() <= spellings.keys():
            raise ValueError(f"changes {stem!r}, a layer that is not here")
        for piece, halves in pieces.items():
            place = spellings[piece]
            name = ".".join(place)
            if place in updates:
                raise ValueError(f"changes {name} twice")
            # The rank is the trained one, which a conversion may have split.
            scale = _scale(parts, facts, place)
            layer = networks[place[0]].get_submodule(place[1])
            update = _fitted(layer, name, halves["down"], halves["up"], scale, dtype)
            if update.rank > max_rank:
                raise ValueError(
                    f"has rank {update.rank} for {name}, where {max_rank} is the limit"
                )
            updates[place] = update
    if not updates:
        raise ValueError("changes nothing")
    return updates


def _by_stem(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors that belong to one layer, by the file's name for it.

    Each group is {"down": ..., "up": ..., perhaps "alpha": ...}.
    """
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in convert_unet_state_dict_to_peft(tensors).items():
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise ValueError(
                "is a DoRA (it holds dora_scale), "
                "which rescales the checkpoint's own weights and so cannot differ by row"
            )
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if ending is None:
            raise ValueError(f"holds {key!r}, which is no part of a plain LoRA")
        stems.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = tensor
    if sum(len(parts) for parts in stems.values()) != len(tensors):
        raise ValueError("holds a tensor twice, under two names")
    _check_pairs(stems)
    return stems


def _check_pairs(stems: Mapping[str, Mapping[str, Tensor]]) -> None:
    for stem, parts in stems.items():
        if not {"down", "up"} <= parts.keys() or not all(
            parts[half].ndim > 1 and parts[half].numel() for half in ("down", "up")
        ):
            raise ValueError(f"holds no complete pair of matrices for {stem!r}")


def _spellings(networks: Mapping[str, nn.Module]) -> dict[str, LayerName]:
    """Return every name that a file may use for a layer, with the layer's place."""
    spellings: dict[str, LayerName] = {}
    for network, module in networks.items():
        for name, layer in module.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            # The second spelling has a level of CLIP's that transformers has dropped.
            for spelled in (name, f"text_model.{name}"):
                spellings[f"{network}.{spelled}"] = (network, name)
                for prefix, meant in KOHYA_NETWORKS.items():
                    if network in meant:
                        spellings[prefix + spelled.replace(".", "_")] = (network, name)
            if network in ("unet", "transformer"):
                for prefix in DENOISER_PREFIXES:
                    spellings[prefix + name] = (network, name)
    return spellings


def _converted(
    stem: str, parts: Mapping[str, Tensor], networks: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """Let diffusers translate one layer from the names in the original repositories.

    Here it may be several, or none.
    """
    tensors = {f"{stem}.lora_down.weight": parts["down"], f"{stem}.lora_up.weight": parts["up"]}
    try:
        if isinstance(networks.get("unet"), UNet2DConditionModel):
            converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
                tensors, unet_config=networks["unet"].config
            )
        elif isinstance(networks.get("transformer"), FluxTransformer2DModel):
            converted = FluxLoraLoaderMixin.lora_state_dict(tensors)
        else:
            return {}
    except Exception as problem:
        # Of every kind: the translators index and assert their way through foreign names.
        raise ValueError(f"changes {stem!r}, a layer that is not here") from problem
    return _by_stem(converted)


def _fitted(
    layer: Any, name: str, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype
) -> Update:
    """Lay the two matrices out for their layer. Raises `ValueError` where they do not fit it."""
    is_convolution = isinstance(layer, nn.Conv2d)
    if is_convolution and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise ValueError(
            f"changes {name}, a convolution in groups or with other padding than zeros"
        )
    out, *inside = layer.weight.shape
    rank = len(down)
    up_shape = [out, rank, *[1, 1] * is_convolution]
    if list(down.shape) != [rank, *inside] or list(up.shape) != up_shape:
        raise ValueError(
            f"has shapes {list(down.shape)} and {list(up.shape)} for {name}, "
            f"whose weight is {[out, *inside]}"
        )
    if is_convolution:
        up = up.flatten(1)
    else:
        down = down.T
        up = up.T
    return Update(down.to(dtype).contiguous(), (up.float() * scale).to(dtype).contiguous(), rank)


def _training_facts(data: bytes) -> dict[str, Any]:
    """Tell what diffusers notes of the peft config in a file's header: {"unet.lora_alpha": 8, ...}.

    {} where it did not.
    """
    facts: dict[str, Any] = json.loads(_header_facts(data).get("lora_adapter_metadata", "{}"))
    return facts


def _header_facts(data: bytes) -> dict[str, str]:
    """Give what the file's maker wrote into its header."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts: dict[str, str] = header.get("__metadata__", {})
    return facts


def _scale(parts: Mapping[str, Tensor], facts: Mapping[str, Any], place: LayerName) -> float:
    """Return alpha / rank, by the file's own tensor, else by the trainer's note.

    1 where the file does not say.
    """
    network, name = place
    rank = len(parts["down"])
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"holds more than one alpha for {'.'.join(place)}")
        return float(parts["alpha"]) / rank
    alpha = facts.get(f"{network}.lora_alpha", rank)
    for pattern, other in facts.get(f"{network}.alpha_pattern", {}).items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise ValueError(
                f"scales its layers by the pattern {pattern!r}, which is no plain name"
            )
        if name == pattern.removeprefix("^") or name.endswith(f".{pattern}"):
            alpha = other
    return float(alpha) / (math.sqrt(rank) if facts.get(f"{network}.use_rslora") else rank)
