"""What the door costs: accepted jobs per second and their latency, next to the least that a durable route can do.

    python -m benchmarks.gateway [--quick]

The bare route (benchmarks/door/bare.py) does one INSERT with a commit and one LPUSH, in plain Flask, under the gateway's own gunicorn
configuration, on the same Postgres and Redis. Both are loaded in turns, by the same cheap clients: 1, 32 and 256 of them, with the keys of
50 tenants, then of one. No worker runs, so what is measured is the way in and nothing else; the sweeper does its rounds as always.

Streams: POST by 32 clients with and without 500 open event streams in the same process, in turns. Growth: the ratio to the bare route
before and after 1,000,000 finished jobs of the same tenants lie in the tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text

from benchmarks.door.bare import TABLE
from fleet.addresses import free_ports
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from settings import REPO

CLIENTS, TENANTS, STREAMS = (1, 32, 256), 50, 500
TARGETS = {
    "throughput_ratio": (">=", 0.5),  # the worst over 1, 32 and 256 clients: ours / bare
    "p99_ratio": ("<=", 5.0),  # the worst of them, the other way round
    "streams_p99_ratio": ("<=", 1.5),  # POST with 500 open streams / without
    "growth_ratio": (">=", 0.67),  # throughput beside the bare route's with 1,000,000 jobs / the same with none
}

GROW = """
    INSERT INTO jobs (id, tenant_id, state, pool, tier, model, model_version, prompt, negative_prompt, width_px, height_px, num_steps,
                      guidance, sampler, seed, num_images, output_format, precision, determinism, accepted_at, start_by, started_at,
                      finished_at, attempt, currency)
    SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
               || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
           (CAST(:tenants AS uuid[]))[1 + i % :count], 'succeeded', 'local', (ARRAY['fast', 'quality', 'batch'])[1 + i % 3], 'pocket', '1',
           'a large red circle in the center on a blue background, number ' || i, '', 128, 128, 20, 1.5,
           'ddim', i, 1, 'png', 'fp32', 'best_effort', at, at + interval '1 day', at, at + interval '2 s', 1, 'USD'
    FROM (SELECT i, md5(i::text) AS noise, now() - interval '30 days' + interval '29 days' * i / :rows AS at
          FROM generate_series(0, :rows - 1) i) numbered ORDER BY i
