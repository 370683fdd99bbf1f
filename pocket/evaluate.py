"""Measure how well the shipped pocket model follows its prompts: `python -m pocket.evaluate`.

Every prompt describes an unseen scene: its combination of colours, shapes, size and place is one of
the tenth that `world.is_held_out` keeps out of training. So neither that picture nor its full
caption was ever shown, though all words are known. Each prompt names all its attributes. Weights
are used in fp32 after the rounding to fp16 they are shipped with; prompts, seeds and the one torch
thread are fixed.

Prints a markdown table, paints a contact sheet, and exits 1 if a step count misses the target. With
`--readme` the table and the weights' digests also replace those in `pocket/README.md`.
"""

import argparse
import hashlib
import random
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from pocket.checker import Verdict, check
from pocket.world import SIDE_PX, caption, is_held_out, random_scene

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
MEASURED_FROM = "<!-- measured: begin -->"
MEASURED_TO = "<!-- measured: end -->"
HEADER = (
    "| steps | background | colour | shape | place | size "
    "| two objects: colours / shapes | everything right | s/image |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
CHECKPOINT = HERE / "checkpoint"
PROMPT_SEED = 20_000
GUIDANCE = 1.5  # more of it overdoes what tells shapes apart: squares grow horns
TARGET = 0.95
BATCH = 8
SHEET_COLUMNS = 6
SHEET_ROWS = 4


def unseen_prompts(count: int, seed: int = PROMPT_SEED) -> list[str]:
    """Draw different, complete captions of held-out scenes; three in ten have two objects."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = random_scene(rng, held_out=True)
        assert is_held_out(scene)
        prompts[caption(scene, rng, is_complete=True)] = None
    return list(prompts)


def load_pipeline(checkpoint: Path = CHECKPOINT) -> StableDiffusionPipeline:
    """Load the shipped fp16 weights, to compute in fp32."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        checkpoint,
        safety_checker=None,
        use_safetensors=True,
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], num_steps: int, first_seed: int = 0
) -> list[np.ndarray]:
    """Render one uint8 picture per prompt.

    Prompt i starts from the noise of seed `first_seed` + i, whatever the batches.
    """
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        texts = list(prompts[start : start + BATCH])
        seeds = [
            torch.Generator("cpu").manual_seed(first_seed + start + row)
            for row in range(len(texts))
        ]
        images = pipeline(
            texts,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE,
            generator=seeds,
            output_type="np",
        ).images
        pictures.extend((images * 255).round().astype(np.uint8))
    return pictures


def share(answers: Sequence[bool | None]) -> str:
    """Return the percentage of yes among those asked."""
    asked = [answer for answer in answers if answer is not None]
    return f"{100 * sum(asked) / len(asked):.1f}" if asked else "–"


def table_row(num_steps: int, verdicts: Sequence[Verdict], seconds: float) -> str:
    """Write one line of the markdown table."""
    one = [verdict for verdict in verdicts if not verdict.expected.is_pair]
    two = [verdict for verdict in verdicts if verdict.expected.is_pair]
    cells = [
        str(num_steps),
        share([v.background for v in verdicts]),
        share([v.colour for v in one]),
        share([v.shape for v in one]),
        share([v.place for v in one]),
        share([v.size for v in verdicts]),
        f"{share([v.colour for v in two])} / {share([v.shape for v in two])}",
        f"**{share([v.everything_right for v in verdicts])}**",
        f"{seconds / len(verdicts):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def contact_sheet(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> Image.Image:
    """Paint a grid of pictures, each over its caption."""
    pad = 14
    text_px = 46
    cell_width, cell_height = SIDE_PX + 2 * pad, SIDE_PX + pad + text_px
    sheet = Image.new(
        "RGB", (SHEET_COLUMNS * cell_width, SHEET_ROWS * cell_height + pad), (232, 232, 228)
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = index % SHEET_COLUMNS * cell_width + pad, index // SHEET_COLUMNS * cell_height + pad
        sheet.paste(Image.fromarray(picture), (x, y))
        pen.text(
            (x, y + SIDE_PX + 3),
            "\n".join(textwrap.wrap(prompt, 24)),
            fill=(30, 30, 30),
            font=font,
            spacing=1,
        )
    return sheet


def digests(checkpoint: Path) -> str:
    """Write one line per weight file: its SHA-256 and its name."""
    files = sorted(checkpoint.glob("*/*.safetensors"))
    return "\n".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(checkpoint)}"
        for path in files
    )


def write_readme(rows: Sequence[str], num_prompts: int, checkpoint: Path) -> None:
    """Put what was measured, and of which weights, between the README's two marks."""
    text = README.read_text()
    before = text[: text.index(MEASURED_FROM)]
    after = text[text.index(MEASURED_TO) :]
    table = "\n".join([HEADER, *rows])
    files = digests(checkpoint)
    measured = (
        f"Percent right, {num_prompts} unseen prompts:\n\n{table}\n\n"
        f"Measured on these files (SHA-256):\n\n```\n{files}\n```"
    )
    README.write_text(f"{before}{MEASURED_FROM}\n{measured}\n{after}")


def measure(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], num_steps: int
) -> tuple[list[np.ndarray], list[Verdict], float]:
    """Render every prompt and check it; return pictures, verdicts and the seconds of rendering."""
    started_s = time.perf_counter()
    pictures = render(pipeline, prompts, num_steps)
    seconds = time.perf_counter() - started_s
    verdicts = [check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return pictures, verdicts, seconds


def misses(num_steps: int, prompts: Sequence[str], verdicts: Sequence[Verdict]) -> list[str]:
    """Write one line for each picture that is not all right."""
    return [
        f"{num_steps} steps, {prompt!r}: {verdict.summary}"
        for prompt, verdict in zip(prompts, verdicts, strict=True)
        if not verdict.everything_right
    ]


def main() -> None:
    """Measure with the options of the command line."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(options.checkpoint)
    prompts = unseen_prompts(options.prompts, options.prompt_seed)
    print(HEADER)
    rows: list[str] = []
    missed: list[int] = []
    told: list[str] = []
    for num_steps in options.steps:
        pictures, verdicts, seconds = measure(pipeline, prompts, num_steps)
        rows.append(table_row(num_steps, verdicts, seconds))
        print(rows[-1], flush=True)
        told += misses(num_steps, prompts, verdicts)
        if np.mean([verdict.everything_right for verdict in verdicts]) < TARGET:
            missed.append(num_steps)
        if num_steps == options.steps[0]:
            shown = min(len(prompts), SHEET_COLUMNS * SHEET_ROWS)
            contact_sheet(pictures[:shown], prompts[:shown]).save(options.sheet)
    if options.readme:
        write_readme(rows, len(prompts), options.checkpoint)
    if options.misses:
        print("\n".join(told))
    if missed:
        sys.exit(f"below {TARGET:.0%} at {' and '.join(map(str, missed))} steps")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.evaluate",
        description="Measure how well the pocket model follows prompts.",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 4])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--prompt-seed", type=int, default=PROMPT_SEED, help="another seed gives other prompts"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--sheet", type=Path, default=HERE / "contact-sheet.png")
    parser.add_argument(
        "--readme", action="store_true", help="write the table and the digests into the README"
    )
    parser.add_argument(
        "--misses", action="store_true", help="also tell what was wrong, picture by picture"
    )
    return parser


if __name__ == "__main__":
    main()
