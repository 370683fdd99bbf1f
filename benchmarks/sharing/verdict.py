"""Figures against targets: the last line of a benchmark and its exit status. Plain numbers."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOLDS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Target:
    """A promise about one figure. `said`: how the bound came about, where it is not a plain number."""

    figure: str
    sign: str
    bound: float
    said: str = ""


def judge(figures: Mapping[str, Any], targets: Sequence[Target], not_judged: Mapping[str, str]) -> dict[str, bool]:
    """Is each target met that can be judged? not_judged: figure -> why it shows nothing this time."""
    return {
        target.figure: HOLDS[target.sign](figures[target.figure], target.bound) for target in targets if target.figure not in not_judged
    }


def report(
    benchmark: str, figures: Mapping[str, Any], targets: Sequence[Target], not_judged: Mapping[str, str], facts: Mapping[str, Any]
) -> int:
    """Print one line of JSON; 1 if a target is missed."""
    met = judge(figures, targets, not_judged)
    rounded = {name: _rounded(figure) for name, figure in figures.items()}
    said = {target.figure: f"{target.sign} {target.said or round(target.bound, 4)}" for target in targets}
    print(
        json.dumps({"benchmark": benchmark, "figures": rounded, "targets": said, "met": met, "not_judged": dict(not_judged)} | dict(facts))
    )
    return 0 if all(met.values()) else 1


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1 ÷ their number when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def _rounded(figure: Any) -> Any:
    if isinstance(figure, float):
        return round(figure, 4)
    if isinstance(figure, Mapping):
        return {name: _rounded(value) for name, value in figure.items()}
    if isinstance(figure, list | tuple):
        return [_rounded(value) for value in figure]
    return figure
