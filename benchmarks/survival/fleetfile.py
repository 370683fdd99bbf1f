"""A fleet.toml for an ordeal: the one that ships, changed as a value and written down again."""

import json
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.survival import tinycheckpoint
from policy.fleet import parse_fleet
from settings import REPO

BUCKET_ROWS = 4
_PATIENCE_S = 86_400  # no job ends because it waited: the faults are to blame for nothing but themselves


def shipped() -> dict[str, Any]:
    """The tables of the repository's fleet.toml, with deadlines that nobody misses."""
    tables = tomllib.loads((REPO / "fleet.toml").read_text())
    for tier in tables["tiers"].values():
        tier |= {key: _PATIENCE_S for key in ("start_within_s", "run_within_s") if key in tier}
    return tables


def reproducible(tables: dict[str, Any]) -> dict[str, Any]:
    """The same with every tier reproducible, so that two runs can be compared by digest."""
    for tier in tables["tiers"].values():
        tier["determinism"] = "reproducible"
    for model in tables["models"].values():
        for name in tables["tiers"]:
            own = model.setdefault("tiers", {}).setdefault(name, {})
            own["bucket_rows"] = dict.fromkeys(model["sizes"], BUCKET_ROWS)
    return tables


def many_small(checkpoint: Path, *, slots: int) -> dict[str, Any]:
    """A fleet of small workers: one tiny model, best effort, and as many steps as are asked for."""
    tables = shipped()
    for tier in tables["tiers"].values():
        tier |= {"determinism": "best_effort", "max_steps": 1000, "max_images": min(tier["max_images"], slots)}
    model = next(iter(tables["models"].values()))
    size = f"{tinycheckpoint.SIDE_PX}x{tinycheckpoint.SIDE_PX}"
    model |= {"title": "Tiny", "sizes": [size], "versions": [{"id": "1", "source": str(checkpoint)}], "tiers": {}}
    tables["models"] = {"tiny": model}
    (pool,) = tables["pools"].values()
    pool |= {"models": ["tiny"], "slots": slots, "max_batch_rows": 2 * slots}
    return tables


def write(tables: Mapping[str, Any], path: Path) -> Path:
    """Write the file; raises FleetInvalid if the house would refuse it."""
    text = "".join(f"{key} = {_literal(value)}\n" for key, value in tables.items())
    parse_fleet(text)
    path.write_text(text)
    return path


def _literal(value: Any) -> str:
    """A TOML value; tables become inline ones."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(inner) for inner in value) + "]"
    if isinstance(value, date):  # an instant, too
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)
