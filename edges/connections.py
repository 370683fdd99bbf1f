"""Make Redis clients that survive a failover. The only module that makes a client.

A demoted primary keeps its clients: it answers their reads and refuses their writes for as long as
they stay connected. Only a new connection reaches the server that took over. So when a server
replies that it is not the primary (any more), the client drops the connection and tries the command
once more on a new one. That is safe: the refused command had no effect.
"""

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MasterDownError, ReadOnlyError
from redis.retry import Retry

NOT_THE_ONE = (ReadOnlyError, MasterDownError, ClusterDownError)


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
