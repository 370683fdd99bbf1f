"""Load one model of fleet.toml, measure it, and make pictures: what `models add` and `try` start
beside themselves, so that a crash is this process's alone.

It reads one JSON object from standard input: model, version, prompts, folder. The last line of its
output is one: what it found, or {"problem": ...}. Exit code 1 with a problem.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from engine.config import CheckpointSpec
from engine.curves import save_curves
from engine.engine import Engine
from engine.errors import EngineError, UnsupportedRequest
from engine.records import FinishedImage
from engine.request import ImageRequest, Picture
from policy.fleet import Fleet, checkpoint_name
from settings import DeviceSettings, load, load_fleet_or_exit
from tasks.engines import engine_config, staged_specs
from tasks.weights import Weights

STRENGTH = 0.8  # of pictures that start from another


def main() -> int:
    """Do what standard input asks for; return the exit code."""
    order = json.loads(sys.stdin.read())
    settings = load(DeviceSettings)
    fleet = load_fleet_or_exit(settings)
    try:
        answer = _tried(settings, fleet, order)
    except EngineError as problem:
        answer = {"problem": str(problem)}
    except (MemoryError, torch.OutOfMemoryError) as problem:
        reason = "the memory of the device does not hold it; try a half --precision"
        answer = {"problem": f"{reason} ({problem})"}
    print(json.dumps(answer), flush=True)
    return 1 if "problem" in answer else 0


def _tried(settings: DeviceSettings, fleet: Fleet, order: dict[str, Any]) -> dict[str, Any]:
    """Load, measure and render. Raises EngineError."""
    model = order["model"]
    pool = fleet.pools[fleet.pools_of(model)[0]]
    config = replace(engine_config(settings, fleet, pool), curves_folder="")
    wanted = checkpoint_name(model, order["version"])
    [spec] = staged_specs(fleet, [wanted], settings, Weights(settings))
    began_at = time.monotonic()
    with Engine(config, [spec]) as engine:
        load_s = time.monotonic() - began_at
        curves = save_curves(
            engine.costs,
            settings.curves_folder or Path(order["folder"]),
            spec.name,
            engine.fingerprint(spec.name),
        )
        found = [
            _picture(engine, fleet, spec, model, prompt, seed, Path(order["folder"]))
            for seed, prompt in enumerate(order["prompts"], 1)
        ]
    return {
        "checkpoint": spec.name,
        "load_s": load_s,
        "device": config.device,
        "curves": str(curves),
        "pictures": found,
        "notes": _notes(found),
    }


def _picture(
    engine: Engine,
    fleet: Fleet,
    spec: CheckpointSpec,
    model: str,
    prompt: str,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Render one picture with the model's defaults and store it. Raises EngineError."""
    began_at = time.monotonic()
    finished, taken = _rendered(engine, _request(fleet, spec, model, prompt, seed))
    file = folder / f"{seed}.png"
    Image.fromarray(finished.pixels).save(file)
    height_px, width_px = finished.pixels.shape[:2]
    return {
        "prompt": prompt,
        "file": str(file),
        "size": f"{width_px}x{height_px}",
        "asked_size": f"{finished.request.width_px}x{finished.request.height_px}",
        "steps": finished.record.num_steps,
        "seconds": time.monotonic() - began_at,
        "from": taken,
        "is_flat": bool(finished.pixels.std() < 1),
    }


def _request(
    fleet: Fleet, spec: CheckpointSpec, model: str, prompt: str, seed: int
) -> ImageRequest:
    """Make a request as the first tier's would be that names nothing but a prompt."""
    tier = fleet.default_tier()
    entry = fleet.models[model]
    own = entry.tiers.get(tier)
    guidance = own.default_guidance if own is not None else None
    width_px, height_px = spec.sizes[0]
    return ImageRequest(
        id=f"trial {seed}",
        group="trial",
        checkpoint=spec.name,
        prompt=prompt,
        width_px=width_px,
        height_px=height_px,
        num_steps=fleet.default_steps(model, tier),
        guidance=entry.default_guidance if guidance is None else guidance,
        sampler=entry.default_sampler,
        seed=seed,
    )


def _rendered(engine: Engine, request: ImageRequest) -> tuple[FinishedImage, str]:
    """Render with as few pictures to start from as the checkpoint takes; say which.

    Raises EngineError.
    """
    problem: EngineError | None = None
    for taken, given in _ways_to_start(request):
        try:
            return engine.submit(replace(request, **given)).result(), taken
        except UnsupportedRequest as refused:
            problem = problem or refused
    assert problem is not None
    raise problem


def _ways_to_start(request: ImageRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a request may bring besides its prompt, the least in front."""
    yield "", {}
    drawing = _drawing(request.width_px, request.height_px)
    picture = Picture(np.asarray(drawing))
    mask = np.zeros((request.height_px, request.width_px), np.uint8)
    mask[:, request.width_px // 2 :] = 255
    yield "a control picture", {"control_image": picture}
    yield "a picture", {"init_image": picture}
    yield "a picture and a mask", {"init_image": picture, "mask": Picture(mask)}
    yield "a picture of half strength", {"init_image": picture, "strength": STRENGTH}


def _drawing(width_px: int, height_px: int) -> Image.Image:
    """Draw a house on a meadow, for models that start from a picture."""
    drawing = Image.new("RGB", (width_px, height_px), "lightblue")
    pen = ImageDraw.Draw(drawing)

    def at(*parts: float) -> list[tuple[float, float]]:
        places = zip(parts[::2], parts[1::2], strict=True)
        return [(x * width_px, y * height_px) for x, y in places]

    pen.rectangle(at(0, 0.7, 1, 1), fill="green")
    pen.rectangle(at(0.3, 0.45, 0.7, 0.8), fill="white")
    pen.polygon(at(0.25, 0.45, 0.5, 0.2, 0.75, 0.45), fill="brown")
    return drawing


def _notes(found: list[dict[str, Any]]) -> list[str]:
    """Return what an operator should know before others use the model, a sentence each."""
    notes = []
    first = found[0]
    if first["from"]:
        notes.append(f"it renders nothing without {first['from']}: jobs have to bring that")
    if first["size"] != first["asked_size"]:
        asked = first["asked_size"]
        notes.append(
            f"it made {first['size']} where {asked} was asked for: set `sizes` or `options`"
        )
    flat = [each["file"] for each in found if each["is_flat"]]
    notes += [f"{file}: is of one colour; something is wrong" for file in flat]
    return notes


if __name__ == "__main__":
    sys.exit(main())
