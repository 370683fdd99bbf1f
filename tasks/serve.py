"""Start one role of Darkroom: `python -m tasks.serve render | results | maintenance | …`.

Each role reads only its own settings; what is wrong with them is said before anything is loaded.
Only its own module is: no role but `render` loads torch.
"""

import importlib
import sys

from edges import telemetry
from settings import (
    BrokerSettings,
    FlowerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    load,
    load_fleet_or_exit,
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
    fleet = load_fleet_or_exit(settings)
    sys.exit(importlib.import_module(f"tasks.roles.{role}").serve(settings, fleet))


if __name__ == "__main__":
    main()
