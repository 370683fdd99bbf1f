"""The options that say what an image should be, the same for every command that takes a wish."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_PICTURE = click.Path(path_type=Path, exists=True, dir_okay=False)

_OPTIONS = [
    click.option("--tier", help="Class of service; the fleet's first by default."),
    click.option("--model", help="Model; the fleet's first by default."),
    click.option("--size", help="WIDTHxHEIGHT in pixels."),
    click.option("--steps", type=int, help="Denoise steps."),
    click.option("--guidance", type=float, help="How strictly the prompt is followed."),
    click.option("--sampler", help="Sampling method."),
    click.option("--seed", type=int, help="Seed of the first image; the next have seed + 1, …  [default: random]"),
    click.option("-n", "n", type=int, default=1, show_default=True, help="Number of images."),
    click.option("--negative", "negative_prompt", help="What the image should not show."),
    click.option("--format", "output_format", type=click.Choice(list(EXTENSIONS)), help="By default what the output's name says, or png."),
    click.option("--init", "init_image", type=_PICTURE, help="Picture to start from."),
    click.option("--mask", type=_PICTURE, help="White where that picture is to be painted anew."),
    click.option("--strength", type=float, help="How far to go from that picture, 0 to 1."),
]


def wish_options(command: Command) -> Command:
    """Give the command an option for each field of a wish, under the field's name."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
