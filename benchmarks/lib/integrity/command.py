"""The command line, the stack and the verdict of a benchmark that breaks a stack on purpose."""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.integrity.probe import StackProbe, probed_stack
from benchmarks.lib.tables import show_figures
from benchmarks.lib.verdict import Target, judge, report
from fleet.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What came of a benchmark.

    not_judged: figures that show nothing this time, and why.  facts: further members of its line.
    caption: of the table of figures.
    """

    figures: Mapping[str, Any]
    not_judged: Mapping[str, str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    caption: str = ""


def make_parser(description: str, *, quick: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all have. quick: what `--quick` does less of."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}; ends within a minute")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave the data where they are when something was wrong",
    )
    return parser


def run_and_judge(
    benchmark: str,
    measure: Callable[[StackProbe], Findings],
    targets: Sequence[Target],
    options: argparse.Namespace,
    *,
    write_fleet_file: Callable[[Path], Path],
    workers: int | str,
    variables: Mapping[str, str] | None = None,
    wait_s: float = 300,
    kind: type[Stack] = Stack,
) -> int:
    """Measure on a stack of its own, report, judge; return 1 if a target is missed.

    options: of `make_parser`; the rest is as for `probed_stack`.
    """
    started_at = time.monotonic()
    is_good = False
    with probed_stack(
        write_fleet_file,
        workers=workers,
        variables=variables,
        wait_s=wait_s,
        keep=lambda: options.keep and not is_good,
        kind=kind,
    ) as probe:
        found = measure(probe)
        is_good = all(judge(found.figures, targets).values())
    left_out = {f"{name} (not judged)": why for name, why in (found.not_judged or {}).items()}
    show_figures(benchmark, {**found.figures, **left_out}, found.caption)
    facts = {
        **found.facts,
        "workers": workers,
        "cores": os.cpu_count(),
        "took_s": round(time.monotonic() - started_at, 1),
        "quick": options.quick,
    }
    return report(benchmark, found.figures, targets, not_judged=found.not_judged, facts=facts)
