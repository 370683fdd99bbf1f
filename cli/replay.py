"""Define `replay`: repeat a job exactly, and check that its images are the same."""

from pathlib import Path

import click

from cli import screen
from cli.generate import FORMATS, complain_of, save
from cli.installation import Installation, pass_installation
from cli.job_options import EXTENSIONS
from cli.watching import watch
from darkroom_client import Job


@click.command()
@click.argument("job_id")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also save the new images.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=600,
    show_default=True,
    help="Seconds to wait for the new job.",
)
@pass_installation
@click.pass_context
def replay(
    ctx: click.Context,
    installation: Installation,
    job_id: str,
    output: Path | None,
    timeout_s: float,
) -> None:
    """Make the images of JOB_ID again and compare the pixels by their digests.

    Exit code 1 if they differ.
    """
    with installation.client() as client:
        original = client.job(job_id)
        if output:
            _check_format(output, original)
        again = watch(client, client.replay(job_id), timeout_s=timeout_s, cancels=True)
        saved = save(client, again, _with_suffix(output, again)) if output else []
    screen.out().print(f"job {again.id} repeats job {original.id}")
    for path in saved:
        screen.out().print(f"saved {path}")
    if again.state != "succeeded":
        complain_of(again)
        ctx.exit(1)
    if not _compare(original, again):
        ctx.exit(1)


def _check_format(output: Path, original: Job) -> None:
    """Raise click.UsageError if the suffix is of another format than the job's images."""
    if output.suffix and FORMATS.get(output.suffix.lower()) != original.output_format:
        raise click.UsageError(
            f"{output.name}: the images are {original.output_format}, as those of the job are"
        )


def _with_suffix(output: Path, job: Job) -> Path:
    return output if output.suffix else output.with_suffix(EXTENSIONS[job.output_format])


def _compare(original: Job, again: Job) -> bool:
    """Print both digests of every image; tell whether all are the same."""
    new = {image.index: image.pixels_sha256 for image in again.images}
    pairs = [
        (image.index, image.seed, image.pixels_sha256, new.get(image.index))
        for image in original.images
    ]
    is_same = all(before is not None and before == now for _, _, before, now in pairs)
    rows = [_row(*pair) for pair in pairs]
    screen.out().print(screen.table(["image", "seed", "original", "replay", "pixels"], rows))
    if is_same:
        screen.out().print(f"The same pixels: {len(pairs)} of {len(pairs)}.")
    elif any(before is None for _, _, before, _ in pairs):
        screen.complain(f"The original is {original.state}: there is nothing to compare with.")
    elif original.determinism == "best_effort":
        best_effort = "The job's tier is best effort: it does not promise the same pixels."
        screen.complain(f"The pixels differ. {best_effort}")
    else:
        screen.complain("The pixels differ.")
    return is_same


def _row(index: int, seed: int, before: str | None, now: str | None) -> tuple[object, ...]:
    is_same = before and before == now
    return (
        index,
        seed,
        (before or "")[:16] or None,
        (now or "")[:16] or None,
        "the same" if is_same else "different",
    )
