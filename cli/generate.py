"""Define `generate`: make image files of a prompt, or of a whole file of prompts.

For a single prompt it also shows where the time went.
"""

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from cli import screen
from cli.installation import Installation, pass_installation
from cli.job_options import EXTENSIONS, job_options
from cli.watching import watch
from darkroom_client import Client, Job, downloads
from darkroom_client.job_fields import PICTURE_FIELDS

if TYPE_CHECKING:
    from cli.many import PromptRunner
    from cli.prompts import PromptLine
    from cli.runs import Run

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--from",
    "source",
    type=click.File("rb"),
    help="Make the images of a file: one prompt, or one JSON object with the fields of a job, on"
    " each line; or one JSON list of these. - reads standard input.",
)
@job_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; several images become out-0.png, out-1.png, … With --from: a folder.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=600,
    show_default=True,
    help="Seconds to wait for the job of PROMPT.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="With --from: the most unfinished jobs at once.",
)
@click.option(
    "--cancel-on-interrupt",
    "cancels",
    is_flag=True,
    help="With --from: Ctrl-C also cancels the unfinished jobs.",
)
@click.option(
    "--retry-failed",
    is_flag=True,
    help="With --from: try lines again that failed in an earlier run.",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="With --from: ignore the earlier run in the output folder and begin anew.",
)
@pass_installation
@click.pass_context
def generate(
    ctx: click.Context,
    installation: Installation,
    /,
    prompt: str | None,
    source: BinaryIO | None,
    output: Path | None,
    timeout_s: float,
    parallel: int,
    cancels: bool,
    retry_failed: bool,
    fresh: bool,
    **fields: Any,
) -> None:
    """Make images from PROMPT, or from every line of a file.

    Ctrl-C cancels the job of PROMPT.

    With --from, the images are <folder>/<line>-<seed>-<index>.<format>. The fields of a line take
    precedence over the options. Ctrl-C ends the command and lets unfinished jobs go on; a second
    Ctrl-C within two seconds cancels them. The same command continues later: no job is created
    twice, and only images that are missing or damaged are downloaded.
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("give either a PROMPT or --from FILE")
    if source is not None:
        is_complete = _make_many(
            installation,
            source,
            fields,
            output or Path("out"),
            parallel=parallel,
            cancels=cancels,
            retry_failed=retry_failed,
            fresh=fresh,
        )
        if not is_complete:
            ctx.exit(1)
        return
    assert prompt is not None
    fields["output_format"] = _format(output, fields["output_format"])
    with installation.client() as client:
        job = watch(client, client.create_job(prompt, **fields), timeout_s=timeout_s, cancels=True)
        report(client, job, output)
    if job.state != "succeeded":
        ctx.exit(1)


def _format(output: Path | None, asked: str | None) -> str | None:
    """Return the format to ask for, from the option or the output's name.

    Raises UsageError for a name that contradicts the option, or whose format is not offered.
    """
    if output is None or not output.suffix:
        return asked
    named = FORMATS.get(output.suffix.lower())
    if named is None:
        raise click.UsageError(
            f"{output.name}: {output.suffix} is not a known format; use one of {', '.join(FORMATS)}"
        )
    if asked not in (None, named):
        raise click.UsageError(f"{output.name} is a name for {named}, but --format is {asked}")
    return named


def report(client: Client, job: Job, output: Path | None) -> None:
    """Save a finished job's images and print where its time went; if it failed, print why.

    output: out.png by default.
    """
    saved = save(client, job, output or Path(f"out{EXTENSIONS.get(job.output_format, '.png')}"))
    screen.out().print(timing_table(job))
    for path in saved:
        screen.out().print(f"saved {path}")
    warn_of(job)
    complain_of(job)


def warn_of(job: Job) -> None:
    """Print the job's warnings: which parts of its texts had no effect."""
    for warning in job.warnings:
        screen.warn(warning.detail)


