"""Define `up`, `down`, `status` and `env`: the stack of this machine."""

import signal
from datetime import UTC, datetime
from types import FrameType
from typing import Any, NoReturn

import click
import httpx

from cli import screen
from cli.installation import Installation, pass_installation
from cli.logs import follow
from fleet.stack import ProcessStatus, Stack


@click.command()
@click.option(
    "--detach", is_flag=True, help="Return when everything is ready. `darkroom down` stops it."
)
@click.option(
    "--workers",
    metavar="NUMBER|POOL[.CLASS]=NUMBER,…",
    default="1",
    show_default=True,
    help="Worker processes of each pool; a pool that is not named gets one. With WORKER_POOL in "
    "the environment, that pool alone gets any.",
)
@click.option(
    "--wait",
    "wait_s",
    type=float,
    default=180,
    show_default=True,
    help="Seconds to wait until everything is ready.",
)
@pass_installation
def up(installation: Installation, detach: bool, workers: str, wait_s: float) -> None:
    """Start the whole stack on this machine.

    These are Postgres, Redis, an S3 store, gateway, workers, results, sweeper, webhooks and Flower.
    Without --detach, the command prints their logs, and Ctrl-C stops everything. It is harmless if
    the stack runs already.
    """
    stack = installation.stack(workers=workers)
    was_up = stack.is_up()
    try:
        with screen.err().status("starting") as spinner:
            stack.up(wait_s, on_stage=spinner.update)
        if was_up and stack.restarted:
            screen.err().print(f"started anew: {', '.join(stack.restarted)}")
        show_addresses(stack)
        for problem in stack.load_problems():
            screen.complain(problem)
        if detach:
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _as_interrupt)
        follow(stack.data_dir / "logs")
    except KeyboardInterrupt:
        screen.err().print("stopping; images that are being made are finished first")
        # A second Ctrl-C must not leave half of it running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stack.down()
        raise
    except Exception:
        if not was_up and not detach:
            stack.down()
        raise


@click.command()
@pass_installation
def down(installation: Installation) -> None:
    """Stop the stack. Images that are being made are finished first; all data are kept."""
    stack = installation.stack()
    was_up = stack.is_up()
    with screen.err().status("stopping"):
        stack.down()
    screen.err().print("stopped" if was_up else "nothing was running")


@click.command()
@pass_installation
@click.pass_context
def status(ctx: click.Context, installation: Installation) -> None:
    """Show every process, and what is not ready. Exit code 3 if the stack does not run."""
    stack = installation.stack()
    processes = stack.status()
    if not processes:
        screen.complain("The stack is not running.")
        ctx.exit(3)
    now = datetime.now(UTC)
    rows = [
        (process.name, process.state, process.pid, _age(now, process), _reason(process))
        for process in processes
    ]
    screen.out().print(
        screen.table(["process", "state", "pid", "up", ""], rows, numbers=["pid", "up"])
    )
    _show_workers(stack)
    screen.out().print(f"\n{_readiness(stack.env['DARKROOM_URL'])}")


_WORKERS = """
SELECT pool, capacity_class, worker, state, device, models, loaded, failed_models, problem,
       restarts, failed_starts, fleet_revision, waits_for, doing,
       (SELECT max(number) FROM fleet_revisions) AS newest_revision,
       to_char(started_at AT TIME ZONE 'UTC', 'MM-DD HH24:MI:SS') AS since
FROM workers_now ORDER BY pool, worker
"""


