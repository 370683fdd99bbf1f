"""Copy tensors to the device without waiting for what was launched there before.

A copy of ordinary memory keeps the host until the device has done all of that, and the device has
nothing to do until the host has launched more. A copy of pinned memory is launched like a kernel.
Torch keeps pinned memory until the copy is over, whoever lets go of it sooner. It knows no image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Give the tensor on the device, of `dtype` where one is named, as `tensor.to` does.

    To a GPU the copy is only launched.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return tensor.to(dtype=dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)


def without_waits(
    device: torch.device, *, keeps_numbers: bool = False
) -> AbstractContextManager[Any]:
    """Let other people's code only launch its copies to a GPU; for another device, do nothing.

    keeps_numbers: single numbers stay on the host, for code that computes factors with them. A
    kernel takes such a number as an argument, and nothing is launched or copied for it.
    """
    return _LaunchedCopies(keeps_numbers) if device.type == "cuda" else nullcontext()


class _LaunchedCopies(TorchFunctionMode):
    """Replaces what would copy from host to GPU."""

    def __init__(self, keeps_numbers: bool) -> None:
        super().__init__()
        self._keeps_numbers = keeps_numbers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.to and args[0].device.type == "cpu":
            return self._moved(args, given)
        if func in (torch.tensor, torch.ones) and _is_gpu(given.get("device")):
            return self._made(func, args, given)
        return func(*args, **given)

    def _moved(self, args: Sequence[Any], given: dict[str, Any]) -> Any:
        """Do as `Tensor.to`, for a tensor of the host."""
        tensor, *how = args
        device, dtype = _target([*how, *(given.get(name) for name in ("device", "dtype"))])
        if not _is_gpu(device) or given.get("memory_format") is not None:
            return tensor.to(*how, **given)
        if self._keeps_numbers and tensor.ndim == 0:
            return tensor.to(dtype=dtype or tensor.dtype, copy=bool(given.get("copy")))
        return to_device(tensor, torch.device(device), dtype)

    def _made(self, func: Callable[..., Any], args: Sequence[Any], given: dict[str, Any]) -> Any:
        """Do as a function that makes a tensor on the device."""
        made_here = given | {"device": "cpu"}
        if func is torch.tensor:
            return to_device(func(*args, **made_here), torch.device(given["device"]))
        is_number = self._keeps_numbers and args[:1] == ((),)
        return func(*args, **(made_here if is_number else given))


def _target(named: Sequence[Any]) -> tuple[Any, torch.dtype | None]:
    """Return device and dtype that the arguments of `Tensor.to` name; None for what they do not."""
    device: Any = None
    dtype: torch.dtype | None = None
    for one in named:
        if isinstance(one, Tensor):
            return one.device, one.dtype
        if isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            device = one
    return device, dtype


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
