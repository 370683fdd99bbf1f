"""A house for one benchmark: a stack with a temporary data directory, its own fleet.toml, tenants with keys, and eyes on all of it."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sharing.door import Door
from benchmarks.sharing.ledger import Ledger
from benchmarks.sharing.meter import Meter
from fleet.addresses import free_ports
from fleet.processes import METRICS_STRIDE
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from policy.fleet import Fleet, Pool, parse_fleet
from settings import REPO

POOL = "local"
Changes = Mapping[str, Mapping[str, object]]  # table of fleet.toml -> key -> value


@dataclass(frozen=True)
class House:
    """What a benchmark works with."""

    stack: Stack
    fleet: Fleet
    ledger: Ledger
    meter: Meter
    doors: Mapping[str, Door]  # by tenant

    @property
    def pool(self) -> Pool:
        """The one worker's pool."""
        return self.fleet.pools[POOL]

    def clear(self, tenant: str) -> None:
        """Cancel all that the tenant has unfinished, the newest first so that nothing is let out meanwhile; wait for an idle device."""
        self.doors[tenant].cancel(self.ledger.unfinished_ids(tenant))
        self.ledger.wait_finished(tenant)
        self.meter.wait_idle()


@contextmanager
def running_house(tenant_names: Sequence[str], changes: Changes | None = None, *, workers: int = 1) -> Iterator[House]:
    """Start one CPU worker, or more, and all that belongs to it; stop it and throw its data away. changes: to a copy of fleet.toml."""
    text = altered((REPO / "fleet.toml").read_text(), changes or {})
    fleet = parse_fleet(text)
    ended_politely = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit on a benchmark still ends the stack
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder, contextlib.ExitStack() as open_things:
        fleet_file = Path(folder) / "fleet.toml"
        fleet_file.write_text(text)
        stack = Stack(Path(folder), fleet_file=fleet_file, workers=workers)
        open_things.callback(signal.signal, signal.SIGTERM, ended_politely)
        open_things.callback(stack.down)
        meter = _start(stack)
        env = stack.env
        ledger = Ledger(env["DATABASE_URL"])
        open_things.callback(ledger.close)
        keys = _make_tenants(env["DATABASE_URL"], env["API_KEY_PEPPER"], tenant_names)
        doors = {name: open_things.enter_context(Door(env["DARKROOM_URL"], key)) for name, key in keys.items()}
        yield House(stack, fleet, ledger, meter, doors)


def altered(text: str, changes: Changes) -> str:
    """The text of fleet.toml with other values, comments and order kept. ValueError if a table is not there."""
    lines, table = list[str](), ""
    missing = {name: dict(keys) for name, keys in changes.items()}
    for line in text.splitlines():
        if line.startswith("["):
            table = line.split("#")[0].strip().strip("[]")
        key = line.split("=")[0].strip()
        if "=" in line and not line.startswith("[") and key in missing.get(table, {}):
            line = f"{key} = {missing[table].pop(key)}"
        lines.append(line)
    for name, keys in missing.items():
        if f"[{name}]" not in (line.split("#")[0].strip() for line in lines):
            raise ValueError(f"fleet.toml has no table [{name}]")
        place = next(number for number, line in enumerate(lines) if line.startswith(f"[{name}]")) + 1
        lines[place:place] = [f"{key} = {value}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _start(stack: Stack) -> Meter:
    """Bring the stack up with metrics: the gateway's port is METRICS_PORT, the one worker's comes next."""
    base = free_ports(1)[0]
    before = os.environ.get("METRICS_PORT")
    os.environ["METRICS_PORT"] = str(base)
    try:
        stack.up()
    finally:
        os.environ.pop("METRICS_PORT")
        if before is not None:
            os.environ["METRICS_PORT"] = before
    meter = Meter(base + METRICS_STRIDE)
    meter.wait_there()
    return meter


def _make_tenants(database_url: str, pepper: str, names: Sequence[str]) -> dict[str, str]:
    """An API key by tenant, as `darkroom tenants create` and `darkroom keys issue` would make them."""
    database = make_engine(database_url, pool_size=1)
    try:
        with transaction(database) as session:
            made = [(name, tenants.create(session, name=name).id) for name in names]
            return {name: api_keys.issue(session, tenant_id=id, name="bench", pepper=pepper)[1] for name, id in made}
    finally:
        database.dispose()
