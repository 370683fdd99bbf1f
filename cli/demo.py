"""Define `demo`: run the whole system once, from prompts to checked images and the audit trail.

Starts the stack if it does not run, and stops only what it started.
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from cli import screen
from cli.installation import Installation, pass_installation
from cli.sql import ask
from cli.watching import WatchedJob
from darkroom_client import Client, Job
from pocket.checker import check

_COLUMNS_OF_SHEET = 5
_CAPTION_PX = 40
_PROMPT_CHARS = 42  # a bar and its words still fit into 80 columns
# The pocket model promises 95 % of many prompts; one miss among a dozen is no fault of the stack.
_LEAST_MATCHING = 0.9
_POLL_EVERY_S = 0.2

_LARGEST_BATCHES = (
    "SELECT job_id::text, max_batch_images FROM job_history WHERE job_id::text = ANY(%s)"
)
_TRAIL = (
    "SELECT at, seq, event, actor, attempt, left(hash, 12) AS hash "
    "FROM audit_log WHERE job_id = '{}' ORDER BY seq"
)
_COSTS = (
    "SELECT tier, count(*) AS jobs, sum(num_images) AS images, "
    "round(avg(queue_s), 3) AS mean_queue_s,\n"
    "         round(avg(total_s), 3) AS mean_total_s, sum(gpu_seconds) AS gpu_seconds, "
    "sum(cost) AS cost, currency\n"
    "  FROM job_history WHERE job_id IN ({}) GROUP BY tier, currency ORDER BY tier"
)


@dataclass(frozen=True)
class DemoJob:
    """Describe one job of the demo."""

    prompt: str
    tier: str
    seed: int
    steps: int | None = None
    n: int = 1
    output_format: str = "png"


DEMO_JOBS = (
    DemoJob("a large red circle in the center on a blue background", "fast", 7),
    DemoJob("a small yellow star at the top on a black background", "fast", 11),
    DemoJob(
        "a large green square in the center on a white background", "fast", 23, output_format="webp"
    ),
    DemoJob("a large purple triangle at the left on a yellow background", "fast", 42),
    DemoJob("a large orange circle in the center on a black background", "quality", 7),
    DemoJob("a small red square left of a small blue circle on a white background", "quality", 101),
    DemoJob("a small white triangle at the bottom on a purple background", "quality", 5, steps=30),
    DemoJob("a large yellow star at the right on a blue background", "quality", 2026),
    DemoJob("a large blue star in the center on orange", "batch", 1),
    DemoJob("a small green triangle left of a small red circle on a black background", "batch", 3),
    DemoJob("a small black square at the top on a white background", "batch", 9, n=2),
    DemoJob(
        "a large white circle in the center on a green background",
        "batch",
        13,
        output_format="jpeg",
    ),
)


@dataclass(frozen=True)
class CheckedImage:
    """Hold one image of the demo, its path, and whether it shows what its prompt says."""

    job: Job
    path: Path
    pixels: np.ndarray
    is_right: bool
    summary: str


@click.command()
@click.option(
    "--wait",
    "wait_s",
    type=float,
    default=180,
    show_default=True,
    help="Seconds to wait for the start, and again for the jobs.",
)
@pass_installation
@click.pass_context
def demo(ctx: click.Context, installation: Installation, wait_s: float) -> None:
    """Make a dozen images in all tiers, check them, and show the audit trail.

    Exit code 1 if a job does not succeed, or if fewer than nine images in ten show what their
    prompts say.
    """
    stack = installation.stack()
    starts_it = not stack.is_up()
    began = time.monotonic()
    try:
        with screen.err().status("starting") as spinner:
            stack.up(wait_s, on_stage=spinner.update)
        env = stack.env
        verb = "started" if starts_it else "found running"
        screen.out().print(
            f"Darkroom {verb} in {time.monotonic() - began:.1f} s at {env['DARKROOM_URL']}\n"
        )
        with Client(env["DARKROOM_URL"], env["DARKROOM_API_KEY"]) as client:
            jobs = _run(client, DEMO_JOBS, wait_s)
            images = _fetch(client, jobs, installation.data_dir / "demo")
        is_good = _report(installation, jobs, images, auditor_url=env["AUDITOR_DATABASE_URL"])
    finally:
        if starts_it:
            with screen.err().status("stopping"):
                stack.down()
    if starts_it:
        screen.out().print(
            f"\nStopped; the data stay in {installation.data_dir}. `make up` starts it again."
        )
    if not is_good:
        ctx.exit(1)


def _run(client: Client, demo_jobs: Sequence[DemoJob], timeout_s: float) -> list[Job]:
    """Submit every job at once and watch the jobs until all are finished or the time is over."""
    jobs = [_submit(client, demo_job) for demo_job in demo_jobs]
    progress = _new_progress()
    bars = [_add_bar(progress, job) for job in jobs]
    heading = Text(f"{len(jobs)} jobs submitted at once", style="bold")
    deadline = time.monotonic() + timeout_s
    with Live(Group(heading, progress), console=screen.err()):
        while time.monotonic() < deadline:
            for index, job in enumerate(jobs):
                if not job.is_finished:
                    jobs[index] = client.job(job.id)
                    _move_bar(progress, bars[index], jobs[index])
            if all(job.is_finished for job in jobs):
                break
            time.sleep(_POLL_EVERY_S)
    return jobs


def _submit(client: Client, demo_job: DemoJob) -> Job:
    return client.create_job(
        demo_job.prompt,
        tier=demo_job.tier,
        seed=demo_job.seed,
        steps=demo_job.steps,
        n=demo_job.n,
        output_format=demo_job.output_format,
    )


def _prompt(job: Job) -> str:
    """Return the prompt of a job that nobody has erased."""
    assert job.prompt is not None
    return job.prompt


def _new_progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[where]}"),
    )
    return Progress(*columns, console=screen.err())


def _add_bar(progress: Progress, job: Job) -> TaskID:
    label = f"{job.tier:8}{escape(_prompt(job)[:_PROMPT_CHARS]):{_PROMPT_CHARS}}"
    return progress.add_task(label, total=job.steps * job.n + 1, where=job.state)


def _move_bar(progress: Progress, bar: TaskID, job: Job) -> None:
    watched_job = WatchedJob.of(job)
    done = watched_job.done + (job.state == "succeeded")
    progress.update(bar, completed=done, where=watched_job.words)


def _fetch(client: Client, jobs: Sequence[Job], folder: Path) -> list[CheckedImage]:
    """Save every stored image below `folder` and look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    images = []
    for number, job in enumerate(jobs, 1):
        words = "-".join(_prompt(job).split())
        for image in job.images:
            if image.content_sha256:
                path = folder / f"{number:02}-{image.index}-{job.tier}-{words}.png"
                images.append(_fetch_image(client, job, image.index, path))
    return images


