"""Start one role of Darkroom: `python -m tasks.serve render | results | maintenance | …`.

Each role reads only its own settings; what is wrong with them is said before anything is loaded.
Only its own module is: no role but `render` loads torch.
"""

import importlib
import sys

from dispatch.following import fleet_at_start
from edges import telemetry
from policy.current import CurrentFleet
from settings import (
    BrokerSettings,
    FlowerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    load,
    load_fleet_or_exit,
    refuse_misfits,
)

ROLES: dict[str, type[BrokerSettings]] = {
    "render": WorkerSettings,
    "results": StoreSettings,
    "maintenance": Settings,
    "webhooks": WebhookSettings,
    "flower": FlowerSettings,
}


def main() -> None:
    """Read the role's settings and serve until told to end."""
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: python -m tasks.serve {'|'.join(ROLES)}")
    role = sys.argv[1]
    settings = load(ROLES[role])
    telemetry.configure_logs(settings.log_level)
    sys.exit(importlib.import_module(f"tasks.roles.{role}").serve(settings, _fleet(settings)))


def _fleet(settings: BrokerSettings) -> CurrentFleet:
    """Return the fleet in force, or that of the file where none was applied or can be asked for."""
    if isinstance(settings, Settings) and settings.follow_revisions:
        applied = fleet_at_start(settings.database_url)
        if applied is not None:
            refuse_misfits(settings, applied.fleet)
            return applied
    return CurrentFleet(load_fleet_or_exit(settings))


if __name__ == "__main__":
    main()
