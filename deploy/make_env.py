"""Print a .env for docker-compose.yml in which every secret is new. Needs nothing but Python.

python3 deploy/make_env.py > .env
"""

import os
import re
import secrets
import stat
import sys
from pathlib import Path

EXAMPLE = Path(__file__).with_name("compose.env.example")


def made(example: str) -> str:
    """Return the example with a new secret in place of each one that is for development only."""
    return re.sub(
        r"^#(\w+)=development-only.*$",
        lambda match: f"{match[1]}={secrets.token_hex(32)}",
        example,
        flags=re.MULTILINE,
    )


if __name__ == "__main__":
    if stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode):
        os.fchmod(sys.stdout.fileno(), 0o600)  # it holds every secret
    sys.stdout.write(made(EXAMPLE.read_text()))
