"""Measured curves as files: seconds of a forward by its rows, of an encode and a decode, memory.

A file belongs to one fingerprint: the weights, the precision, the device, the libraries and the
thread count it was measured with. A worker that finds none for its own measures at warm-up.

    {"checkpoint": ..., "fingerprint": <sha256>, "facts": {...},
     "curves": {"version": 1,
                "keys": [{"key": {<the fields of a batch key>},
                          "steps": [[rows, seconds], ...], "encode_s": ..., "decode_s": ...,
                          "memory": {"fixed_bytes": ..., "per_row_bytes": ...,
                                     "decode_bytes": ..., "encode_bytes": ...}},
                         ...]}}

All of an entry but its key may be absent, and `encode_bytes`, which older files do not have.
"""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from engine.costs import TICK_S, CostModel, Footprint, Measurements
from engine.fingerprint import Fingerprint
from engine.inflight import BatchKey

log = logging.getLogger(__name__)

VERSION = 1  # of what `to_data` gives


# --- files ---


def curve_file(folder: Path, checkpoint: str, bits: Fingerprint) -> Path:
    """Tell where the curves of this checkpoint on this device lie."""
    letters = (letter if letter.isalnum() or letter in "-_." else "-" for letter in checkpoint)
    return folder / f"{''.join(letters)}-{bits.sha256[:16]}.json"


def load_curves(costs: CostModel, folder: Path, checkpoint: str, bits: Fingerprint) -> bool:
    """Let `costs` know what was measured before.

    False when nothing was, or when the file cannot be used, which is logged.
    """
    file = curve_file(folder, checkpoint, bits)
    try:
        costs.adopt(from_data(json.loads(file.read_text(encoding="utf-8"))["curves"]))
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
    contents: dict[str, Any] = {
        "checkpoint": checkpoint,
        "fingerprint": bits.sha256,
        "facts": bits.facts,
        "curves": to_data(costs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(file)
    return file


# --- as data ---


def to_data(costs: CostModel) -> dict[str, Any]:
    """Give everything known, JSON-plain; `from_data` reads it."""
    return {"version": VERSION, "keys": [_entry(one) for one in costs.measurements()]}


def from_data(data: object) -> list[Measurements]:
    """Read what `to_data` gave. Raises `ValueError` that begins with the place that is wrong."""
    file = _members(data, "curves", required=["version", "keys"])
    if file["version"] != VERSION:
        raise ValueError(f"version: {file['version']!r} is not {VERSION}")
    entries = _items(file["keys"], "keys")
    return [_parse_entry(entry, f"keys[{place}]") for place, entry in enumerate(entries)]


def _entry(measured: Measurements) -> dict[str, Any]:
    entry: dict[str, Any] = {"key": asdict(measured.key)}
    if measured.steps:
        entry["steps"] = [[rows, seconds] for rows, seconds in measured.steps.items()]
    if measured.encode_s is not None:
        entry["encode_s"] = measured.encode_s
    if measured.decode_s is not None:
        entry["decode_s"] = measured.decode_s
    if measured.footprint is not None:
        entry["memory"] = asdict(measured.footprint)
    return entry


def _parse_entry(data: object, where: str) -> Measurements:
    optional = ["steps", "encode_s", "decode_s", "memory"]
    entry = _members(data, where, required=["key"], optional=optional)
    return Measurements(
        key=_key(entry["key"], f"{where}.key"),
        steps=_steps(entry.get("steps", []), f"{where}.steps"),
        encode_s=_optional_seconds(entry, "encode_s", where),
        decode_s=_optional_seconds(entry, "decode_s", where),
        footprint=_footprint(entry["memory"], f"{where}.memory") if "memory" in entry else None,
    )


def _steps(data: object, where: str) -> dict[int, float]:
    steps: dict[int, float] = {}
    for place, pair in enumerate(_items(data, where)):
        rows, seconds = _items(pair, f"{where}[{place}]", count=2)
        counted = _count(rows, f"{where}[{place}][0]", least=1)
        steps[counted] = _seconds(seconds, f"{where}[{place}][1]", least=TICK_S)
    return steps


def _key(data: object, where: str) -> BatchKey:
    members = _members(data, where, required=[field.name for field in fields(BatchKey)])
    for name in ("checkpoint", "call"):
        if not isinstance(members[name], str):
            raise ValueError(f"{where}.{name}: {members[name]!r} is not a string")
    for name, least in (("height_px", 1), ("width_px", 1), ("text_length", 0)):
        _count(members[name], f"{where}.{name}", least=least)
    return BatchKey(**members)


def _footprint(data: object, where: str) -> Footprint:
    required = [field.name for field in fields(Footprint) if field.default is MISSING]
    members = _members(data, where, required=required, optional=["encode_bytes"])
    counts = {name: _count(value, f"{where}.{name}", least=0) for name, value in members.items()}
    return Footprint(**counts)


def _members(
    data: object,
    where: str,
    *,
    required: Iterable[str],
    optional: Iterable[str] = (),
) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {data!r} is not an object")
    for name in required:
        if name not in data:
            raise ValueError(f"{where}: {name} is missing")
    for name in data:
        if name not in {*required, *optional}:
            raise ValueError(f"{where}: {name!r} is not known")
    return data


def _items(data: object, where: str, count: int | None = None) -> list[Any]:
    if not isinstance(data, list) or count not in (None, len(data)):
        of_how_many = "" if count is None else f" of {count}"
        raise ValueError(f"{where}: {data!r} is not a list{of_how_many}")
    return data


def _count(value: object, where: str, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{where}: {value!r} is not a whole number from {least} up")
    return value


def _optional_seconds(entry: dict[str, Any], name: str, where: str) -> float | None:
    return _seconds(entry[name], f"{where}.{name}") if name in entry else None


def _seconds(value: object, where: str, *, least: float = 0.0) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf:
        return float(value)
    raise ValueError(f"{where}: {value!r} is not a number of seconds from {least} up")
