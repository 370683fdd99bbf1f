"""Define the options that describe an image, the same for every command that takes them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_PICTURE = click.Path(path_type=Path, exists=True, dir_okay=False)


def _entry(text: str, metavar: str) -> tuple[str, str]:
    """Split a text at its first `=`. Raises BadParameter."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{text!r} is not {metavar}")
    return name, value


def _metadata(
    _ctx: click.Context, param: click.Parameter, said: tuple[str, ...]
) -> dict[str, str] | None:
    """Read the entries as one object.

    Returns None without entries, so that a line of a file of prompts may have its own.
    """
    return dict(_entry(text, str(param.metavar)) for text in said) or None


def _adapters(
    _ctx: click.Context, param: click.Parameter, said: tuple[str, ...]
) -> list[dict[str, Any]] | None:
    """Read each adapter with its strength, where that is said; None for none."""
    return [_adapter(text, str(param.metavar)) for text in said] or None


def _adapter(text: str, metavar: str) -> dict[str, Any]:
    if "=" not in text:
        return {"name": text}
    name, value = _entry(text, metavar)
    try:
        strength = float(value)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise click.BadParameter(f"{text!r} is not {metavar}: the strength is a number")
    return {"name": name, "strength": strength}


_OPTIONS = [
    click.option("--tier", help="Class of service; by default the first in fleet.toml."),
    click.option("--model", help="Model; by default the first in fleet.toml."),
    click.option("--size", help="WIDTHxHEIGHT in pixels."),
    click.option("--steps", type=int, help="Denoise steps of each image."),
    click.option("--guidance", type=float, help="How closely the images follow the prompt."),
    click.option("--sampler", help="Sampling method."),
    click.option(
        "--seed",
        type=int,
        help="Seed of the first image; the next have seed + 1, …  [default: random]",
    ),
    click.option("-n", "n", type=int, default=1, show_default=True, help="Number of images."),
    click.option("--negative", "negative_prompt", help="What the image should not show."),
    click.option(
        "--format",
        "output_format",
        type=click.Choice(list(EXTENSIONS)),
        help="File format; by default that of the output's name, or png.",
    ),
    click.option("--init", "init_image", type=_PICTURE, help="Picture to start from."),
    click.option(
        "--mask", type=_PICTURE, help="Mask: white where the picture to start from is painted anew."
    ),
    click.option("--strength", type=float, help="How much that picture is changed, above 0 to 1."),
    click.option(
        "--clip-skip", type=int, help="Number of last layers of the CLIP text encoder to leave out."
    ),
    click.option(
        "--control",
        "control_image",
        type=_PICTURE,
        help="Picture that the model's control network follows.",
    ),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME[=STRENGTH]",
        callback=_adapters,
        help="Adapter (LoRA) of the model; repeat for several.",
    ),
    click.option(
        "--metadata",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_metadata,
        help="Your own entry, kept with the job; repeat for several.",
    ),
    click.option(
        "--start-deadline",
        "start_deadline_s",
        type=float,
        help="The job expires if it does not start within so many seconds.",
    ),
]


def job_options(command: Command) -> Command:
    """Give the command an option for each field of a job, under the field's name."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
