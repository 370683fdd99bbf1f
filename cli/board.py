"""Show the progress of many jobs.

On a terminal it draws a live table of the jobs under way; elsewhere it prints a line for each job
that ended.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli import screen
from cli.prompts import PromptLine
from cli.watching import WatchedJob

_PROMPT_CHARS = 40


class Board:
    """Show one run of `total` lines of a file of prompts."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._failed = 0
        self._images = 0
        self._began = time.monotonic()
        self._rows: dict[int, tuple[PromptLine, WatchedJob]] = {}
        self._waiting = ""
        self._console = screen.err()
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=8, transient=True
        )

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, line: PromptLine, watched_job: WatchedJob) -> None:
        """Show a job under way."""
        self._rows[line.number] = (line, watched_job)
        self._waiting = ""

    def wait(self, why: str) -> None:
        """Show why no job is accepted for now."""
        if why != self._waiting and not self._console.is_terminal:
            self._console.print(why, soft_wrap=True, markup=False)
        self._waiting = why

    def end(
        self,
        line: PromptLine,
        state: str,
        *,
        paths: Sequence[Path] = (),
        new: int = 0,
        why: str | None = None,
    ) -> None:
        """Show that a line ended; `new` of its images were fetched in this run."""
        self._rows.pop(line.number, None)
        self._done += 1
        self._images += new
        self._failed += state != "succeeded"
        if state != "succeeded":
            text = Text(f"line {line.number}: {state}" + (f": {why}" if why else ""), style="red")
        elif new:
            text = Text(f"line {line.number}: {' '.join(map(str, paths))}")
        else:
            return
        head = "" if self._console.is_terminal else f"{self._done}/{self._total} "
        self._console.print(Text(head) + text, soft_wrap=True)

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for line, watched_job in sorted(self._rows.values(), key=lambda row: row[0].number):
            prompt = " ".join(line.prompt.split())
            shown = prompt if len(prompt) <= _PROMPT_CHARS else f"{prompt[: _PROMPT_CHARS - 1]}…"
            bar = ProgressBar(
                total=max(1, watched_job.steps_to_do), completed=watched_job.done, width=16
            )
            table.add_row(
                Text(str(line.number), style="dim"),
                Text(shown, no_wrap=True),
                bar,
                Text(watched_job.words, no_wrap=True),
            )
        return Group(table, Text(self._totals(), style="bold"))

    def _totals(self) -> str:
        spent_s = time.monotonic() - self._began
        parts = [f"{self._done} of {self._total} done", f"{len(self._rows)} under way"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._images:
            parts.append(f"{self._images / spent_s:.1f} images/s")
        parts.append(f"{int(spent_s) // 60}:{int(spent_s) % 60:02}")
        if self._waiting:
            parts.append(self._waiting)
        return " · ".join(parts)
