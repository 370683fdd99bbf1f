"""Connections to a Redis whose name may lead to another server tomorrow. The one place that makes a client.

A primary that was demoted keeps its clients, answers their reads and refuses their writes for as long as they stay. Only who
connects anew is led to the server that took over. So the replies by which a server says that it is not the one to talk to
(any more) cost the connection, and the command is tried once more on a new one: it was refused, so twice is once.
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
    """A client, no connection yet. Every error it raises is a redis.RedisError."""
    return redis.Redis.from_url(
        url,
        socket_timeout=socket_timeout,
        socket_connect_timeout=socket_connect_timeout,
        health_check_interval=health_check_interval,
        retry=Retry(NoBackoff(), 1, supported_errors=NOT_THE_ONE),
    )
