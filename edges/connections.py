"""Make Redis clients that survive a failover, and say of what types their replies are.

The only module that makes a client.

A demoted primary keeps its clients: it answers their reads and refuses their writes for as long as
they stay connected. Only a new connection reaches the server that took over. So when a server
replies that it is not the primary (any more), the client drops the connection and tries the command
once more on a new one. That is safe: the refused command had no effect.
"""

from collections.abc import Mapping
from typing import cast

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MasterDownError, ReadOnlyError
from redis.retry import Retry
from redis.typing import KeyT, StreamIdT

NOT_THE_ONE = (ReadOnlyError, MasterDownError, ClusterDownError)

Entry = tuple[bytes, dict[bytes, bytes]]  # of a stream: its id and its fields


def connect(
    url: str,
    *,
    socket_timeout: float,
    socket_connect_timeout: float = 2.0,
    health_check_interval: int = 0,
) -> redis.Redis:
    """Make a client; it connects at its first command. Its errors are all redis.RedisError."""
    return redis.Redis.from_url(
        url,
        socket_timeout=socket_timeout,
        socket_connect_timeout=socket_connect_timeout,
        health_check_interval=health_check_interval,
        retry=Retry(NoBackoff(), 1, supported_errors=NOT_THE_ONE),
    )


# redis-py types each reply for clients that decode replies to str and for those that do not. The
# clients made here do not: the functions below say what their replies are. Like the commands they
# are named for, they raise redis.RedisError.


def get(client: redis.Redis, key: str) -> bytes | None:
    """Return the value of a key; None if there is no such key."""
    return cast(bytes | None, client.get(key))


def hgetall(client: redis.Redis, key: str) -> dict[bytes, bytes]:
    """Return all fields of a hash; {} if there is no such key."""
    return cast(dict[bytes, bytes], client.hgetall(key))


def xrange(client: redis.Redis, key: str, *, after: str) -> list[Entry]:
    """Return the entries of a stream that come after the one with the id `after`."""
    return cast(list[Entry], client.xrange(key, min=f"({after}"))


def xread(
    client: redis.Redis, positions: Mapping[str, str], *, block_ms: int
) -> list[tuple[bytes, list[Entry]]]:
    """Return the keys of streams that have entries after their position, with these entries.

    Waits up to `block_ms` for the first entry.
    """
    streams: dict[KeyT, StreamIdT] = dict(positions.items())
    return cast(list[tuple[bytes, list[Entry]]], client.xread(streams, block=block_ms))
