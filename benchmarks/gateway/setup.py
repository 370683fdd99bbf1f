"""A gateway without workers, a bare route beside it on the same services, and 50 tenants."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from sqlalchemy import create_engine, text

from benchmarks.gateway.bare_route import TABLE
from benchmarks.lib.stack import GATEWAY_ONLY, environment, running_stack, temporary_folder
from fleet.addresses import free_ports
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from settings import REPO

TENANTS = 50
STREAMS = 500

GROW = """
    INSERT INTO jobs (
        id, tenant_id, state, pool, tier, model, model_version, prompt, negative_prompt, width_px,
        height_px, num_steps, guidance, sampler, seed, num_images, output_format, precision,
        determinism, accepted_at, start_by, started_at, finished_at, attempt, currency
    )
    SELECT
        (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
            || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
        (CAST(:tenants AS uuid[]))[1 + i % :count], 'succeeded', 'local',
        (ARRAY['fast', 'quality', 'batch'])[1 + i % 3], 'pocket', '1',
        'a large red circle in the center on a blue background, number ' || i, '', 128,
        128, 20, 1.5, 'ddim', i, 1, 'png', 'fp32',
        'best_effort', at, at + interval '1 day', at, at + interval '2 s', 1, 'USD'
    FROM (
        SELECT i, md5(i::text) AS noise,
               now() - interval '30 days' + interval '29 days' * i / :rows AS at
        FROM generate_series(0, :rows - 1) i
    ) numbered ORDER BY i
"""
GROW_IMAGES = """
    INSERT INTO images (job_id, index, seed) SELECT id, 0, seed FROM jobs WHERE state = 'succeeded'
"""

Figures = dict[str, Any]


class Route:
    """Something that accepts jobs at a URL."""

    def __init__(self, url: str, keys: Sequence[str]) -> None:
        self.url = url
        self.keys = list(keys)

    def load(self, clients: int, seconds: float, *, tenants: int | None = None) -> Figures:
        """Load it from a process of its own; return what http_load.py prints."""
        module = "benchmarks.gateway.http_load"
        done = subprocess.run(
            [sys.executable, "-m", module, self.url, str(clients), str(seconds)],
            input="\n".join(self.keys[:tenants]),
            capture_output=True,
            text=True,
            cwd=REPO,
        )
        if done.returncode:
            raise SystemExit(f"{self.url}: {done.stderr[-500:]}")
        figures: Figures = json.loads(done.stdout)
        if figures["other"]:
            raise SystemExit(f"{self.url} did not accept everything: {figures['other']}")
        return figures


class Setup:
    """What is measured. Made by `running_gateway`."""

    def __init__(self, stack: Stack, bare_url: str) -> None:
        env = stack.env
        self.stack = stack
        self.owner = create_engine(env["MIGRATION_DATABASE_URL"])
        self.tenants: list[Any] = []
        keys = []
        database = make_engine(env["DATABASE_URL"], pool_size=1)
        with transaction(database) as session:
            for place in range(TENANTS):
                tenant = tenants.create(session, name=f"tenant-{place}")
                pepper = env["API_KEY_PEPPER"]
                _, key = api_keys.issue(session, tenant_id=tenant.id, name="bench", pepper=pepper)
                self.tenants.append(tenant.id)
                keys.append(key)
        database.dispose()
        self.ours = Route(env["DARKROOM_URL"], keys)
        self.bare = Route(bare_url, keys)

    def grow(self, rows: int) -> None:
        """Put finished jobs into the tables, as a month of work leaves them."""
        values = {"tenants": [str(id) for id in self.tenants], "count": TENANTS, "rows": rows}
        with self.owner.begin() as connection:
            # No triggers: these jobs wait nowhere.
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(text(GROW), values)
            connection.execute(text(GROW_IMAGES))
        self.settle()

    def settle(self) -> None:
        """Write out and count what there is, so that nothing of it happens while we measure."""
        engine = self.owner.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
                connection.execute(text(statement))

    def resident_kib(self) -> int:
        """Return the resident memory of the gateway's gunicorn workers together."""
        master = str(self.stack.pid("gateway"))
        command = ["ps", "--ppid", master, "-o", "rss="]
        found = subprocess.run(command, capture_output=True, text=True)
        return sum(int(line) for line in found.stdout.split())

    @contextmanager
    def open_streams(self, streams: int) -> Iterator[None]:
        """Keep so many event streams open, of jobs that wait."""
        module = "benchmarks.gateway.event_streams"
        process = subprocess.Popen(
            [sys.executable, "-m", module, self.ours.url, str(streams)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("\n".join(self._waiting_jobs()) + "\n\n")
            process.stdin.flush()
            if process.stdout.readline().strip() != "open":
                raise SystemExit("the streams did not open")
            yield
        finally:
            process.stdin.close()
            process.wait(timeout=30)

    def _waiting_jobs(self) -> list[str]:
        """List the newest jobs of ten tenants, each with its tenant's key."""
        url = f"{self.ours.url}/v1/jobs"
        lines = []
        for key in self.ours.keys[:10]:
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.get(url, params={"limit": 50}, headers=headers, trust_env=False)
            lines += [f"{key} {job['id']}" for job in answer.json()["data"]]
        return lines


@contextmanager
def running_gateway() -> Iterator[Setup]:
    """Start a stack without workers, and the bare route."""
    streams = os.environ.get("GATEWAY_MAX_STREAMS", str(2 * STREAMS))  # a few tenants may have them
    with (
        temporary_folder() as folder,
        environment({"GATEWAY_MAX_STREAMS": streams}),
        running_stack(folder, without=GATEWAY_ONLY) as stack,
        _bare_route(stack.env) as url,
    ):
        yield Setup(stack, url)


@contextmanager
def _bare_route(env: Mapping[str, str]) -> Iterator[str]:
    """Serve the bare route; yield its URL."""
    owner = create_engine(env["MIGRATION_DATABASE_URL"])
    with owner.begin() as connection:
        connection.execute(text(TABLE))
        connection.execute(text("GRANT SELECT, INSERT ON bare TO darkroom_app"))
    owner.dispose()
    bind = f"127.0.0.1:{free_ports(1)[0]}"
    # The gateway's own configuration reads all of its settings.
    settings = {**os.environ, **env, "GATEWAY_BIND": bind, "METRICS_PORT": "0"}
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py"]
    process = subprocess.Popen(
        [*gunicorn, "benchmarks.gateway.bare_route:application"],
        cwd=REPO,
        env=settings,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://{bind}"
        _wait_healthy(url)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_healthy(url: str) -> None:
    for _ in range(100):
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
