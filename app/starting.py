"""Read what a gateway process starts with: its settings, and the fleet in force."""

import functools

from dispatch.following import fleet_at_start
from policy.current import CurrentFleet
from settings import GatewayProcessSettings, load, load_fleet_or_exit, refuse_misfits


@functools.cache
def load_gateway() -> tuple[GatewayProcessSettings, CurrentFleet]:
    """Read the gateway's settings and its fleet once per process.

    gunicorn's master reads them before it starts a worker, and the workers inherit them. A worker
    that read them itself could fail where the master did not, and gunicorn would restart it
    without end.
    """
    settings = load(GatewayProcessSettings)
    applied = fleet_at_start(settings.database_url) if settings.follow_revisions else None
    if applied is not None:
        refuse_misfits(settings, applied.fleet)
        return settings, applied
    return settings, CurrentFleet(load_fleet_or_exit(settings))
