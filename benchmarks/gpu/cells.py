"""One measurement after the other while there is time, each told as soon as it is known.

A part of the benchmark is made of them.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Found = dict[str, Any]
"""Figures by name, JSON-plain."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a part share."""

    device: str
    quick: bool
    tiny: bool
    folder: Path  # for checkpoints without weights

    @property
    def is_cuda(self) -> bool:
        """Tell whether it is measured on a GPU."""
        return self.device.startswith("cuda")


class Cells:
    """Takes one cell after the other until an instant of `time.time()`.

    Prints a line of JSON for each.
    """

    def __init__(self, until: float) -> None:
        self._until = until

    def take(self, name: str, measure: Callable[[], Found], *, needs_s: float = 0.0) -> None:
        """Measure, unless less than `needs_s` is left. What goes wrong is said and ends here."""
        started = time.monotonic()
        left_s = max(self._until - time.time(), 0.0)
        if left_s < needs_s:
            _tell(name, left_out=f"takes about {needs_s:.0f} s, and {left_s:.0f} s were left")
            return
        try:
            found = measure()
        except Exception as problem:  # noqa: BLE001  one cell's trouble is no other's
            traceback.print_exc()
            _tell(name, failed=f"{type(problem).__name__}: {problem}"[:400])
        else:
            _tell(name, took_s=round(time.monotonic() - started, 1), found=found)
        tidy()


def _tell(name: str, **what: Any) -> None:
    print(json.dumps({"cell": name, **what}), flush=True)


def tidy() -> None:
    """Give back the memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
