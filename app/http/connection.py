"""Watch the client's connection, as the gateway's server exposes it (deploy/connections.py).

Under another server nothing is known about the connection.
"""

from collections.abc import Callable

from flask import Request

UNREAD_FOR_S = 30  # a client that takes nothing for so long has gone without a word


def has_left(request: Request) -> Callable[[], bool]:
    """Return a function that tells whether the client has closed its connection."""
    found: Callable[[], bool] | None = getattr(
        request.environ.get("gunicorn.socket"), "has_left", None
    )
    return found or (lambda: False)


def give_up_when_unread(request: Request) -> None:
    """Abort the answer when the client reads nothing of it for `UNREAD_FOR_S`."""
    if (sock := request.environ.get("gunicorn.socket")) is not None:
        sock.settimeout(UNREAD_FOR_S)
