"""Count tenants' rates and budgets in the hand-off's Redis, for all gateway processes together.

Requests: the sliding window counter of `limits`, whose hits are atomic. Budgets: a token bucket in
Lua, on Redis's own clock. Neither is money: quotas are, and they are in Postgres (models/usage.py).
So when Redis is away, requests are counted in this process alone and budgets not at all. A metric
counts both cases.
"""

import time
import uuid
from dataclasses import dataclass

import redis
import structlog
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from edges import telemetry
from edges.connections import connect

log = structlog.get_logger(__name__)

WINDOW_S = 60

# KEYS: the bucket.  ARGV: tokens a second, tokens at most, tokens to take (below 0: to give back).
# Answers: whether they were taken, what is left, seconds until there are enough.
_TAKE = """
local rate, most, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = tonumber(held[1]) or most
tokens = math.min(most, tokens + math.max(0, now - (tonumber(held[2]) or now)) * rate)
local taken, wait = 0, 0
if cost <= tokens then
    tokens, taken = math.min(most, tokens - cost), 1
else
    wait = (cost - tokens) / rate
end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil(most / rate) + 60)
return {taken, tostring(tokens), tostring(wait)}
"""


@dataclass(frozen=True)
class RateResult:
    """Tell whether a request passes, how many more may, and in how many seconds to ask again."""

    passes: bool
    remaining: int
    reset_s: int


@dataclass(frozen=True)
class BudgetResult:
    """Tell whether a budget had enough. wait_s: until it has, if it had not."""

    passes: bool
    left: float
    wait_s: float


class Rates:
    """Count requests per minute."""

    def __init__(self, handoff_url: str) -> None:
        client = connect(handoff_url, socket_timeout=1, socket_connect_timeout=1)
        shared = RedisStorage(handoff_url, connection_pool=client.connection_pool)
        self._shared = SlidingWindowCounterRateLimiter(shared)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, tenant_id: uuid.UUID, per_minute: int) -> RateResult:
        """Count one request; it never waits for long and never fails."""
        item = RateLimitItemPerMinute(per_minute)
        try:
            return self._count(self._shared, item, tenant_id)
        except redis.RedisError as error:
            telemetry.LIMITS_LOCAL.labels("requests").inc()
            log.info("requests_counted_here_alone", reason=type(error).__name__)
            return self._count(self._own, item, tenant_id)

    @staticmethod
    def _count(
        limiter: SlidingWindowCounterRateLimiter, item: RateLimitItemPerMinute, tenant_id: uuid.UUID
    ) -> RateResult:
        passes = limiter.hit(item, "tenant", str(tenant_id))
        stats = limiter.get_window_stats(item, "tenant", str(tenant_id))
        remaining = max(0, int(stats.remaining))
        reset_s = max(1, round(stats.reset_time - time.time()))
        return RateResult(passes, remaining, reset_s)


class Budgets:
    """Count megapixel-steps, in token buckets."""

    def __init__(self, handoff_url: str) -> None:
        self._redis = connect(handoff_url, socket_timeout=1, socket_connect_timeout=1)
        self._script = self._redis.register_script(_TAKE)

    def take(
        self, tenant_id: uuid.UUID, *, per_minute: float, burst: float, amount: float
    ) -> BudgetResult:
        """Take `amount` out of the budget, or nothing. While Redis is away everything passes."""
        try:
            taken, left, wait_s = self._script(
                keys=[f"budget:{tenant_id}"], args=[per_minute / 60, burst, amount]
            )
            return BudgetResult(bool(taken), float(left), float(wait_s))
        except redis.RedisError as error:
            telemetry.LIMITS_LOCAL.labels("budget").inc()
            log.info("budget_not_asked", reason=type(error).__name__)
            return BudgetResult(True, burst, 0.0)

    def give_back(
        self, tenant_id: uuid.UUID, *, per_minute: float, burst: float, amount: float
    ) -> None:
        """Put `amount` back that was taken for work that was not accepted."""
        self.take(tenant_id, per_minute=per_minute, burst=burst, amount=-amount)
