"""Split the calls of unknown networks into rows, so that calls of several images become one.

Nothing here knows what an argument means. Which axis of which tensor counts rows is *probed*: the
same call is made for one image and for two, and what doubles is per row; what does not is shared,
and strangers share a forward only where it is equal. That a network keeps rows apart is then
*proved* on the network itself: rows come out the same, bit by bit, beside themselves and beside
others. A call that has no proof is nobody's to join.

A value is a tensor, something plain, or tuples, lists, dicts and diffusers outputs of values.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
# The largest shared tensor that is compared: for a larger one, the comparison at every step costs
# more than batching saves.
MAX_COMPARED_BYTES = 16 * 1024 * 1024


class CallsDiffer(Exception):
    """These calls cannot be made as one, or not by this form."""


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call of a network, as its pipeline made it."""

    network: str  # the pipeline's name for it: unet, transformer, controlnet…
    context: str  # the cache context it was made in: cond, uncond…; mostly ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# --- forms of a value -----------------------------------------------------------------------------


class Form(ABC):
    """How a value holds its rows. Forms are compared and hashed by what they say."""

    @abstractmethod
    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe in plain JSON what values must agree on to be stacked; add this value's rows to
        `rows`.

        exactly: must a row's bits not depend on the others? Raises `CallsDiffer` for a value of
        another form.
        """

    @abstractmethod
    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        """Stack the rows of all values, `counts[i]` of values[i], then `padding` times the first of
        them.

        That padding is safe for masks.
        """

    @abstractmethod
    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        """Give the inverse of `stack`; what is beyond the counts is dropped."""

    def spread(self, one: Any, other: Any) -> Form:
        """Return the same form, with some shared tensors of a single number spread over the rows.

        Those are the ones on which the two values do not agree.
        """
        return self


@dataclass(frozen=True)
class Rowed(Form):
    """A tensor with one slice per row along one axis."""

    axis: int
    ndim: int

    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe all but the number of rows."""
        if not isinstance(value, Tensor) or value.ndim != self.ndim:
            raise CallsDiffer
        rows.add(value.shape[self.axis])
        return [str(value.dtype), *value.shape[: self.axis], "rows", *value.shape[self.axis + 1 :]]

    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        filler = [values[0].narrow(self.axis, 0, 1)] * padding
        # Contiguous: otherwise one neighbour in another memory format would choose the layout, and
        # with it the kernels, for all.
        return torch.cat([*values, *filler], dim=self.axis).contiguous()

    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        """Split into views."""
        return list(
            torch.split(value.narrow(self.axis, 0, sum(counts)), list(counts), dim=self.axis)
        )


@dataclass(frozen=True)
class Listed(Form):
    """A list with one tensor per row.

    The tensors may differ in size, as those of prompts do: the network pads them to the longest.

    By that, rows of different sizes change each other's last bits; where that must not be, they do
    not meet.
    """

    kind: Any  # list or tuple
    ndim: int

    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe sizes only where the bits count."""
        if type(value) is not self.kind or not all(
            isinstance(row, Tensor) and row.ndim == self.ndim for row in value
        ):
            raise CallsDiffer
        rows.add(len(value))
        dtypes = sorted({str(row.dtype) for row in value})
        return [dtypes, sorted({tuple(row.shape) for row in value})] if exactly else [dtypes]

    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        return self.kind([row for value in values for row in value] + [values[0][0]] * padding)

    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return [value[end - count : end] for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True)
class Spread(Form):
    """A tensor of one number for all rows, such as a timestep.

    In its place the network takes one number per row.
    """

    ndim: int

    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe its dtype."""
        if not isinstance(value, Tensor) or value.numel() != 1 or value.ndim != self.ndim:
            raise CallsDiffer
        return [str(value.dtype)]

    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        """Stack to [rows]."""
        parts = zip([*values, values[0]], [*counts, padding], strict=True)
        return torch.cat([value.expand(count) for value, count in parts])

    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        """Refuse: networks take such numbers but do not return them."""
        raise CallsDiffer


@dataclass(frozen=True)
class Shared(Form):
    """The same for all rows: strangers agree on its value."""

    kind: Any  # the type of the value
    ndim: int = 0

    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe its value."""
        if isinstance(value, Tensor):
            if (
                self.kind is not Tensor
                or value.ndim != self.ndim
                or value.nbytes > MAX_COMPARED_BYTES
            ):
                raise CallsDiffer
            return [str(value.dtype), *value.shape, _digest(value)]
        if type(value) is not self.kind:
            raise CallsDiffer
        return repr(value)

    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        """Give anybody's, for all are equal."""
        return values[0]

    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        """Give the same to everybody."""
        return [value] * len(counts)

    def spread(self, one: Any, other: Any) -> Form:
        is_number = self.kind is Tensor and self.ndim <= 1 and one.numel() == 1 == other.numel()
        return Spread(self.ndim) if is_number and not torch.equal(one, other) else self


