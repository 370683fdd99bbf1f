"""Measured curves as files: seconds of a forward by its rows, of an encode and a decode, memory per row.

A file belongs to one fingerprint: the weights, the precision, the device, the libraries and the thread count it was measured with. A
worker that finds none for its own measures at warm-up.
"""

import json
import logging
from pathlib import Path
from typing import Any

from engine.costs import CostModel
from engine.fingerprint import Fingerprint

log = logging.getLogger(__name__)


def curve_file(folder: Path, checkpoint: str, bits: Fingerprint) -> Path:
    """Where the curves of this checkpoint on this device lie."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in checkpoint)
    return folder / f"{plain}-{bits.sha256[:16]}.json"


def load_curves(costs: CostModel, folder: Path, checkpoint: str, bits: Fingerprint) -> bool:
    """Let `costs` know what was measured before; False when nothing was, or when the file cannot be used, which is logged."""
    file = curve_file(folder, checkpoint, bits)
    try:
        costs.load(json.loads(file.read_text(encoding="utf-8"))["curves"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as problem:
        log.warning("curves_not_usable", extra={"file": str(file), "problem": str(problem)})
        return False
    log.info("curves_loaded", extra={"checkpoint": checkpoint, "file": str(file)})
    return True


def save_curves(costs: CostModel, folder: Path, checkpoint: str, bits: Fingerprint) -> Path:
    """Write what `costs` knows, whole or not at all. Returns the file."""
    file = curve_file(folder, checkpoint, bits)
    contents: dict[str, Any] = {"checkpoint": checkpoint, "fingerprint": bits.sha256, "facts": bits.facts, "curves": costs.to_data()}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(file)
    return file
