"""What one gateway process has only so much of, and how much of it each tenant holds: waits, event streams, large bodies, spooled bytes."""

import threading
import uuid
from collections import Counter
from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from policy.sharing import may_take


class Capacity:
    """So much of one thing, shared among tenants (policy/sharing.py). Nobody waits for any: there is enough, or there is not."""

    def __init__(self, most: int, gauge: Gauge | None = None) -> None:
        self.most = most
        self._gauge, self._lock = gauge, threading.Lock()
        self._in_use, self._held = 0, Counter[uuid.UUID]()

    def take(self, tenant_id: uuid.UUID, amount: int = 1) -> "Holding | None":
        """That much of it, until it is released; None if there is not enough for this tenant now."""
        with self._lock:
            if not may_take(
                amount, held=self._held[tenant_id], in_use=self._in_use, most=self.most
            ):
                return None
            self._add(tenant_id, amount)
        return Holding(self, tenant_id, amount)

    def held_by(self, tenant_id: uuid.UUID) -> int:
        """How much of it a tenant holds."""
        with self._lock:
            return self._held[tenant_id]

    def give_back(self, tenant_id: uuid.UUID, amount: int) -> None:
        """What was taken; see `Holding.release`."""
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
    """Some of a capacity, in a tenant's hands until it is released."""

    def __init__(self, capacity: Capacity, tenant_id: uuid.UUID, amount: int) -> None:
        self._capacity, self._tenant_id, self._amount = capacity, tenant_id, amount

    def release(self) -> None:
        """Harmless when repeated, by one thread."""
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
