"""What the devices' time went into, by the SQL views that operators read."""

from typing import Any

from benchmarks.lib.integrity.probe import StackProbe, wait_until

PATIENCE_S = 60

_OF_POOLS = """
SELECT coalesce(sum(busy_s + padding_s), 0)::float AS busy_s,
       coalesce(sum(stored_s), 0)::float AS stored_s,
       coalesce(sum(wasted_s), 0)::float AS wasted_s,
       coalesce(sum(unexplained_s), 0)::float AS unexplained_s,
       coalesce(sum(images), 0)::int AS images, coalesce(sum(cost), 0)::float AS cost
FROM costs_by_pool_day
"""
_OF_TIME = """
SELECT coalesce(sum(billed_s), 0)::float AS billed_s, coalesce(sum(idle_s), 0)::float AS idle_s,
       coalesce(sum(startup_s), 0)::float AS startup_s, coalesce(sum(host_s), 0)::float AS host_s,
       coalesce(sum(other_s), 0)::float AS other_s
FROM device_time_by_hour
"""
_OF_WASTE = "SELECT waste_class, sum(gpu_seconds)::float AS s FROM wasted_time_by_day GROUP BY 1"


class Accounts:
    """The accounts of a stack, of which each run takes what it added."""

    def __init__(self, probe: StackProbe) -> None:
        self._probe = probe
        self._before: dict[str, float] = {}

    def totals(self) -> dict[str, float]:
        """Read what all workers were paid for until now, and what for: once each has told."""
        since = self._probe.sql("SELECT clock_timestamp() AS now")[0]["now"]
        count = len(self._probe.workers)
        wait_until(lambda: self._probe.workers_heard_since(since) == count, PATIENCE_S)
        [pools], [time] = self._probe.sql(_OF_POOLS), self._probe.sql(_OF_TIME)
        waste = {f"wasted_{row['waste_class']}_s": row["s"] for row in self._probe.sql(_OF_WASTE)}
        return {**time, **pools, **waste}

    def of_run(self) -> dict[str, Any]:
        """Return what was added since the last call, and what an image cost by it."""
        now = self.totals()
        added = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        images = added.pop("images")
        cost = added.pop("cost")
        told = {name: round(value, 2) for name, value in added.items()}
        return told | {"cost_per_image": round(cost / images, 8) if images else None}

    def shares(self) -> dict[str, float]:
        """Return the parts of all time that no account explains."""
        all_time = self.totals()
        return {
            "unexplained_of_busy": _share(all_time["unexplained_s"], all_time["busy_s"]),
            "unexplained_of_billed": _share(all_time["other_s"], all_time["billed_s"]),
        }


def _share(part: float, whole: float) -> float:
    return round(abs(part) / whole, 5) if whole else 0.0
