"""Define `trace`: draw where a job's time went."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from cli import screen
from cli.installation import Installation, pass_installation
from models import traces
from models.traces import Span, Trace

BAR_COLUMNS = 40


@click.command()
@click.argument("job_id", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="Print the spans as a JSON object.")
@pass_installation
@click.pass_context
def trace(ctx: click.Context, installation: Installation, job_id: uuid.UUID, as_json: bool) -> None:
    """Show where the time of a job of any tenant went.

    Its waits, attempts, images and webhooks, each with its start and length, on one axis. All of it
    is read from Postgres, so it is there also after processes were killed.
    """
    with installation.transaction() as session:
        found = traces.of_job(session, job_id)
    if found is None:
        screen.complain(f"There is no job {job_id}.")
        ctx.exit(4)
    if as_json:
        screen.print_json(_document(found))
    else:
        screen.out().print(_waterfall(found.spans, now=datetime.now(UTC)))
        _print_request(found)


def _print_request(found: Trace) -> None:
    told = {"request": found.request_id, "traceparent": found.traceparent}
    for name, value in told.items():
        if value is not None:
            screen.err().print(f"{name} {value}", style="dim")


def _document(found: Trace) -> dict[str, Any]:
    return {
        "job_id": str(found.job_id),
        "request_id": found.request_id,
        "traceparent": found.traceparent,
        "spans": [
            {
                "name": span.name,
                "depth": span.depth,
                "start": span.start.isoformat(),
                "end": span.end.isoformat() if span.end is not None else None,
                **span.facts,
            }
            for span in found.spans
        ],
    }


def _waterfall(spans: Sequence[Span], *, now: datetime) -> Table:
    """Draw each span as a bar on the axis from the first start to the last end."""
    begin = min(span.start for span in spans)
    until = max(span.end or now for span in spans)
    whole_s = max((until - begin).total_seconds(), 1e-6)
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading, justify in (("", "left"), ("at s", "right"), ("took s", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("", width=BAR_COLUMNS, no_wrap=True)
    table.add_column("", overflow="fold")
    for span in spans:
        at_s = (span.start - begin).total_seconds()
        took_s = ((span.end or now) - span.start).total_seconds()
        table.add_row(
            "  " * span.depth + span.name,
            f"{at_s:.3f}",
            f"{took_s:.3f}" + ("" if span.end is not None else " …"),
            _bar(at_s / whole_s, took_s / whole_s),
            Text(" ".join(f"{name}={value}" for name, value in span.facts.items()), style="dim"),
        )
    return table


def _bar(at: float, part: float) -> Text:
    """Draw a span that begins at `at` of the axis and takes `part` of it; at least one column."""
    first = min(BAR_COLUMNS - 1, int(at * BAR_COLUMNS))
    columns = max(1, min(BAR_COLUMNS - first, round(part * BAR_COLUMNS)))
    return Text(" " * first + "█" * columns, style="cyan")
