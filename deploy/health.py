"""Say whether a container does its work: exit code 0 or 1, and a line that `docker inspect` keeps.

`python -m deploy.health URL` asks a server on the loopback. If the answer says when the loops of
its process last ran, as /metrics does, each must have run within the last STALE_AFTER_S: a port
can answer although a thread has died.

`python -m deploy.health worker` looks for this host's worker among the live ones in Postgres. Its
heartbeat arrives there only after the models are loaded and as long as its leases are renewed. Then
it checks the worker's loops, too. While Postgres is away it checks the loops alone, because a
restart of the worker would not help.
"""

import re
import socket
import sys
import time
import urllib.request
from contextlib import suppress

STALE_AFTER_S = 60.0  # twice the longest single wait of a loop
_TURN = re.compile(r'^darkroom_last_turn_timestamp_seconds\{loop="([^"]+)"\} (\S+)$', re.MULTILINE)


def main() -> None:
    """Print one line about the container's health; exit with code 1 when it is bad."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m deploy.health URL|worker")
    print(_worker() if sys.argv[1] == "worker" else _answer(sys.argv[1]))


def _answer(url: str) -> str:
    """Return the status line of a good answer.

    Anything else ends the process; a loop that stands still is named.
    """
    try:
        status, text = _get(url)
    except OSError as error:
        sys.exit(f"{url}: {error}")
    moving = _moving(url, text)
    return f"{url}: {status}" + (f", {', '.join(moving)} moving" if moving else "")


def _get(url: str) -> tuple[int, str]:
    # Ignore the host's proxy: it does not lead to our own loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=5) as answer:
        return answer.status, answer.read().decode(errors="replace")


def _moving(url: str, text: str) -> list[str]:
    """Return the names of the loops in the answer; one that stands still ends the process."""
    ages = {name: time.time() - float(at) for name, at in _TURN.findall(text)}
    if stale := [f"{name} for {age:.0f} s" for name, age in ages.items() if age > STALE_AFTER_S]:
        sys.exit(f"{url}: stands still: {', '.join(stale)}")
    return list(ages)


def _worker() -> str:
    """Return the names of this host's live workers.

    Ends the process if there is none. While Postgres is away, the loops decide.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from settings import WorkerSettings, load

    settings = load(WorkerSettings)
    try:
        live = _live_workers(settings.database_url, settings.lease_ttl_s)
    except SQLAlchemyError as error:
        if not settings.metrics_port:
            sys.exit(f"Postgres: {type(error).__name__}")
        answer = _answer(f"http://127.0.0.1:{settings.metrics_port}/metrics")
        return f"Postgres is away ({type(error).__name__}); {answer}"
    here = {name: port for name, port in live.items() if name.endswith(f"@{socket.gethostname()}")}
    for port in filter(None, here.values()):
        url = f"http://127.0.0.1:{port}/metrics"
        with suppress(OSError):  # its leases are renewed, so it is there
            _moving(url, _get(url)[1])
    return ", ".join(here) or sys.exit("no live worker of this host")


def _live_workers(database_url: str, silent_for_s: float) -> dict[str, int]:
    """Return the port for metrics of each live worker, by name; 0: it has none."""
    from models import workers
    from models.database import make_engine, transaction

    with transaction(make_engine(database_url, pool_size=1)) as session:
        return {
            worker.name: int(worker.facts.get("metrics_port", 0))
            for worker in workers.live(session, silent_for_s=silent_for_s)
        }


if __name__ == "__main__":
    main()
