"""Render one image from a prompt, without the rest of the house.

Example: python -m engine.render "a red circle on a blue background" --checkpoint pocket/checkpoint --steps 20 --seed 7 --out out.png
"""

import argparse
import json
import struct
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointCorrupt, EngineError
from engine.request import Determinism, ImageRequest
from engine.samplers import SAMPLERS


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, render, write a PNG and print the record as one line of JSON. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        width_px, height_px = options.size or native_size(Path(options.checkpoint))
        spec = CheckpointSpec(
            name=Path(options.checkpoint).name,
            path=options.checkpoint,
            family=options.family,
            precision=options.precision,
            sizes=((width_px, height_px),),
            samplers=tuple(SAMPLERS),
            default_sampler=options.sampler,
        )
        request = ImageRequest(
            id="render",
            group="render",
            checkpoint=spec.name,
            prompt=options.prompt,
            negative_prompt=options.negative,
            width_px=width_px,
            height_px=height_px,
            num_steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            seed=options.seed,
            determinism=Determinism.REPRODUCIBLE if options.bucket_rows else Determinism.BEST_EFFORT,
            bucket_rows=options.bucket_rows,
        )
        with Engine(EngineConfig(device=options.device, num_threads=options.threads), [spec]) as engine:
            image = engine.submit(request).result()
    except EngineError as problem:
        print(f"render: {problem}", file=sys.stderr)
        return 1
    Path(options.out).write_bytes(png_bytes(image.pixels))
    print(json.dumps({"out": options.out, **asdict(image.record)}))
    return 0


def native_size(checkpoint: Path) -> tuple[int, int]:
    """The (width_px, height_px) a checkpoint was trained for, from its configs. Raises `CheckpointCorrupt`."""
    try:
        sample_size = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
        levels = len(json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointCorrupt(str(checkpoint), f"its size cannot be read: {problem}") from problem
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    return width * 2 ** (levels - 1), height * 2 ** (levels - 1)


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A plain 8-bit RGB PNG of pixels [h, w, 3]."""
    height, width, _ = pixels.shape
    # Every line is preceded by its filter type, 0: none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.render", description="Render one image from a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder in the layout of diffusers")
    parser.add_argument("--negative", default="", help="what should not be in the image")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5, help="1 or less: no classifier-free guidance")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=_size, help="WIDTHxHEIGHT in pixels; default: what the checkpoint was trained for")
    parser.add_argument("--bucket-rows", type=int, help="render reproducibly, every forward padded to this many rows")
    parser.add_argument("--family", default="sd")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="out.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
