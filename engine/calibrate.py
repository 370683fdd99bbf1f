"""Measure a checkpoint's curves on this device and write them down.

Workers load them instead of measuring at every start.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import CheckpointSpec, EngineConfig, doublings
from engine.costs import Curve
from engine.curves import save_curves
from engine.engine import Engine
from engine.inflight import BatchKey


@dataclass(frozen=True)
class CurvePoint:
    """Forwards of one size."""

    width_px: int
    height_px: int
    rows: int
    step_s: float
    gain: float  # rows a second, over those of single-row forwards
    grows: bool  # do single rows that wait grow a forward to this size?


def calibrate(
    config: EngineConfig, spec: CheckpointSpec, folder: Path
) -> tuple[Path, list[CurvePoint]]:
    """Load `spec` alone, measure every bucket, and save the curves in `folder`.

    Each bucket is measured `config.warm_up_repeats` times. Curves saved there before are replaced.
    Returns the file and a text of its contents, for people.
    """
    with Engine(replace(config, curves_folder=""), [spec]) as engine:
        file = save_curves(engine.costs, folder, spec.name, engine.fingerprint(spec.name))
        points = [
            point
            for key in engine.costs.measured_keys()
            for point in _points(key, engine.costs.curve(key), config.max_batch_rows)
        ]
    return file, points


def _points(key: BatchKey, curve: Curve, max_rows: int) -> Iterator[CurvePoint]:
    """Iterate over the forwards of one batch key, at doubled numbers of rows."""
    knee = curve.knee(max_rows)
    for rows in doublings(max_rows):
        seconds = curve.seconds(rows)
        gain = rows * curve.seconds(1) / seconds
        yield CurvePoint(key.width_px, key.height_px, rows, seconds, gain, rows <= knee)
