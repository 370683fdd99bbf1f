"""The failover drill: a service answers with each error that it documents, for seconds, under load.

    python -m benchmarks.drill [--quick] [--for-s 10] [--only WORD ...] [--keep]

Services: broker, hand-off and Postgres. fleet.toml's own deadlines hold: a fast job that nothing
starts within 30 s expires. While a service answers with errors, and after, no process may end, no
job be lost, doubled or expired. `back_s`: from the end of the outage to the first image stored
after it.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.drill.outages import Outage, ProxiedStack, outages
from benchmarks.drill.runs import WORKERS, DrillRun, run_outage, violations, write_fleet_file
from benchmarks.lib.integrity.checks import stack_checks
from benchmarks.lib.integrity.command import Findings, make_parser, run_and_judge
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.progress import log_progress
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target

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
    return run_and_judge(
        "drill",
        partial(_run_all, options=options),
        TARGETS,
        options,
        write_fleet_file=write_fleet_file,
        workers=WORKERS,
        kind=ProxiedStack,
    )


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
    parser = make_parser(__doc__, quick=f"each service read-only for {QUICK_FOR_S:g} s")
    parser.add_argument("--for-s", type=float, help=f"how long each outage lasts; {FOR_S:g}")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="outages with this in their name: broker, READONLY, proxied ...",
    )
    return parser.parse_args()


def _run_all(probe: StackProbe, options: argparse.Namespace) -> Findings:
    """Make one outage after the other, and check what came of each."""
    for_s = options.for_s or (QUICK_FOR_S if options.quick else FOR_S)
    runs = []
    wrong = 0
    for outage in chosen(outages(probe), options):
        run = run_outage(probe, outage, for_s)
        runs.append(run)
        log_progress(f"{outage}: {run.figures()}")
        wrong += violations(probe, run)
    at_last = stack_checks(probe)
    show_checks(probe, "when all is over", at_last)
    _show_runs(runs)
    by_outage = {str(run.outage): run.figures() for run in runs}
    return Findings(
        figures=_figures(runs, wrong + sum(len(check.violations) for check in at_last)),
        facts={"by_outage": by_outage, "for_s": for_s},
    )


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