def complain_of(job: Job) -> None:
    """Print why a job did not succeed; print nothing if it did."""
    if job.state != "succeeded":
        reason = f": {job.failure.code} ({job.failure.detail})" if job.failure else ""
        screen.complain(f"Job {job.id} is {job.state}{reason}")


def save(client: Client, job: Job, output: Path) -> list[Path]:
    """Download every stored image of the job; return the paths."""
    stored = [image for image in job.images if image.content_sha256]
    paths = []
    for image in stored:
        path = (
            output
            if job.n == 1
            else output.with_name(f"{output.stem}-{image.index}{output.suffix}")
        )
        downloads.write(path, client.image(job, image.index))
        paths.append(path)
    return paths


def timing_table(job: Job) -> object:
    """Return a table of where the time of one job went, and what it cost."""
    columns = ["queue s", "denoise s", "store s", "total s", "gpu-seconds", "price"]
    numbers = list(columns)
    columns += ["tier", "model", "steps", "seed"]
    timing = job.timing
    times = (timing.queue_s, timing.render_s, timing.store_s, timing.total_s)
    cost = job.cost
    price = (cost.gpu_seconds, f"{cost.amount} {cost.currency}") if cost else (None, None)
    row = (*times, *price, job.tier, job.model, job.steps, job.seed)
    return screen.table(columns, [row], numbers=numbers)


def _make_many(
    installation: Installation,
    source: BinaryIO,
    options: dict[str, Any],
    folder: Path,
    *,
    parallel: int,
    cancels: bool,
    retry_failed: bool,
    fresh: bool,
) -> bool:
    """Serve every line of the file; return True when all succeeded.

    Ctrl-C raises KeyboardInterrupt after the run is saved.
    """
    from cli.board import Board
    from cli.many import Interrupted, PromptRunner

    fields = {name: value for name, value in options.items() if value is not None}
    lines, run = _open_run(source.read(), fields, folder, fresh=fresh)

    async def go() -> PromptRunner:
        async with installation.async_client() as client:
            for field in PICTURE_FIELDS:
                if field in fields:
                    fields[field] = (await client.upload(fields[field])).id
            with Board(len(lines)) as board:
                many = PromptRunner(
                    client, run, lines, fields, folder, board, retry_failed=retry_failed
                )
                await many.go(parallel, cancels=cancels)
            return many

    try:
        many = asyncio.run(go())
    except Interrupted:
        raise KeyboardInterrupt from None
    _report_many(many, len(lines), folder)
    return not many.failed


def _open_run(
    content: bytes, fields: dict[str, Any], folder: Path, *, fresh: bool
) -> tuple[list["PromptLine"], "Run"]:
    """Read the prompts, and open the run of the output folder. Raises click.UsageError."""
    from cli import prompts
    from cli.runs import AnotherRun, Run

    try:
        lines = prompts.read(prompts.decoded(content))
        run = Run.opened(folder, source=content, options=_fingerprint(fields), fresh=fresh)
    except (prompts.BadLine, AnotherRun) as error:
        raise click.UsageError(str(error)) from None
    return lines, run


def _report_many(many: "PromptRunner", num_lines: int, folder: Path) -> None:
    """Print how much was done; then every warning and every failure, in the order of the lines."""
    had = many.num_images - many.num_new
    there = f", {had} of them there already" if had else ""
    screen.out().print(
        f"{num_lines - len(many.failed)} of {num_lines} prompts done: "
        f"{many.num_images} images in {folder}{there}"
    )
    for line, what in sorted(many.warned, key=lambda warned: warned[0].number):
        screen.warn(f"line {line.number} ({line.prompt[:40]}): {what}")
    for line, why in sorted(many.failed, key=lambda failure: failure[0].number):
        screen.complain(f"line {line.number} ({line.prompt[:40]}): {why}")


def _fingerprint(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the run stores them: a picture as the SHA-256 of its content."""
    return {
        name: hashlib.sha256(value.read_bytes()).hexdigest() if isinstance(value, Path) else value
        for name, value in sorted(fields.items())
    }
