"""Say whether a container does its work: exit code 0 or 1, and one line that `docker inspect` keeps.

`python -m deploy.health URL` asks a server on the loopback. `python -m deploy.health worker` looks for this host's
worker among the live ones in Postgres, where its heartbeat arrives only after the models are loaded and as long as its leases
are renewed; a port that answers would say less.
"""

import socket
import sys
import urllib.request


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m deploy.health URL|worker")
    print(_worker() if sys.argv[1] == "worker" else _answer(sys.argv[1]))


def _answer(url: str) -> str:
    """The status line of a good answer; anything else ends the process."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the host is no way to our own loopback
    try:
        with direct.open(url, timeout=5) as answer:
            return f"{url}: {answer.status}"
    except OSError as error:
        sys.exit(f"{url}: {error}")


def _worker() -> str:
    """The names of this host's live workers; none ends the process."""
    from sqlalchemy.exc import SQLAlchemyError

    from models import workers
    from models.database import make_engine, transaction
    from settings import WorkerSettings, load

    settings = load(WorkerSettings)
    engine = make_engine(settings.database_url, pool_size=1)
    try:
        with transaction(engine) as session:
            names = [worker.name for worker in workers.live(session, silent_for_s=settings.lease_ttl_s)]
    except SQLAlchemyError as error:
        sys.exit(f"Postgres: {type(error).__name__}")
    here = [name for name in names if name.endswith(f"@{socket.gethostname()}")]
    return ", ".join(here) or sys.exit("no live worker of this host")


if __name__ == "__main__":
    main()
