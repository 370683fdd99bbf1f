"""The broker's corner and the database of tests/edges: what a release reads, stamps and publishes."""

from tests.edges.conftest import broker_redis, settings  # noqa: F401
from tests.models.conftest import database  # noqa: F401