"""
GROW_IMAGES = "INSERT INTO images (job_id, index, seed) SELECT id, 0, seed FROM jobs WHERE state = 'succeeded'"

Figures = dict[str, Any]


class Door:
    """Something that accepts jobs at a URL."""

    def __init__(self, url: str, keys: Sequence[str]) -> None:
        self.url, self.keys = url, list(keys)

    def load(self, clients: int, seconds: float, *, tenants: int | None = None) -> Figures:
        """Load it from a process of its own."""
        command = [sys.executable, "-m", "benchmarks.door.load", self.url, str(clients), str(seconds)]
        done = subprocess.run(command, input="\n".join(self.keys[:tenants]), capture_output=True, text=True, cwd=REPO)
        if done.returncode:
            raise SystemExit(f"{self.url}: {done.stderr[-500:]}")
        figures: Figures = json.loads(done.stdout)
        if figures["other"]:
            raise SystemExit(f"{self.url} did not accept everything: {figures['other']}")
        return figures


class House:
    """A stack without workers, a bare route beside it, and 50 tenants."""

    def __init__(self, stack: Stack, bare_url: str) -> None:
        self.stack, env = stack, stack.env
        self.owner = create_engine(env["MIGRATION_DATABASE_URL"])
        database = make_engine(env["DATABASE_URL"], pool_size=1)
        with transaction(database) as session:
            self.tenants = [tenants.create(session, name=f"tenant-{place}").id for place in range(TENANTS)]
            pepper = env["API_KEY_PEPPER"]
            keys = [api_keys.issue(session, tenant_id=id, name="bench", pepper=pepper)[1] for id in self.tenants]
        database.dispose()
        self.ours, self.bare = Door(env["DARKROOM_URL"], keys), Door(bare_url, keys)

    def grow(self, rows: int) -> None:
        """Put finished jobs into the tables, as a month of work leaves them."""
        with self.owner.begin() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))  # no triggers: these jobs wait nowhere
            connection.execute(text(GROW), {"tenants": [str(id) for id in self.tenants], "count": TENANTS, "rows": rows})
            connection.execute(text(GROW_IMAGES))
        self.settle()

    def settle(self) -> None:
        """Write out and count what there is, so that nothing of it happens while we measure."""
        with self.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
                connection.execute(text(statement))


@contextmanager
def running() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        os.chmod(folder, 0o711)  # Postgres, of another account when we are root, passes through
        stack = Stack(Path(folder) / "data")
        os.environ.setdefault("GATEWAY_MAX_STREAMS", str(2 * STREAMS))  # so that a few tenants may have them
        try:
            stack.up()
            for name in ("worker-1", "results", "flower"):
                stack.stop(name)
            with _bare_route(stack.env) as url:
                yield House(stack, url)
        finally:
            stack.down()


@contextmanager
def _bare_route(env: dict[str, str]) -> Iterator[str]:
    owner = create_engine(env["MIGRATION_DATABASE_URL"])
    with owner.begin() as connection:
        connection.execute(text(TABLE))
        connection.execute(text("GRANT SELECT, INSERT ON bare TO darkroom_app"))
    owner.dispose()
    bind = f"127.0.0.1:{free_ports(1)[0]}"
    own = {**env, "GATEWAY_BIND": bind, "METRICS_PORT": "0"}  # that configuration reads all of the gateway's settings
    command = [sys.executable, "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py", "benchmarks.door.bare:application"]
    process = subprocess.Popen(command, cwd=REPO, env={**os.environ, **own}, stderr=subprocess.DEVNULL)
    try:
        url = f"http://{bind}"
        for _ in range(100):
            try:
                httpx.get(f"{url}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def crowd(house: House, streams: int) -> Iterator[None]:
    """So many open event streams, of jobs that wait."""
    lines = []
    for key in house.ours.keys[:10]:
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{house.ours.url}/v1/jobs"
        for job in httpx.get(url, params={"limit": 50}, headers=headers, trust_env=False).json()["data"]:
            lines.append(f"{key} {job['id']}")
    command = [sys.executable, "-m", "benchmarks.door.crowd", house.ours.url, str(streams)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n".join(lines) + "\n\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != "open":
            raise SystemExit("the streams did not open")
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def compare(house: House, rounds: int, seconds: float) -> tuple[dict[int, dict[str, list[Figures]]], list[Figures]]:
    """Both doors in turns under each number of clients; and ours with one tenant's key alone."""
    seen: dict[int, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    one_tenant = []
    for turn in range(rounds):
        for clients in CLIENTS:
            doors = [("bare", house.bare), ("ours", house.ours)]
            for name, door in doors if turn % 2 else reversed(doors):
                seen[clients][name].append(door.load(clients, seconds))
        one_tenant.append(house.ours.load(32, seconds, tenants=1))
    return seen, one_tenant


def watch(house: House, rounds: int, seconds: float) -> tuple[list[float], list[float], int]:
    """p99 of POST without and with the crowd, in turns; and the gateway's resident KiB with it."""
    without, beside, resident = [], [], 0
    for _ in range(rounds):
        without.append(house.ours.load(32, seconds)["p99_ms"])
        with crowd(house, STREAMS):
            beside.append(house.ours.load(32, seconds)["p99_ms"])
            resident = max(resident, _resident_kib(house.stack.pid("gateway")))
    return without, beside, resident


def _resident_kib(master: int | None) -> int:
    """Of gunicorn's workers together."""
    found = subprocess.run(["ps", "--ppid", str(master), "-o", "rss="], capture_output=True, text=True)
    return sum(int(line) for line in found.stdout.split())


def _median(figures: Sequence[Figures], name: str) -> float:
    return statistics.median(figure[name] for figure in figures)


def report(seen: Any, one_tenant: Any, grown: Any, streams: Any, rows: int) -> int:
    table = Table(title="POST /v1/jobs beside a bare durable route")
    for column in ("clients", "ours /s", "bare /s", "ratio", "ours p50 ms", "p99", "bare p50 ms", "p99", "p99 ratio"):
        table.add_column(column, justify="right")
    figures: Figures = {}
    for clients, doors in seen.items():
        ours, bare = doors["ours"], doors["bare"]
        ratio = _median(ours, "per_s") / _median(bare, "per_s")
        slower = _median(ours, "p99_ms") / _median(bare, "p99_ms")
        cells = [_median(door, name) for door in (ours, bare) for name in ("p50_ms", "p99_ms")]
        rates = (_median(ours, "per_s"), _median(bare, "per_s"))
        table.add_row(str(clients), *(f"{rate:.0f}" for rate in rates), f"{ratio:.2f}", *(f"{cell:.1f}" for cell in cells), f"{slower:.2f}")
        figures[f"{clients}_clients"] = {"ours_per_s": round(rates[0], 1), "bare_per_s": round(rates[1], 1), "ratio": round(ratio, 3)}
        figures[f"{clients}_clients"] |= {
            "ours_p99_ms": round(cells[1], 2),
            "bare_p99_ms": round(cells[3], 2),
            "p99_ratio": round(slower, 3),
        }
    figures["one_tenant_per_s"] = round(_median(one_tenant, "per_s"), 1)
    without, beside, resident = streams
    figures |= {"p99_ms_without_streams": round(statistics.median(without), 2), "p99_ms_with_streams": round(statistics.median(beside), 2)}
    figures |= {"streams": STREAMS, "gateway_mib_with_streams": round(resident / 1024), "existing_jobs": rows}
    by_clients = [figures[f"{clients}_clients"] for clients in CLIENTS]
    reached = {
        "throughput_ratio": min(each["ratio"] for each in by_clients),
        "p99_ratio": max(each["p99_ratio"] for each in by_clients),
        "streams_p99_ratio": round(statistics.median(beside) / statistics.median(without), 3),
        "growth_ratio": round(grown / figures["32_clients"]["ratio"], 3),
    }
    Console(width=140).print(table)
    print(
        f"one tenant, 32 clients: {figures['one_tenant_per_s']:.0f}/s. With {STREAMS} streams: p99 {reached['streams_p99_ratio']:.2f}x,",
        end=" ",
    )
    print(f"gateway {figures['gateway_mib_with_streams']} MiB. With {rows:,} jobs: {reached['growth_ratio']:.2f}x of the throughput.")
    met = {name: reached[name] >= at if sign == ">=" else reached[name] <= at for name, (sign, at) in TARGETS.items()}
    targets = {name: f"{sign} {at}" for name, (sign, at) in TARGETS.items()}
    print(json.dumps({"benchmark": "gateway", "figures": figures | reached, "targets": targets, "met": met}))
    return 0 if all(met.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round, 50,000 jobs; ends within a minute")
    options = parser.parse_args()
    rounds, seconds, rows = (1, 1.0, 50_000) if options.quick else (5, 5.0, 1_000_000)
    with running() as house:
        house.settle()
        seen, one_tenant = compare(house, rounds, seconds)
        streams = watch(house, rounds, seconds)
        house.grow(rows)
        grown = []
        for _ in range(rounds):
            bare, ours = house.bare.load(32, seconds)["per_s"], house.ours.load(32, seconds)["per_s"]
            grown.append(ours / bare)
    return report(seen, one_tenant, statistics.median(grown), streams, rows)


if __name__ == "__main__":
    sys.exit(main())
