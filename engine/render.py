"""Render one image from a prompt, without the rest of the house.

Example: python -m engine.render "a red circle on a blue background" --checkpoint pocket/checkpoint
--steps 20 --seed 7 --out out.png
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.config import AdapterSpec, CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, EngineError
from engine.families import FAMILIES
from engine.request import AdapterUse, Determinism, ImageRequest, Picture
from engine.samplers import FLOW_SAMPLERS, SAMPLERS


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, render, write a PNG and print the record as one line of JSON.

    Returns the exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        size = options.size or native_size(Path(options.checkpoint))
        spec = _spec(options, size)
        request = _request(options, spec.name, size)
        config = EngineConfig(device=options.device, num_threads=options.threads)
        with Engine(config, [spec]) as engine:
            image = engine.submit(request).result()
    except (EngineError, OSError) as problem:
        print(f"render: {problem}", file=sys.stderr)
        return 1
    Image.fromarray(image.pixels).save(options.out)
    print(json.dumps({"out": options.out, **asdict(image.record)}))
    return 0


def _spec(options: argparse.Namespace, size: tuple[int, int]) -> CheckpointSpec:
    """Name the checkpoint asked for, which offers no more than is asked of it."""
    return CheckpointSpec(
        name=Path(options.checkpoint).name,
        path=options.checkpoint,
        family=options.family,
        precision=options.precision,
        sizes=(size,),
        samplers=(options.sampler,),
        default_sampler=options.sampler,
        adapters=tuple(AdapterSpec(name=Path(path).stem, path=path) for path, _ in options.adapter),
    )


def _request(options: argparse.Namespace, checkpoint: str, size: tuple[int, int]) -> ImageRequest:
    width_px, height_px = size
    is_pinned = bool(options.bucket_rows)
    return ImageRequest(
        id="render",
        group="render",
        checkpoint=checkpoint,
        prompt=options.prompt,
        negative_prompt=options.negative,
        width_px=width_px,
        height_px=height_px,
        num_steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        seed=options.seed,
        init_image=_picture(options.init_image, "RGB") if options.init_image else None,
        mask=_picture(options.mask, "L") if options.mask else None,
        strength=options.strength,
        adapters=tuple(AdapterUse(Path(path).stem, strength) for path, strength in options.adapter),
        determinism=Determinism.REPRODUCIBLE if is_pinned else Determinism.BEST_EFFORT,
        bucket_rows=options.bucket_rows,
    )


def native_size(checkpoint: Path) -> tuple[int, int]:
    """Give the (width_px, height_px) a checkpoint was trained for, from its configs.

    Raises `CheckpointCorrupt`.
    """
    denoiser = next(
        (name for name in ("unet", "transformer") if (checkpoint / name).is_dir()), "unet"
    )
    try:
        sample_size = _config(checkpoint / denoiser)["sample_size"]
        levels = len(_config(checkpoint / "vae")["block_out_channels"])
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointCorrupt(
            str(checkpoint), f"its size cannot be read, name one with --size: {problem!r}"
        ) from problem
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    return width * 2 ** (levels - 1), height * 2 ** (levels - 1)


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _picture(path: str, mode: str) -> Picture:
    with Image.open(path) as file:
        return Picture(np.asarray(file.convert(mode)))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


def _adapter(text: str) -> tuple[str, float]:
    path, _, strength = text.rpartition(":")
    return (path, float(strength)) if path else (text, 1.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.render", description="Render one image from a prompt."
    )
    parser.add_argument("prompt")
    parser.add_argument(
        "--checkpoint", required=True, help="a checkpoint folder in the layout of diffusers"
    )
    _add_image_options(parser)
    _add_picture_options(parser)
    _add_engine_options(parser)
    parser.add_argument("--out", default="out.png")
    return parser


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", default="", help="what should not be in the image")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--guidance", type=float, default=1.5, help="1 or less: no classifier-free guidance"
    )
    parser.add_argument("--sampler", choices=[*SAMPLERS, *FLOW_SAMPLERS], default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size",
        type=_size,
        help="WIDTHxHEIGHT in pixels; default: what the checkpoint was trained for",
    )


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init-image", help="a picture of that size to start from")
    parser.add_argument(
        "--mask", help="a picture of that size: repaint the init image where it is white"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="0 to 1: how much of the init image is noise at the start",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=_adapter,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA weights; repeatable",
    )
    parser.add_argument(
        "--bucket-rows",
        type=int,
        help="render reproducibly, every forward padded to this many rows",
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="sd")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main())
