"""Define `check`: find what is wrong in a deployment's configuration, one line for each fault."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import click

from cli import screen
from cli.installation import Installation, pass_installation
from policy import connections
from policy.fleet import Fleet, FleetInvalid
from settings import (
    DeploymentSettings,
    FleetSettings,
    FlowerSettings,
    GatewayProcessSettings,
    MigrationSettings,
    Settings,
    SettingsInvalid,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    misfits,
    read,
)

ROLES: dict[str, type[FleetSettings] | type[MigrationSettings]] = {
    "gateway": GatewayProcessSettings,
    "worker": WorkerSettings,
    "results": StoreSettings,
    "sweeper": Settings,
    "webhooks": WebhookSettings,
    "flower": FlowerSettings,
    "migrations": MigrationSettings,
    "deployment": DeploymentSettings,
}

_MOST_CONNECTIONS = (
    "SELECT current_setting('max_connections')::int"
    " - current_setting('superuser_reserved_connections')::int"
)


class Finding(NamedTuple):
    """Hold one finding; its kind is `wrong` or `hint`."""

    kind: str
    subject: str
    text: str


@click.command()
@click.argument("roles", nargs=-1, type=click.Choice(list(ROLES)))
@click.option(
    "--offline", is_flag=True, help="Check only settings and fleet.toml; connect to nothing."
)
@pass_installation
@click.pass_context
def check(
    ctx: click.Context, installation: Installation, roles: tuple[str, ...], offline: bool
) -> None:
    """Check settings, fleet.toml, Postgres, both Redis, object store and workers.

    ROLES are the kinds of process whose settings are checked. By default these are all processes of
    this machine's stack or, in a container, those for which the environment has every setting. Exit
    code 1 if something is wrong.
    """
    environments = _environments(installation, roles)
    findings: list[Finding] = []
    loaded = _load_settings(environments, findings)
    fleet = _fleet(loaded, findings)
    if not offline:
        findings += _connected(loaded, fleet)
    wrong = _print_findings(findings)
    if not environments:
        screen.complain(
            "Nothing to check here: no process's settings are complete. "
            "Name one, as `darkroom check gateway`."
        )
        ctx.exit(1)
    screen.err().print(
        f"{', '.join(environments)}: {'nothing is wrong' if not wrong else f'{wrong} wrong'}",
        style="dim",
    )
    ctx.exit(1 if wrong else 0)


def _print_findings(findings: Sequence[Finding]) -> int:
    """Print each fault once, with the processes that have it; return how many are wrong."""
    told: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        told.setdefault((finding.kind, finding.text), []).append(finding.subject)
    for (kind, text), subjects in told.items():
        screen.out().print(f"{kind:5}  {', '.join(subjects)}: {text}", soft_wrap=True, markup=False)
    return sum(kind == "wrong" for kind, _ in told)


def _environments(
    installation: Installation, roles: tuple[str, ...]
) -> dict[str, Mapping[str, str]]:
    """Return the environment of each process to be checked, by the process's name."""
    if (installation.data_dir / "env").exists():
        from fleet import processes
        from fleet.addresses import as_handed_to

        env = {**os.environ, **installation.stack().process_env()}
        with suppress(FleetInvalid):  # or it is told in its place
            fleet = read(FleetSettings, env).load_fleet()
            env["WORKER_POOL"] = processes.pools_served(fleet, env)[0]
        return {
            name: as_handed_to(name, env)
            for name in roles or ("gateway", "worker", "results", "sweeper", "webhooks", "flower")
        }
    own = dict(os.environ)
    own |= {name.upper(): str(path) for name, path in installation.remembered().items()}
    if roles:
        return dict.fromkeys(roles, own)
    return {name: own for name, kind in ROLES.items() if _has_all(kind, own)}


def _has_all(
    kind: type[FleetSettings] | type[MigrationSettings], environment: Mapping[str, str]
) -> bool:
    needed = [name.upper() for name, field in kind.model_fields.items() if field.is_required()]
    return bool(needed) and all(
        name in environment or f"{name}_FILE" in environment for name in needed
    )


def _load_settings(
    environments: Mapping[str, Mapping[str, str]], findings: list[Finding]
) -> dict[str, FleetSettings | MigrationSettings]:
    """Read the settings of each process; add to `findings` what is wrong in them."""
    loaded: dict[str, FleetSettings | MigrationSettings] = {}
    for name, environment in environments.items():
        try:
            loaded[name] = read(ROLES[name.partition("-")[0]], environment)
        except SettingsInvalid as error:
            findings += [Finding("wrong", name, problem) for problem in error.problems]
    return loaded


def _fleet(loaded: Mapping[str, object], findings: list[Finding]) -> Fleet | None:
    """Load the fleet that the settings name, and add to `findings` what does not fit."""
    fleet = None
    told: set[str] = set()
    for name, settings in loaded.items():
        if not isinstance(settings, FleetSettings):
            continue
        try:
            fleet = settings.load_fleet()
        except FleetInvalid as error:
            new = [problem for problem in error.problems if problem not in told]
            findings += [Finding("wrong", "fleet.toml", problem) for problem in new]
            told |= set(new)
            continue
        findings += [Finding("wrong", name, problem) for problem in misfits(settings, fleet)]
        if isinstance(settings, GatewayProcessSettings):
            findings += [Finding("hint", name, hint) for hint in settings.hints()]
    return fleet


