"""One measurement after the other while there is time, each told as soon as it is known.

A part of the benchmark is made of them.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Found = dict[str, Any]
"""Figures by name, JSON-plain."""

DEVICE_LOST = 74  # exit status of a part, as of a worker


class NotHere(Exception):
    """This device or build cannot do what the cell measures; it is left out."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a part share."""

    device: str
    quick: bool
    tiny: bool
    folder: Path  # for checkpoints without weights
    traces: Path  # for the profiler's files

    @property
    def is_cuda(self) -> bool:
        """Tell whether it is measured on a GPU."""
        return self.device.startswith("cuda")

    @property
    def scale(self) -> str:
        """Return the size of the networks."""
        return "tiny" if self.tiny else "full"

    def check_cuda(self, what: str) -> None:
        """Raise `NotHere` without a GPU."""
        if not self.is_cuda:
            raise NotHere(f"{what} need a GPU")


class Cells:
    """Takes one cell after the other until an instant of `time.time()`.

    Prints a line of JSON when a cell begins and one for what it found.
    """

    def __init__(
        self, until: float, needs_s: Mapping[str, float], is_lost: Callable[[], bool]
    ) -> None:
        """Know what is to come.

        needs_s: name of a cell -> with less left it is not begun.  is_lost: whether nothing works
        on the device any more.
        """
        self._until = until
        self._needs_s = needs_s
        self._is_lost = is_lost

    def take(self, name: str, measure: Callable[[], Found]) -> None:
        """Measure, unless too little is left. What goes wrong is said and ends here.

        `SystemExit` where the device is lost: whatever came then would only fail for that.
        """
        needs_s = self._needs_s.get(name, 0.0)
        started = time.monotonic()
        left_s = max(self._until - time.time(), 0.0)
        if left_s < needs_s:
            _tell(name, left_out=f"takes about {needs_s:.0f} s, and {left_s:.0f} s were left")
            return
        _tell(name, begun=True)
        try:
            found = measure()
        except NotHere as reason:
            _tell(name, left_out=str(reason))
        except Exception as problem:  # noqa: BLE001  one cell's trouble is no other's
            traceback.print_exc()
            _tell(name, failed=f"{type(problem).__name__}: {problem}"[:400])
            if self._is_lost():
                sys.exit(DEVICE_LOST)
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