def _fetch_image(client: Client, job: Job, index: int, path: Path) -> CheckedImage:
    """Save one image as a PNG, whatever its format, and look at it."""
    content = client.image(job, index)
    pixels = np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))
    if job.output_format == "png":
        path.write_bytes(content)
    else:
        PILImage.fromarray(pixels).save(path)
    verdict = check(pixels, _prompt(job))
    return CheckedImage(job, path, pixels, verdict.everything_right, verdict.summary)


def _report(
    installation: Installation,
    jobs: Sequence[Job],
    images: Sequence[CheckedImage],
    *,
    auditor_url: str,
) -> bool:
    """Print what happened, as SQL shows it, and draw the contact sheet.

    Returns True when all went well.
    """
    ids = [job.id for job in jobs]
    _print_times(jobs, images, dict(ask(auditor_url, _LARGEST_BATCHES, (ids,)).rows))
    _show(auditor_url, "The audit trail of the first job", _TRAIL.format(ids[0]))
    all_ids = ", ".join(f"'{job_id}'" for job_id in ids)
    _show(auditor_url, "What it cost", _COSTS.format("…"), _COSTS.format(all_ids))
    return _print_outcome(jobs, images, installation.data_dir / "demo" / "contact-sheet.png")


def _print_times(
    jobs: Sequence[Job], images: Sequence[CheckedImage], batches: Mapping[str, int]
) -> None:
    """Print a line for each job. batches: by job, the most images that shared a batch with it."""
    columns = ["tier", "prompt", "seed", "steps", "n"]
    columns += ["queue s", "denoise s", "store s", "total s", "max batch", "match", "state"]
    rows = []
    for job in jobs:
        own = [image for image in images if image.job.id == job.id]
        match = f"{sum(image.is_right for image in own)}/{job.n}"
        timing = job.timing
        times = (timing.queue_s, timing.render_s, timing.store_s, timing.total_s)
        asked = (job.tier, job.prompt, job.seed, job.steps, job.n)
        rows.append((*asked, *times, batches.get(job.id), match, job.state))
    title = "\nWhere the time went"
    screen.out().print(screen.table(columns, rows, title=title, numbers=columns[2:11]))


def _print_outcome(jobs: Sequence[Job], images: Sequence[CheckedImage], sheet: Path) -> bool:
    """Draw the contact sheet and print how many jobs and images are right.

    Returns True when all went well.
    """
    succeeded = sum(job.state == "succeeded" for job in jobs)
    right = sum(image.is_right for image in images)
    expected = sum(job.n for job in jobs)
    for image in images:
        if not image.is_right:
            screen.complain(f"{image.path.name}: {image.summary}")
    if images:
        _draw_sheet(images).save(sheet)
    screen.out().print(
        f"\n{succeeded} of {len(jobs)} jobs succeeded; "
        f"{right} of {expected} images show what their prompts say."
    )
    screen.out().print(f"Images: {sheet.parent}/*.png; all of them: {sheet}")
    return succeeded == len(jobs) and right >= _LEAST_MATCHING * expected


def _show(database_url: str, title: str, statement: str, full_statement: str | None = None) -> None:
    """Print a statement and what Postgres answers.

    full_statement: the statement to run, when it is too long to print.
    """
    answer = ask(database_url, full_statement or statement)
    screen.out().print(f"\n[bold]{title}[/]\n  [dim]{escape(statement)}[/]")
    screen.out().print(screen.table(answer.columns, answer.rows))


def _draw_sheet(images: Sequence[CheckedImage]) -> PILImage.Image:
    """Draw all images on one page, each over its prompt; red text marks a mismatch."""
    side = max(max(image.pixels.shape[:2]) for image in images)
    num_rows = -(-len(images) // _COLUMNS_OF_SHEET)
    sheet = PILImage.new(
        "RGB",
        (_COLUMNS_OF_SHEET * (side + 16) + 16, num_rows * (side + 16 + _CAPTION_PX) + 16),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, _COLUMNS_OF_SHEET)
        x, y = 16 + column * (side + 16), 16 + row * (side + 16 + _CAPTION_PX)
        sheet.paste(PILImage.fromarray(image.pixels), (x, y))
        caption = "\n".join(_lines(f"{image.job.tier}: {image.job.prompt}", side // 5))
        draw.text(
            (x, y + side + 2), caption, fill="black" if image.is_right else "red", font_size=9
        )
    return sheet


def _lines(text: str, width: int) -> list[str]:
    """Return the first three lines of `text`, wrapped at `width` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]
