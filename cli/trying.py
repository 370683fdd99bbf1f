"""Define `models try`, and the trial of a model: loaded in a process of its own, so that one that
crashes is told like any other that fails.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cli import screen
from cli.checkpoints import device_settings, device_variables, fleet_and_text, models_named
from cli.installation import Installation, pass_installation
from policy.fleet import checkpoint_name
from settings import REPO

PROMPTS = ("a lighthouse on a cliff at dusk, oil painting", "a photo of a red fox in the snow")


@click.command("try")
@click.argument("model", required=False)
@click.option("--prompt", "prompts", multiple=True, help="What the pictures show; once for each.")
@pass_installation
@click.pass_context
def try_models(
    ctx: click.Context, installation: Installation, model: str | None, prompts: tuple[str, ...]
) -> None:
    """Load every version of MODEL, or of every model of fleet.toml, and make pictures with it.

    Each in a process of its own, so that one that fails is told and the others are tried. Exit code
    1 if any fails. Nothing is changed but the curves of this device.
    """
    fleet, text = fleet_and_text(device_settings(installation))
    failed = 0
    for name, entry in models_named(fleet, model).items():
        for version in entry.versions:
            pictures = installation.data_dir / "trials" / checkpoint_name(name, version.id)
            try:
                show(trial(installation, text, name, version.id, prompts or PROMPTS[:1], pictures))
            except click.ClickException as problem:
                failed += 1
                screen.complain(problem.message)
    ctx.exit(1 if failed else 0)


def trial(
    installation: Installation,
    text: str,
    name: str,
    version: str,
    prompts: tuple[str, ...],
    pictures: Path,
) -> dict[str, Any]:
    """Load the model in a process of its own and have it make pictures; return what it tells.

    text: of a fleet.toml that has the model.

    Raises click.ClickException.
    """
    checkpoint = checkpoint_name(name, version)
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="darkroom-trial-") as place:
        file = Path(place) / "fleet.toml"
        file.write_text(text, "utf-8")
        own = {"FLEET_FILE": str(file), "PYTHONPATH": str(REPO)}
        order = {"model": name, "version": version, "prompts": prompts}
        order["folder"] = str(pictures.absolute())
        with screen.err().status(f"loading {checkpoint} and making {len(prompts)} pictures"):
            done = subprocess.run(
                [sys.executable, "-P", "-m", "cli.trial"],
                input=json.dumps(order),
                env={**device_variables(installation), **own},
                capture_output=True,
                text=True,
            )
    answer = _answer_in(done.stdout)
    if done.returncode == 0 and answer is not None:
        return answer
    if answer is not None and "problem" in answer:
        raise click.ClickException(f"{checkpoint}: {answer['problem']}")
    raise click.ClickException(_told_by(done.returncode, done.stderr, checkpoint))


def _answer_in(output: str) -> dict[str, Any] | None:
    """Return the trial's answer: the last line of its output."""
    lines = output.strip().splitlines()
    with contextlib.suppress(ValueError):
        answer = json.loads(lines[-1]) if lines else None
        return answer if isinstance(answer, dict) else None
    return None


def _told_by(status: int, log: str, name: str) -> str:
    """Say why a trial ended that gave no answer."""
    tail = "\n".join(log.strip().splitlines()[-15:])
    if status < 0:
        by = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if by == "SIGKILL" else ""
        return f"{name}: its trial was ended by {by}{hint}\n{tail}"
    return f"{name}: its trial ended with {status}\n{tail}"


def show(answer: Mapping[str, Any]) -> None:
    """Print what the trial found out."""
    rows = [
        (each["prompt"], each["size"], each["steps"], f"{each['seconds']:.1f}", each["file"])
        for each in answer["pictures"]
    ]
    columns = ("picture of", "size", "steps", "s", "file")
    title = f"{answer['checkpoint']}, loaded in {answer['load_s']:.1f} s on {answer['device']}"
    screen.out().print(screen.table(columns, rows, title=title, numbers=("steps", "s")))
    screen.err().print(f"curve of this device: {answer['curves']}", style="dim", markup=False)
    for note in answer["notes"]:
        screen.warn(note)
