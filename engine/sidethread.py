"""Load in a thread beside the one that renders, without slowing that one or changing its bits.

Building networks is Python, and Python runs in one thread at a time. Each small operation of a step
would wait for the interpreter as long as a loading thread keeps it. So a loading thread stops at
its next call while a turn is in progress, and goes on between two turns for a small share of their
time; what needs no interpreter (hashing, copying, casting) goes on beside the turns.
"""

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SHARE = 0.03  # of each turn's time, after it, for a loading thread that waits
LONGEST_STOP_S = 1.0
# Functions that make a tensor of torch's default dtype, or of integers where integers are given.
OF_DEFAULT_DTYPE = frozenset(
    {
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.zeros,
    }
)
OF_INFERRED_DTYPE = frozenset(
    {torch.arange, torch.as_tensor, torch.full, torch.scalar_tensor, torch.tensor}
)


class LoadPace:
    """Keep a loading thread out of the turns of the device thread."""

    def __init__(self) -> None:
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._is_waiting = False  # has the loading thread stopped at a call?
        self._began_at = 0.0
        self._moved_at: float | None = None  # on the monotonic clock; None without a load

    # --- read by any thread ---

    @property
    def silent_s(self) -> float:
        """Return the seconds since the loading thread's last call within `kept`; 0 outside."""
        moved_at = self._moved_at
        return time.monotonic() - moved_at if moved_at is not None else 0.0

    # --- from the device thread ---

    def begin_turn(self) -> None:
        """Stop a loading thread at its next call."""
        self._began_at = time.perf_counter()
        self._may_go_on.clear()

    def end_turn(self) -> None:
        """Let a loading thread go on, and leave it the interpreter for its share of the turn."""
        turn_s = time.perf_counter() - self._began_at
        self._may_go_on.set()
        if self._is_waiting:
            time.sleep(SHARE * turn_s)

    # --- from the loading thread ---

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Stop at every call within this block while a turn is in progress.

        Garbage is not collected meanwhile: looking through all objects holds the interpreter.
        """
        is_collecting = gc.isenabled()
        gc.disable()
        self._moved_at = time.monotonic()
        sys.setprofile(self._stop_in_turns)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._moved_at = None
            if is_collecting:
                gc.enable()

    def _stop_in_turns(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self._may_go_on.is_set():
            self._is_waiting = True
            # It may hold a lock that the turn wants, such as that of logging: then both go on.
            self._may_go_on.wait(LONGEST_STOP_S)
            self._is_waiting = False
        self._moved_at = time.monotonic()


@contextmanager
def own_default_dtype() -> Iterator[None]:
    """Have changes of torch's default dtype within this block hold for this thread alone.

    It is the process's, and diffusers and transformers change it while they build a network: what
    other threads compute meanwhile would come out in another precision.
    """
    switches: dict[str, Any] = vars(torch)
    set_everywhere = switches["set_default_dtype"]
    thread = threading.get_ident()
    mode = _DefaultDtype(torch.get_default_dtype())

    def set_here(dtype: torch.dtype) -> None:
        if threading.get_ident() == thread:
            mode.dtype = dtype
        else:
            set_everywhere(dtype)

    def get_here() -> torch.dtype:
        return mode.dtype if threading.get_ident() == thread else get_everywhere()

    get_everywhere = switches["get_default_dtype"]
    switches |= {"set_default_dtype": set_here, "get_default_dtype": get_here}
    try:
        with mode:
            yield
    finally:
        switches |= {"set_default_dtype": set_everywhere, "get_default_dtype": get_everywhere}


class _DefaultDtype(TorchFunctionMode):
    """Make tensors whose dtype nobody names as if `dtype` were torch's default.

    In one thread. Only for what makes a tensor of no other, which is how networks are built.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = self._before = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        is_named = self.dtype is self._before or given.get("dtype") is not None
        if is_named or not (func in OF_DEFAULT_DTYPE or func in OF_INFERRED_DTYPE):
            return func(*args, **given)
        if func in OF_DEFAULT_DTYPE:
            return func(*args, **given | {"dtype": self.dtype})
        made = func(*args, **given)
        is_inferred = made.dtype is self._before and not hasattr(args[0], "dtype")
        return made.to(self.dtype) if is_inferred else made
