"""Share what a gateway process has a limited amount of: waits, streams, large bodies, disk space.

Counts how much of it each tenant holds.
"""

import threading
import uuid
from collections import Counter
from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from policy.sharing import may_take


class Capacity:
    """A limited amount of one resource, shared among tenants (policy/sharing.py).

    Nobody waits for it: a request gets its share at once, or is refused.
    """

    def __init__(self, most: int, gauge: Gauge | None = None) -> None:
        self.most = most
        self._gauge = gauge
        self._lock = threading.Lock()
        self._in_use = 0
        self._held = Counter[uuid.UUID]()

    def take(self, tenant_id: uuid.UUID, amount: int = 1) -> "Holding | None":
        """Take an amount until it is released; None if this tenant cannot have it now."""
        with self._lock:
            held = self._held[tenant_id]
            if not may_take(amount, held=held, in_use=self._in_use, most=self.most):
                return None
            self._add(tenant_id, amount)
        return Holding(self, tenant_id, amount)

    def held_by(self, tenant_id: uuid.UUID) -> int:
        """Return how much of it the tenant holds."""
        with self._lock:
            return self._held[tenant_id]

    def give_back(self, tenant_id: uuid.UUID, amount: int) -> None:
        """Return what a tenant took; see `Holding.release`."""
        with self._lock:
            self._add(tenant_id, -amount)

    def _add(self, tenant_id: uuid.UUID, amount: int) -> None:
        self._in_use += amount
        self._held[tenant_id] += amount
        if not self._held[tenant_id]:
            del self._held[tenant_id]
        if self._gauge is not None:
            self._gauge.inc(amount)


class Holding:
    """An amount of a capacity that a tenant holds until it is released."""

    def __init__(self, capacity: Capacity, tenant_id: uuid.UUID, amount: int) -> None:
        self._capacity = capacity
        self._tenant_id = tenant_id
        self._amount = amount

    def release(self) -> None:
        """Give the amount back; harmless when repeated by the same thread."""
        amount, self._amount = self._amount, 0
        if amount:
            self._capacity.give_back(self._tenant_id, amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
