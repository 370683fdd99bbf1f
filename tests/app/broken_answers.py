"""An application whose answers end in the middle, for gunicorn with
`deploy.connections.BoundedWorker`.
"""

from collections.abc import Iterator
from typing import Any


def application(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    """Answer `/broken` with a first piece and an error, anything else with a word."""
    is_broken = environ["PATH_INFO"] == "/broken"
    start_response("200 OK", [("Content-Length", "1000000" if is_broken else "4")])
    yield b"x" * 65_536 if is_broken else b"well"
    if is_broken:
        raise RuntimeError("what the rest comes from has gone away")
