"""Time every act in two databases in turns, and compare."""

import argparse
import gc
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import event

from benchmarks.lib.queue.acts import ACTS, Act
from benchmarks.lib.queue.database import TENANTS, Queue, check, settle
from benchmarks.lib.statistics import percentile
from benchmarks.lib.tables import WIDTH, make_table, show
from benchmarks.lib.verdict import Target, report
from edges import telemetry

STRETCHES = 5
WARM_UP = 3  # rounds, for connections and caches

# By act and place of its database, one pair a round: up to the end of the transaction, and with it.
Times = dict[tuple[str, int], list[tuple[float, float]]]


def read_options(about: str, *, explained: str) -> argparse.Namespace:
    """Read the options of a benchmark of two databases, and prepare logs and random numbers.

    explained: in which database --explain shows the plans.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="100,000 rows and fewer rounds; ends within a minute",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help=f"print the plans of the statements, {explained}",
    )
    options = parser.parse_args()
    telemetry.configure_logs("ERROR")
    random.seed(7)
    return options


def compare(queues: Sequence[Queue], rounds: int, *, explains: bool) -> Times:
    """Time every act in both databases, and check that these are as they were.

    explains: print the plans in the last one, too.
    """
    settle(queues)
    times = measure(queues, rounds)
    for queue in queues:
        check(queue)
    if explains:
        explain(queues[-1])
    return times


def measure(queues: Sequence[Queue], rounds: int) -> Times:
    """Time every act once a round in both databases, whose order turns from round to round."""
    times: Times = defaultdict(list)
    gc.collect()
    gc.freeze()
    gc.disable()
    for turn in range(-WARM_UP, rounds):
        for act in ACTS:
            for place in (0, 1) if turn % 2 else (1, 0):
                took = act.run(queues[place])
                if turn >= 0:
                    times[act.name, place].append(took)
        gc.collect()
    gc.enable()
    return times


def ratio_of(small: Sequence[float], large: Sequence[float]) -> tuple[float, float, float]:
    """Return large / small, of the medians.

    Over all rounds, and the least and the greatest of the run's stretches.
    """
    size = max(1, len(small) // STRETCHES)
    parts = [
        statistics.median(large[start : start + size])
        / statistics.median(small[start : start + size])
        for start in range(0, size * STRETCHES, size)
    ]
    return statistics.median(large) / statistics.median(small), min(parts), max(parts)


def report_times(
    times: Times,
    labels: Sequence[str],
    rounds: int,
    *,
    benchmark: str,
    most: Mapping[str, float],
    facts: Mapping[str, Any],
) -> int:
    """Print every act's figures; return 1 if the worst ratio of a group exceeds `most`."""
    table = make_table(
        f"milliseconds, {rounds} times each",
        (
            "act",
            f"{labels[0]}: p50",
            "p95",
            f"{labels[1]}: p50",
            "p95",
            "ratio",
            "of stretches",
        ),
        left=("act",),
    )
    figures: dict[str, Any] = {}
    worst: dict[str, float] = defaultdict(float)
    for act in ACTS:
        for name, end in _lines(act):
            series = [[took[end] for took in times[act.name, place]] for place in (0, 1)]
            ratio, least, greatest = ratio_of(*series)
            figures_ms = [
                seconds * 1000
                for each in series
                for seconds in (statistics.median(each), percentile(each, 0.95))
            ]
            table.add_row(
                name,
                *(f"{value:.2f}" for value in figures_ms),
                f"{ratio:.2f}",
                f"{least:.2f} to {greatest:.2f}",
            )
            figures[name] = {"ms": figures_ms, "ratio": ratio}
            worst[act.group] = max(worst[act.group], ratio)
    show(table, width=WIDTH)
    figures |= {f"{group}_ratio": worst[group] for group in most}
    targets = [Target(f"{group}_ratio", "<=", limit) for group, limit in most.items()]
    of_run = {"rounds": rounds, "tenants": TENANTS, **facts}
    return report(benchmark, figures, targets, facts=of_run, digits=3)


def _lines(act: Act) -> list[tuple[str, int]]:
    """Return the lines of an act: a name, and which of the two times it tells."""
    if act.ends == "rollback":
        return [(act.name, 0)]
    if act.ends == "commit":
        return [(act.name, 0), (f"{act.name}, with its commit", 1)]
    return [(act.name, 1)]


def explain(queue: Queue) -> None:
    """Print the plan of every statement of every act, as executed.

    A statement of several acts is shown once, but for lists.
    """
    shown: set[tuple[str, str]] = set()
    for act in ACTS:
        statements = _statements_of(act, queue)
        with queue.app.connect() as connection:  # what the act wrote was rolled back: once more
            for statement, parameters in statements:
                query = f"EXPLAIN (ANALYZE, BUFFERS) {statement}"
                lines = connection.exec_driver_sql(query, parameters).scalars().all()
                # Another state may get another plan.
                key = (statement, act.name if act.group == "list" else "")
                if key not in shown:
                    shown.add(key)
                    head = " ".join(statement.split())[:300]
                    print(f"\n-- {act.name}\n-- {head}\n" + "\n".join(lines))
            connection.rollback()


def _statements_of(act: Act, queue: Queue) -> list[tuple[str, Any]]:
    """Run an act, and roll it back where it has no transactions of its own."""
    statements: list[tuple[str, Any]] = []

    def note(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        statements.append((statement, parameters))

    event.listen(queue.app, "before_cursor_execute", note)
    Act(act.name, act.group, act.do, "own" if act.ends == "own" else "rollback").run(queue)
    event.remove(queue.app, "before_cursor_execute", note)
    return statements
