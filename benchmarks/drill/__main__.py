"""The failover drill: a service answers with each error that it documents, for seconds, under load.

    python -m benchmarks.drill [--quick] [--for-s 10] [--only WORD ...] [--keep]

Services: broker, hand-off and Postgres. fleet.toml's own deadlines hold: a fast job that nothing
starts within 30 s expires. While a service answers with errors, and after, no process may end, no
job be lost, doubled or expired. `back_s`: from the end of the outage to the first image stored
after it.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from benchmarks.drill.outages import Outage, ProxiedStack, outages
from benchmarks.drill.runs import WORKERS, DrillRun, run_outage, violations, write_fleet_file
from benchmarks.lib.integrity.checks import stack_checks
from benchmarks.lib.integrity.probe import StackProbe, probed_stack
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.progress import log_progress
from benchmarks.lib.tables import make_table, show, show_figures
from benchmarks.lib.verdict import Target, judge, report

FOR_S = 10.0
QUICK_FOR_S = 3.0
QUICK = ("broker: READONLY", "handoff: READONLY", "postgres: read-only")
SUMMED = ("jobs", "processes_ended", "lost", "doubled", "expired", "failed")
TARGETS = (
    *(Target(name, "==", 0) for name in (*SUMMED[1:], "wrong")),
    Target("outages", ">", 0),
)


def main() -> int:
    """Run, report, judge; 1 if any process ended or any job came to harm."""
    options = _options()
    for_s = options.for_s or (QUICK_FOR_S if options.quick else FOR_S)
    started_at = time.monotonic()
    is_good = False
    with probed_stack(
        write_fleet_file,
        workers=WORKERS,
        variables={},
        wait_s=300,
        keep=lambda: options.keep and not is_good,
        kind=ProxiedStack,
    ) as probe:
        runs, wrong = _run_all(probe, chosen(outages(probe), options), for_s)
        figures = _figures(runs, wrong)
        is_good = all(judge(figures, TARGETS).values())
    _show_runs(runs)
    show_figures("drill", figures)
    facts = {
        "by_outage": {str(run.outage): run.figures() for run in runs},
        "for_s": for_s,
        "workers": WORKERS,
        "cores": os.cpu_count(),
        "took_s": round(time.monotonic() - started_at, 1),
        "quick": options.quick,
    }
    return report("drill", figures, TARGETS, facts=facts)


def chosen(every_outage: Sequence[Outage], options: argparse.Namespace) -> list[Outage]:
    """Return the outages that were asked for."""
    words = options.only or (QUICK if options.quick else ("",))
    named = [
        outage
        for outage in every_outage
        if any(word.lower() in str(outage).lower() for word in words)
    ]
    return [outage for outage in named if outage.how == "real"] if options.quick else named


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help=f"each service read-only for {QUICK_FOR_S:g} s; ends within a minute",
    )
    add("--for-s", type=float, help=f"how long each outage lasts; {FOR_S:g}")
    add(
        "--only",
        nargs="+",
        metavar="WORD",
        help="outages with this in their name: broker, READONLY, proxied ...",
    )
    add(
        "--keep",
        action="store_true",
        help="leave the data where they are when something was wrong",
    )
    return parser.parse_args()


def _run_all(
    probe: StackProbe, every_outage: Sequence[Outage], for_s: float
) -> tuple[list[DrillRun], int]:
    """Make one outage after the other; return what came of each, and the violations found."""
    runs = []
    wrong = 0
    for outage in every_outage:
        run = run_outage(probe, outage, for_s)
        runs.append(run)
        log_progress(f"{outage}: {run.figures()}")
        wrong += violations(probe, run)
    at_last = stack_checks(probe)
    show_checks(probe, "when all is over", at_last)
    return runs, wrong + sum(len(check.violations) for check in at_last)


def _figures(runs: Sequence[DrillRun], wrong: int) -> dict[str, object]:
    of_all = [run.figures() for run in runs]
    back_s = [figures["back_s"] for figures in of_all if figures["back_s"] is not None]
    return {
        **{name: sum(figures[name] for figures in of_all) for name in SUMMED},
        "outages": len(runs),
        "wrong": wrong,
        "back_max_s": max(back_s, default=None),
        "extra_messages_max": max((each["extra_messages"] for each in of_all), default=0),
    }


def _show_runs(runs: Sequence[DrillRun]) -> None:
    if not runs:
        return
    names = [name.replace("_", " ") for name in runs[0].figures()]
    table = make_table("failover drill", ("outage", *names), left=("outage",))
    for run in runs:
        values = run.figures().values()
        table.add_row(str(run.outage), *("-" if value is None else str(value) for value in values))
    show(table, width=200)


if __name__ == "__main__":
    sys.exit(main())