# Of shared tensors with several numbers, by the tensor itself, not by its content.
_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _digest(tensor: Tensor) -> str:
    """Give the sha256 of a shared tensor; of one with several numbers only once.

    Pipelines make such tensors (positions, masks) before their loop and pass the same at every
    step, and to read one again is to wait for the device. A single number may be written anew.
    """
    known = _digests.get(tensor)
    if known is None:
        content = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
        known = hashlib.sha256(content.data).hexdigest()
        if tensor.numel() > 1:
            _digests[tensor] = known
    return str(known)


@dataclass(frozen=True)
class Nested(Form):
    """A container whose places have forms of their own."""

    kind: Any  # tuple, list, dict or an output of diffusers
    places: tuple[tuple[Any, Form], ...]

    def describe(self, value: Any, rows: set[int], *, exactly: bool) -> Any:
        """Describe what its places say."""
        if type(value) is not self.kind or [place for place, _ in self.places] != _places(value):
            raise CallsDiffer
        return [
            [str(place), form.describe(value[place], rows, exactly=exactly)]
            for place, form in self.places
        ]

    def stack(self, values: Sequence[Any], counts: Sequence[int], padding: int) -> Any:
        return self._of(
            [
                form.stack([value[place] for value in values], counts, padding)
                for place, form in self.places
            ]
        )

    def split(self, value: Any, counts: Sequence[int]) -> list[Any]:
        parts = [form.split(value[place], counts) for place, form in self.places]
        return [self._of([part[index] for part in parts]) for index in range(len(counts))]

    def spread(self, one: Any, other: Any) -> Form:
        places = tuple(
            (place, form.spread(one[place], other[place])) for place, form in self.places
        )
        return replace(self, places=places)

    def _of(self, items: list[Any]) -> Any:
        return _container(
            self.kind, dict(zip((place for place, _ in self.places), items, strict=True))
        )


def probe(one: Any, two: Any) -> Form:
    """Give the form of a value, from that of one image and that of two of them.

    Raises `CallsDiffer` when it cannot be told.
    """
    if type(one) is not type(two):
        raise CallsDiffer
    if isinstance(one, Tensor):
        return _probe_tensor(one, two)
    if _are_lists_of_rows(one, two):
        return Listed(type(one), one[0].ndim)
    if _is_container(one):
        if _places(one) != _places(two):
            raise CallsDiffer
        return Nested(
            type(one), tuple((place, probe(one[place], two[place])) for place in _places(one))
        )
    if not isinstance(one, PLAIN) or one != two:
        raise CallsDiffer
    return Shared(type(one))


def _are_lists_of_rows(one: Any, two: Any) -> bool:
    return (
        type(one) in (list, tuple)
        and bool(one)
        and len(two) == 2 * len(one)
        and all(isinstance(row, Tensor) for row in two)
    )


def _probe_tensor(one: Tensor, two: Tensor) -> Form:
    if one.ndim != two.ndim or one.dtype != two.dtype:
        raise CallsDiffer
    grown = [axis for axis in range(one.ndim) if one.shape[axis] != two.shape[axis]]
    if not grown:
        if not torch.equal(one, two):
            raise CallsDiffer  # it depends on the number of images, and hides how
        return Shared(Tensor, one.ndim)
    if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise CallsDiffer
    return Rowed(grown[0], one.ndim)


def _is_container(value: Any) -> bool:
    return type(value) in (tuple, list, dict) or isinstance(value, BaseOutput)


def _places(value: Any) -> list[Any]:
    """Tell where a container has its values, to be read by value[place]."""
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _container(kind: Any, items: Mapping[Any, Any]) -> Any:
    """Give a container of this kind with these values at these places."""
    if issubclass(kind, BaseOutput):
        return kind(**items)
    return kind(items) if issubclass(kind, dict) else kind(items.values())


# --- forms of a call ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallForm:
    """How calls of one network are made as one, and what comes back taken apart."""

    network: str
    given: Form  # of (args, kwargs)
    returned: Form

    def describe(self, call: NetworkCall, *, exactly: bool) -> tuple[int, str]:
        """Return the call's number of rows, and briefly all that calls must agree on to be made as
        one.

        exactly: a row's bits then depend on itself and the number of rows alone, whoever shares the
        forward. Raises `CallsDiffer`.
        """
        if call.network != self.network:
            raise CallsDiffer
        rows: set[int] = set()
        about = self.given.describe((call.args, call.kwargs), rows, exactly=exactly)
        if len(rows) != 1:
            raise CallsDiffer
        text = json.dumps([call.context, about])
        return rows.pop(), f"{self.network} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def stack(
        self, calls: Sequence[NetworkCall], counts: Sequence[int], bucket_rows: int
    ) -> NetworkCall:
        """Make one call of several that agree.

        It has `bucket_rows` rows, or as many as they have if that is more.
        """
        padding = max(0, bucket_rows - sum(counts))
        args, kwargs = self.given.stack(
            [(call.args, call.kwargs) for call in calls], counts, padding
        )
        return NetworkCall(self.network, calls[0].context, args, kwargs)

    def split(self, result: Any, counts: Sequence[int]) -> list[Any]:
        """Give each call what belongs to it of the one call's result."""
        return self.returned.split(result, counts)


