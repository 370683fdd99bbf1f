"""What the metrics of this process say, and by how much an act changes them."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

OURS = "darkroom_"


def families() -> dict[str, Metric]:
    """Everything of ours that /metrics shows, by the name it has there."""
    return {
        metric.name + ("_total" if metric.type == "counter" else ""): metric
        for metric in REGISTRY.collect()
        if metric.name.startswith(OURS)
    }


def counted() -> dict[str, float]:
    """Counters and how often histograms were told something, as a scrape writes them."""
    return _samples("counter", "_total") | _samples("histogram", "_count")


def gauges() -> dict[str, float]:
    """Every gauge, as a scrape writes it."""
    return _samples("gauge", "")


@contextmanager
def increases() -> Iterator[dict[str, float]]:
    """Tell by how much the act within makes counters grow, at its end; without those that stay."""
    before, grown = counted(), dict[str, float]()
    yield grown
    after = counted()
    grown |= {name: value - before.get(name, 0) for name, value in after.items()}
    for name in [name for name, value in grown.items() if not value]:
        del grown[name]


def _samples(kind: str, suffix: str) -> dict[str, float]:
    return {
        _written(metric.name, sample.labels): sample.value
        for metric in families().values()
        for sample in metric.samples
        if metric.type == kind and sample.name.endswith(suffix)
    }


def _written(name: str, labels: dict[str, str]) -> str:
    told = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return name.removeprefix(OURS) + (f"{{{told}}}" if told else "")
