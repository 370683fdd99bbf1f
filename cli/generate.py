"""generate: a prompt becomes image files, with a look at where the time went."""

from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cli import screen
from cli.installation import Installation, pass_installation
from darkroom_client import Client, Job

_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@click.command()
@click.argument("prompt")
@click.option("--tier", help="Class of service; the fleet's first by default.")
@click.option("--model", help="Model; the fleet's first by default.")
@click.option("--size", help="WIDTHxHEIGHT in pixels.")
@click.option("--steps", type=int, help="Denoise steps.")
@click.option("--guidance", type=float, help="How strictly the prompt is followed.")
@click.option("--sampler", help="Sampling method.")
@click.option("--seed", type=int, help="Seed of the first image; the next have seed + 1, …  [default: random]")
@click.option("-n", "num_images", type=int, default=1, show_default=True, help="Number of images.")
@click.option("--negative", "negative_prompt", help="What the image should not show.")
@click.option("--format", "output_format", type=click.Choice(list(_EXTENSIONS)), help="By default what the output's name says, or png.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Output file; out-0.png, out-1.png … for several.")
@click.option("--timeout", "timeout_s", type=float, default=600, show_default=True, help="Seconds to wait for the job.")
@pass_installation
@click.pass_context
def generate(
    ctx: click.Context,
    installation: Installation,
    prompt: str,
    tier: str | None,
    model: str | None,
    size: str | None,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    seed: int | None,
    num_images: int,
    negative_prompt: str | None,
    output_format: str | None,
    output: Path | None,
    timeout_s: float,
) -> None:
    """Make images of PROMPT. Ctrl-C cancels the job."""
    wanted_format = output_format or (_FORMATS.get(output.suffix.lower()) if output else None)
    with installation.client() as client:
        job = client.create_job(
            prompt,
            negative_prompt=negative_prompt,
            model=model,
            tier=tier,
            size=size,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            seed=seed,
            n=num_images,
            output_format=wanted_format,
        )
        job = watch(client, job, timeout_s)
        saved = save(client, job, output or Path(f"out{_EXTENSIONS.get(job.output_format, '.png')}"))
    screen.out().print(timing_table(job))
    for path in saved:
        screen.out().print(f"saved {path}")
    if job.state != "succeeded":
        reason = f": {job.failure.code} ({job.failure.detail})" if job.failure else ""
        screen.complain(f"Job {job.id} is {job.state}{reason}")
        ctx.exit(1)


def watch(client: Client, job: Job, timeout_s: float) -> Job:
    """Wait for a job under a live progress bar. Ctrl-C cancels the job and is passed on."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[where]}"), TimeElapsedColumn())
    with Progress(*columns, console=screen.err(), transient=True) as progress:
        bar = progress.add_task(job.id[-8:], total=job.steps * job.n + 1, where=job.state)

        def show(seen: Job) -> None:
            done, where = how_far(seen)
            progress.update(bar, completed=done, where=where)

        try:
            return client.wait(job.id, timeout_s, on_progress=show)
        except KeyboardInterrupt:
            state = client.cancel(job.id).state
            progress.console.print(f"job {job.id} is {state}")
            raise


def how_far(job: Job) -> tuple[int, str]:
    """Denoise steps done of `steps * n`, plus one for storing; and the same in words."""
    steps = job.steps * job.n
    if job.is_finished:
        return steps + 1, job.state
    if job.state == "storing":
        return steps, "storing"
    if job.state == "running" and job.progress:
        images = f" · {job.progress.images_done} of {job.n} images stored" if job.n > 1 else ""
        return min(job.progress.step, steps), f"step {job.progress.step}/{job.progress.num_steps}{images}"
    return 0, job.state


def save(client: Client, job: Job, output: Path) -> list[Path]:
    """Download every stored image of the job; the paths."""
    stored = [image for image in job.images if image.content_sha256]
    paths = []
    for image in stored:
        path = output if job.n == 1 else output.with_name(f"{output.stem}-{image.index}{output.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.image(job, image.index))
        paths.append(path)
    return paths


def timing_table(job: Job) -> object:
    """Where the time of one job went, and what it cost."""
    columns = ["queue s", "denoise s", "store s", "total s", "gpu-seconds", "price", "tier", "model", "steps", "seed"]
    cost = (job.cost.gpu_seconds, f"{job.cost.amount} {job.cost.currency}") if job.cost else (None, None)
    timing = job.timing
    row = (timing.queue_s, timing.render_s, timing.store_s, timing.total_s, *cost, job.tier, job.model, job.steps, job.seed)
    return screen.table(columns, [row], numbers=columns[:6])
