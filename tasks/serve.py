"""Start one role of the house: `python -m tasks.serve render | results | maintenance | …`.

Each role loads only its own module, so that none but `render` loads torch, and reads only its own
settings.
"""

import importlib
import sys

ROLES = ("render", "results", "maintenance", "webhooks", "flower")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: python -m tasks.serve {'|'.join(ROLES)}")
    role = importlib.import_module(f"tasks.roles.{sys.argv[1]}")
    sys.exit(role.serve())


if __name__ == "__main__":
    main()
