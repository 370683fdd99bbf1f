"""A stack of its own for one benchmark: tenants with keys, and readings of what happened on it."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.lib import fleet_file
from benchmarks.lib.job_queries import JobQueries
from benchmarks.lib.stack import environment, running_stack, temporary_folder
from benchmarks.lib.tenant_client import TenantClient
from benchmarks.lib.worker_metrics import WorkerMetrics
from fleet.addresses import free_ports
from fleet.processes import METRICS_STRIDE
from fleet.stack import Stack
from models import api_keys, tenants
from models.database import make_engine, transaction
from policy.fleet import Fleet, Pool, parse_fleet

POOL = "local"


@dataclass(frozen=True)
class MeasuredStack:
    """What a benchmark works with."""

    stack: Stack
    fleet: Fleet
    queries: JobQueries
    metrics: WorkerMetrics  # of the first worker
    clients: dict[str, TenantClient]  # by tenant

    @property
    def pool(self) -> Pool:
        """Return the pool of the workers."""
        return self.fleet.pools[POOL]

    def clear(self, tenant: str) -> None:
        """Cancel all that the tenant has unfinished; wait until the device is idle.

        The newest first, so that nothing is released meanwhile.
        """
        self.clients[tenant].cancel(self.queries.unfinished_ids(tenant))
        self.queries.wait_finished(tenant)
        self.metrics.wait_idle()


@contextmanager
def measured_stack(
    tenant_names: Sequence[str], tables: fleet_file.Tables | None = None, *, workers: int = 1
) -> Iterator[MeasuredStack]:
    """Start CPU workers and all that belongs to them; stop them and throw their data away.

    tables: of fleet.toml; the repository's by default.
    """
    port = free_ports(1)[0]  # the gateway's; the first worker's comes next
    with contextlib.ExitStack() as stack_of_contexts:
        enter = stack_of_contexts.enter_context
        folder = enter(temporary_folder())
        enter(environment({"METRICS_PORT": str(port)}))
        file = fleet_file.write(tables or fleet_file.shipped(), folder / "fleet.toml")
        stack = enter(running_stack(folder, fleet_file=file, workers=workers))
        metrics = WorkerMetrics(port + METRICS_STRIDE)
        metrics.wait_there()
        env = stack.env
        queries = enter(contextlib.closing(JobQueries(env["DATABASE_URL"])))
        keys = make_tenants(env["DATABASE_URL"], env["API_KEY_PEPPER"], tenant_names)
        clients = {
            name: enter(TenantClient(env["DARKROOM_URL"], key)) for name, key in keys.items()
        }
        yield MeasuredStack(stack, parse_fleet(file.read_text()), queries, metrics, clients)


def make_tenants(database_url: str, pepper: str, names: Sequence[str]) -> dict[str, str]:
    """Make tenants, and return an API key of each by its name."""
    database = make_engine(database_url, pool_size=1)
    try:
        with transaction(database) as session:
            ids = {name: tenants.create(session, name=name).id for name in names}
            return {
                name: api_keys.issue(session, tenant_id=id, name="bench", pepper=pepper)[1]
                for name, id in ids.items()
            }
    finally:
        database.dispose()