def _connected(loaded: Mapping[str, object], fleet: Fleet | None) -> Iterator[Finding]:
    """Connect to every service that the settings name, once each; yield what is wrong."""
    asked: set[object] = set()

    def once(what: str, ask: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        if what not in asked:
            asked.add(what)
            yield from ask()

    for name, settings in loaded.items():
        if isinstance(settings, Settings):
            yield from once(settings.database_url, partial(_database, name, settings.database_url))
            handoff_url = settings.handoff_url
            yield from once(handoff_url, partial(_redis, name, "HANDOFF_URL", handoff_url))
        if isinstance(settings, (Settings, FlowerSettings)):
            broker_url = settings.broker_url
            yield from once(broker_url, partial(_redis, name, "BROKER_URL", broker_url))
        if isinstance(settings, StoreSettings):
            yield from once("store", partial(_store, name, settings))
    gateway = loaded.get("gateway")
    if isinstance(gateway, GatewayProcessSettings) and fleet is not None:
        yield from _roles(gateway, fleet)


def _database(name: str, url: str) -> Iterator[Finding]:
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    from models.database import make_engine

    # A standby, or a server that was demoted to one, is refused at connect: "session is read-only".
    engine = make_engine(url, pool_size=1)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT state FROM jobs LIMIT 1"))
    except DBAPIError as error:
        yield Finding("wrong", name, f"DATABASE_URL: Postgres: {' '.join(str(error.orig).split())}")
    finally:
        engine.dispose()


def _redis(name: str, variable: str, url: str) -> Iterator[Finding]:
    import redis

    from edges.connections import connect

    try:
        with connect(url, socket_timeout=5) as client:
            client.ping()
            if name == "flower":
                return
            memory = client.info("memory")
            replication = client.info("replication")
    except redis.exceptions.NoPermissionError:
        return  # a user who may do its work and no more, as a courier in the hand-off
    except redis.RedisError as error:
        yield Finding("wrong", name, f"{variable}: Redis: {' '.join(str(error).split())}")
        return
    for kind, text in _faults_of_redis(memory, replication):
        yield Finding(kind, name, f"{variable}: {text}")


def _faults_of_redis(
    memory: Mapping[str, object], replication: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each fault; both parameters are sections of INFO."""
    policy = memory.get("maxmemory_policy")
    if policy != "noeviction":
        yield "wrong", f"maxmemory-policy is {policy}; it must be noeviction"
    if not memory.get("maxmemory"):
        yield "hint", "has no maxmemory: it is full only when its machine has no memory left"
    if replication.get("role") != "master":
        yield "wrong", "is a replica, which takes no writes"


def _store(name: str, settings: StoreSettings) -> Iterator[Finding]:
    from edges.objectstore import ObjectStore, StoreUnavailable

    try:
        ObjectStore(settings).ping()
    except StoreUnavailable as error:
        yield Finding("wrong", name, f"S3_BUCKET: the object store refuses it: {error}")


def _roles(settings: GatewayProcessSettings, fleet: Fleet) -> Iterator[Finding]:
    """Check that each pool has live workers, and Postgres connections for all processes."""
    from sqlalchemy.exc import DBAPIError

    try:
        live, most_connections = _workers_and_connections(settings)
    except DBAPIError:
        return  # told already
    for name, pool in fleet.pools.items():
        if live.count(name) < pool.warm_floor:
            yield Finding(
                "wrong",
                f"pool {name}",
                f"{live.count(name)} live workers, warm_floor is {pool.warm_floor}",
            )
    yield from _connections(settings, num_workers=len(live), most=most_connections)


def _workers_and_connections(settings: GatewayProcessSettings) -> tuple[list[str], int]:
    """Return the pool of each live worker, and how many connections Postgres offers.

    Raises DBAPIError.
    """
    from sqlalchemy import text

    from models import workers
    from models.database import make_engine, transaction

    engine = make_engine(settings.database_url, pool_size=1)
    try:
        with transaction(engine) as session:
            live = workers.live(session, silent_for_s=settings.lease_ttl_s)
            pools = [worker.pool for worker in live]
            most = int(session.scalar(text(_MOST_CONNECTIONS)) or 0)
    finally:
        engine.dispose()
    return pools, most


def _connections(
    settings: GatewayProcessSettings, *, num_workers: int, most: int
) -> Iterator[Finding]:
    """Compare the connections that all processes may open with those that Postgres offers."""
    gateway = connections.at_most(
        "gateway",
        gateway_pool_size=settings.database_pool_size,
        web_concurrency=settings.web_concurrency,
    )
    needed = {"gateway": gateway, "worker": max(1, num_workers) * connections.at_most("worker")}
    needed |= {kind: connections.at_most(kind) for kind in ("results", "sweeper", "webhooks")}
    total = sum(needed.values())
    parts = " + ".join(f"{kind} {count}" for kind, count in needed.items())
    if total > most:
        why = f"max_connections leaves {most}, and one of each process may open {total}: {parts}"
        yield Finding("wrong", "Postgres", why)
    elif total > 0.8 * most:
        yield Finding("hint", "Postgres", f"{total} of {most} connections may be taken: {parts}")