def _show_workers(stack: Stack) -> None:
    """Print the workers by pool, with what they have loaded, can and cannot load; then why not."""
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    from models.database import make_engine

    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    try:
        with engine.connect() as connection:
            workers = connection.execute(text(_WORKERS)).all()
    except SQLAlchemyError as error:
        screen.complain(f"Which workers there are cannot be read: {type(error).__name__}.")
        return
    finally:
        engine.dispose()
    columns = [
        "pool",
        "class",
        "worker",
        "state",
        "device",
        "loaded",
        "loads when asked",
        "cannot load",
        "fleet",
        "restarts",
        "since",
    ]
    rows = [
        (
            worker.pool,
            worker.capacity_class,
            worker.worker,
            _worker_state(worker),
            worker.device,
            worker.loaded,
            _not_loaded(worker),
            worker.failed_models,
            _revision(worker),
            worker.restarts,
            worker.since,
        )
        for worker in workers
    ]
    screen.out().print(screen.table(columns, rows, numbers=["restarts"]))
    for problem in dict.fromkeys(worker.problem for worker in workers if worker.problem):
        screen.complain(problem)


def _not_loaded(worker: Any) -> str:
    """Name what the worker serves and has not in its device's memory."""
    loaded = (worker.loaded or "").split()
    return " ".join(name for name in (worker.models or "").split() if name not in loaded)


def _revision(worker: Any) -> str | None:
    """Name the revision of the fleet that a worker goes by, and the newest where that is another.

    None while the worker loads, or for one that was told to go by its file.
    """
    if worker.fleet_revision in (None, worker.newest_revision):
        return worker.fleet_revision and str(worker.fleet_revision)
    wait = f", waits for {worker.waits_for}" if worker.waits_for else ""
    return f"{worker.fleet_revision}, behind {worker.newest_revision}{wait}"


def _worker_state(worker: Any) -> str:
    """Name the state, what is under way, and how often the worker was started in vain."""
    if worker.doing:
        return f"{worker.state}, {worker.doing}"
    if worker.failed_starts and worker.state != "ready":
        return f"{worker.state}, {worker.failed_starts} starts failed"
    return str(worker.state)


@click.command()
@pass_installation
def env(installation: Installation) -> None:
    """Print the addresses and secrets of the stack, as a dotenv file."""
    installation.look_up("DARKROOM_URL")
    click.echo((installation.data_dir / "env").read_text(), nl=False)


def show_addresses(stack: Stack) -> None:
    """Print the addresses of the stack's parts, for people."""
    env = stack.env
    at = {
        name: env[name].rpartition("@")[2] for name in ("DATABASE_URL", "BROKER_URL", "HANDOFF_URL")
    }
    key = f"key {env['DARKROOM_API_KEY'][:16]}…  (whole in {stack.env_path})"
    account = f"user {env['FLOWER_USER']}  password {env['FLOWER_PASSWORD']}"
    rows = [
        ("gateway", env["DARKROOM_URL"], key),
        ("Flower", env["FLOWER_URL"], account),
        ("S3", env["S3_ENDPOINT_URL"], f"bucket {env['S3_BUCKET']}"),
        ("Postgres", at["DATABASE_URL"], 'darkroom sql "select * from job_history"'),
        ("Redis", f"{at['BROKER_URL']}  {at['HANDOFF_URL']}", "broker, hand-off"),
        ("serves", stack.fleet_file, ""),
    ]
    screen.out().print(screen.table(["", "address", ""], rows))


def _readiness(url: str) -> str:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
        parts = answer.json()["parts"]
    except (httpx.HTTPError, ValueError, KeyError):
        return f"the gateway does not answer at {url}"
    waiting = [
        f"{name}: {part.get('detail', 'not ready')}"
        for name, part in parts.items()
        if not part["ready"]
    ]
    if not waiting:
        return f"ready at {url}"
    verdict = (
        "not ready" if answer.status_code == 503 else "accepts jobs, but some parts are not ready"
    )
    return f"{verdict} · {' · '.join(waiting)}"


def _age(now: datetime, process: ProcessStatus) -> str | None:
    if not process.pid or not process.started_at:
        return None
    hours, rest = divmod(int((now - process.started_at).total_seconds()), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _reason(process: ProcessStatus) -> str:
    return "" if process.state in ("running", "starting") else process.detail


def _as_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
