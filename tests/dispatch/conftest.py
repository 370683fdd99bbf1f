"""The broker's and the hand-off's corners and the database of tests/edges."""

from tests.edges.conftest import broker_redis, handoff_redis, settings  # noqa: F401
from tests.models.conftest import database  # noqa: F401
