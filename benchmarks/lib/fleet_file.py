"""A fleet.toml for a benchmark: the one that ships, changed as a value and written down again."""

import json
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.lib import tiny_checkpoint
from policy.fleet import parse_fleet
from settings import REPO

BUCKET_ROWS = 4
A_DAY_S = 86_400
Tables = dict[str, Any]


def shipped() -> Tables:
    """Read the tables of the repository's fleet.toml."""
    return tomllib.loads((REPO / "fleet.toml").read_text())


def read(path: Path) -> Tables:
    """Read the tables of a file."""
    return tomllib.loads(path.read_text())


def without_deadlines(tables: Tables) -> Tables:
    """Let jobs wait and run for a day: none ends because it waited, so faults alone are judged."""
    for tier in tables["tiers"].values():
        tier |= {key: A_DAY_S for key in ("start_within_s", "run_within_s") if key in tier}
    return tables


def reproducible(tables: Tables) -> Tables:
    """Make every tier reproducible, so that two runs can be compared by digest."""
    for tier in tables["tiers"].values():
        tier["determinism"] = "reproducible"
    for model in tables["models"].values():
        for name in tables["tiers"]:
            own = model.setdefault("tiers", {}).setdefault(name, {})
            own["bucket_rows"] = dict.fromkeys(model["sizes"], BUCKET_ROWS)
    return tables


def small_workers(checkpoint: Path, *, slots: int) -> Tables:
    """Describe small workers: one tiny model, best effort, as many steps as are asked for."""
    tables = without_deadlines(shipped())
    for tier in tables["tiers"].values():
        tier |= {
            "determinism": "best_effort",
            "max_steps": 1000,
            "max_images": min(tier["max_images"], slots),
        }
    model = next(iter(tables["models"].values()))
    model |= {
        "title": "Tiny",
        "sizes": [f"{tiny_checkpoint.SIDE_PX}x{tiny_checkpoint.SIDE_PX}"],
        "versions": [{"id": "1", "source": str(checkpoint)}],
        "tiers": {},
    }
    tables["models"] = {"tiny": model}
    (pool,) = tables["pools"].values()
    pool |= {"models": ["tiny"], "slots": slots, "max_batch_rows": 2 * slots}
    return tables


def write_small_workers(folder: Path, *, slots: int) -> Path:
    """Write the fleet.toml of small workers, and their checkpoint, into a folder."""
    checkpoint = tiny_checkpoint.save(folder / "checkpoint")
    return write(small_workers(checkpoint, slots=slots), folder / "fleet.toml")


def write(tables: Mapping[str, Any], path: Path) -> Path:
    """Write the file; raises FleetInvalid if Darkroom would refuse it."""
    text = text_of(tables)
    parse_fleet(text)
    path.write_text(text)
    return path


def text_of(tables: Mapping[str, Any]) -> str:
    """Return the text of the file, whether Darkroom would take it or not."""
    return "".join(f"{key} = {_literal(value)}\n" for key, value in tables.items())


def _literal(value: Any) -> str:
    """Return a TOML value; tables become inline ones."""
    if isinstance(value, Mapping):
        members = (f"{json.dumps(key)} = {_literal(inner)}" for key, inner in value.items())
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(inner) for inner in value) + "]"
    if isinstance(value, date):  # an instant, too
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)