Network = Callable[[NetworkCall], Any]
"""What makes a call."""


Run = Sequence[tuple[NetworkCall, Any]]
"""Every call of a pipeline's run, with what it gave."""


def learn(runs: Sequence[tuple[Run, Run]], network: Network) -> list[CallForm]:
    """Return a form for every kind of call in these runs that can be made for several images.

    Each run is of one image and again of two. A call has no form when its rows cannot be told
    apart, or when the network was not seen to keep them apart.
    """
    seen: dict[CallForm, list[NetworkCall]] = {}
    for of_one, of_two in runs:
        for (one, returned_one), (two, returned_two) in zip(of_one, of_two, strict=False):
            if one.network != two.network:
                break
            try:
                form = CallForm(
                    one.network,
                    probe((one.args, one.kwargs), (two.args, two.kwargs)),
                    probe(returned_one, returned_two),
                )
            except CallsDiffer:
                continue
            seen.setdefault(form, []).append(one)
    proved = [_proved(form, calls, network) for form, calls in seen.items()]
    return [form for form in proved if form is not None]


def _proved(form: CallForm, calls: Sequence[NetworkCall], network: Network) -> CallForm | None:
    """Return the form if the network gives a row the same bits beside itself and beside another.

    The form's single numbers are spread over rows. Compared at one number of rows, for another may
    take other kernels. A call beside itself has its single numbers as the pipeline gave them, so a
    network that reads one number per row as something else is found out.
    """
    proved = set()
    for first, last in _ends_of_alike(calls):
        spread = replace(
            form, given=form.given.spread((first.args, first.kwargs), (last.args, last.kwargs))
        )
        try:
            agreed = spread.describe(first, exactly=True)
            if first is last or spread.describe(last, exactly=True) != agreed:
                continue
            mixed = _side_by_side(spread, first, last, agreed[0], network)
            twins = [
                _side_by_side(form, call, call, agreed[0], network)[0] for call in (first, last)
            ]
        except Exception:  # noqa: BLE001  whatever it says, it does not take a stranger's rows
            return None
        if not _equal(mixed, twins):
            return None
        proved.add(spread)
    return proved.pop() if len(proved) == 1 else None


def _ends_of_alike(calls: Sequence[NetworkCall]) -> list[tuple[NetworkCall, NetworkCall]]:
    """Give the first and the last of the calls that have one context and the same shapes."""
    alike: dict[Any, list[NetworkCall]] = {}
    for call in calls:
        shapes = tuple(tensor.shape for tensor in tensors_of((call.args, call.kwargs)))
        alike.setdefault((call.context, shapes), []).append(call)
    return [(some[0], some[-1]) for some in alike.values()]


def _side_by_side(
    form: CallForm, one: NetworkCall, other: NetworkCall, rows: int, network: Network
) -> list[Any]:
    """Make one call of two calls with `rows` rows each; return the result of each."""
    return form.split(network(form.stack([one, other], [rows, rows], 0)), [rows, rows])


def _equal(one: Any, other: Any) -> bool:
    """Tell whether two values of one form are the same, bit by bit."""
    return all(
        torch.equal(mine, yours)
        for mine, yours in zip(tensors_of(one), tensors_of(other), strict=True)
    )


# --- values as they are logged --------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor in a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if _is_container(value):
        return [tensor for place in _places(value) for tensor in tensors_of(value[place])]
    return []


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Give the value with each of its tensors replaced by what `change` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if _is_container(value):
        return _container(
            type(value), {place: with_tensors(value[place], change) for place in _places(value)}
        )
    return value


def written(value: Any, tensors: list[Tensor]) -> Any:
    """Give the value in plain JSON, but for its tensors, which are added to `tensors`.

    Of one on the meta device only the shape is kept. Raises `CallsDiffer` for what is no value.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if _is_container(value):
        kind = type(value)
        return {
            "kind": [kind.__module__, kind.__qualname__],
            "items": [[place, written(value[place], tensors)] for place in _places(value)],
        }
    if not isinstance(value, type(None) | bool | int | float | str):
        raise CallsDiffer
    return {"plain": value}


def read(facts: Any, tensors: Sequence[Tensor]) -> Any:
    """Give the inverse of `written`.

    Raises `CallsDiffer` for a kind that is neither plain nor an output of diffusers.
    """
    if "tensor" in facts:
        return tensors[facts["tensor"]]
    if "shape" in facts:
        return torch.empty(facts["shape"], dtype=getattr(torch, facts["dtype"]), device="meta")
    if "plain" in facts:
        return facts["plain"]
    module, name = facts["kind"]
    kind = None
    if module == "builtins" or module.startswith("diffusers."):
        kind = getattr(import_module(module), name)
    is_output = isinstance(kind, type) and issubclass(kind, BaseOutput)
    if kind not in (tuple, list, dict) and not is_output:
        raise CallsDiffer
    return _container(kind, {place: read(item, tensors) for place, item in facts["items"]})
