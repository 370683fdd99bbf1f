"""Figures against targets: the last line of a benchmark and its exit status. Plain numbers."""

import json
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOLDS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Target:
    """A promise about one figure. `said`: the bound in words, where it is no plain number."""

    figure: str
    sign: str
    bound: float
    said: str = ""

    def __str__(self) -> str:
        return f"{self.sign} {self.said or round(self.bound, 4)}"

    def is_met(self, figures: Mapping[str, Any]) -> bool:
        """Tell whether the figure keeps to the bound."""
        return bool(HOLDS[self.sign](figures[self.figure], self.bound))


def judge(
    figures: Mapping[str, Any], targets: Sequence[Target], not_judged: Container[str] = ()
) -> dict[str, bool]:
    """Tell of each target whether it is met; leave out those without a figure that shows it.

    not_judged: figures that show nothing this time.
    """
    return {
        target.figure: target.is_met(figures)
        for target in targets
        if target.figure in figures and target.figure not in not_judged
    }


def report(
    benchmark: str,
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    *,
    not_judged: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    digits: int = 4,
) -> int:
    """Print one line of JSON; return the exit status, 1 if a target is missed.

    not_judged: figure -> why it shows nothing this time.  facts: further members of the line.
    """
    met = judge(figures, targets, not_judged or {})
    line: dict[str, Any] = {
        "benchmark": benchmark,
        "figures": rounded(figures, digits),
        "targets": said(targets),
        "met": met,
    }
    if not_judged is not None:
        line["not_judged"] = dict(not_judged)
    print(json.dumps(line | dict(facts or {})))
    return exit_status(met)


def exit_status(met: Mapping[str, bool]) -> int:
    """Return 0 if all targets are met, else 1."""
    return 0 if all(met.values()) else 1


def said(targets: Sequence[Target]) -> dict[str, str]:
    """Return the bounds by figure, for people."""
    return {target.figure: str(target) for target in targets}


def rounded(figure: Any, digits: int = 4) -> Any:
    """Round every float in a figure, in its lists and its mappings."""
    if isinstance(figure, float):
        return round(figure, digits)
    if isinstance(figure, Mapping):
        return {name: rounded(value, digits) for name, value in figure.items()}
    if isinstance(figure, list | tuple):
        return [rounded(value, digits) for value in figure]
    return figure
