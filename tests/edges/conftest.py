"""The stack's real Redis, S3 and Postgres, each with a corner that no process of the house looks
into.
"""

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
import redis

from benchmarks.lib.refusals import RefusingProxy
from settings import StoreSettings
from tests.builders import a_closed_port, a_redis, settings_for
from tests.models.conftest import database  # noqa: F401

TEST_REDIS_DB = 9  # of Redis's sixteen numbered databases


@pytest.fixture(scope="session")
def settings(stack) -> StoreSettings:
    """What a results worker is handed, but for the corner."""
    urls = {
        name: urlsplit(stack.env[name.upper()])._replace(path=f"/{TEST_REDIS_DB}").geturl()
        for name in ("broker_url", "handoff_url")
    }
    return settings_for(StoreSettings, stack.env, **urls)


@pytest.fixture
def broker_redis(settings) -> Iterator[redis.Redis]:
    """The broker's corner, as redis-cli sees it; empty at first."""
    with redis.Redis.from_url(settings.broker_url) as client:
        client.flushdb()
        yield client
        client.flushdb()


@pytest.fixture
def handoff_redis(settings) -> Iterator[redis.Redis]:
    """The hand-off's corner, as redis-cli sees it; empty at first."""
    with redis.Redis.from_url(settings.handoff_url) as client:
        client.flushdb()
        yield client
        client.flushdb()


def subscribers(redis: redis.Redis) -> list[dict[str, str]]:
    """The connections that listen in our corner; those of the house's processes are elsewhere."""
    here = [client for client in redis.client_list() if client["db"] == str(TEST_REDIS_DB)]
    return [client for client in here if client["sub"] != "0"]


@pytest.fixture
def proxied() -> Iterator[Callable[[str], tuple[RefusingProxy, str]]]:
    """Puts a proxy before a Redis: the proxy, and the URL that leads through it."""
    opened: list[RefusingProxy] = []

    def proxied(url: str) -> tuple[RefusingProxy, str]:
        parts, port = urlsplit(url), a_closed_port()
        opened.append(RefusingProxy(port, parts.port or 0))
        return opened[-1], parts._replace(
            netloc=parts.netloc.replace(f":{parts.port}", f":{port}")
        ).geturl()

    yield proxied
    for proxy in opened:
        proxy.close()


@pytest.fixture(scope="session")
def small_redis(tmp_path_factory) -> Iterator[str]:
    """The URL of a Redis of our own that is full when it is empty.

    It needs more memory than it may use.
    """
    with a_redis(tmp_path_factory.mktemp("redis"), maxmemory="512kb") as url:
        yield url
