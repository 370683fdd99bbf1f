"""Keep the state of every line of a file of prompts, in a file beside the images.

A second run continues where the first one ended.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom_client import downloads

NAME = ".darkroom-run.json"
_WRITE_EVERY_S = 0.5


class AnotherRun(Exception):
    """Report that the folder holds images of other prompts, or of other options."""


class Run:
    """Hold one run, over as many processes as it takes.

    A line's facts are `job` (its id), `state`, `tries` and `why`.
    """

    def __init__(
        self, folder: Path, head: Mapping[str, Any], lines: Mapping[str, dict[str, Any]]
    ) -> None:
        self.path = folder / NAME
        self._head = head
        self._lines = dict(lines)
        self._written_at = 0.0

    @classmethod
    def opened(
        cls, folder: Path, *, source: bytes, options: Mapping[str, Any], fresh: bool
    ) -> "Run":
        """Open the run that `folder` holds, or a new one. Raises AnotherRun."""
        about = {"source_sha256": hashlib.sha256(source).hexdigest(), "options": dict(options)}
        try:
            known = {} if fresh else json.loads((folder / NAME).read_text())
        except FileNotFoundError:
            known = {}
        if not known:
            run = cls(folder, {"version": 1, "run": uuid.uuid4().hex, **about}, {})
            run.save()  # before anything is asked for: the keys depend on it
            return run
        if {name: known.get(name) for name in about} != about:
            raise AnotherRun(
                f"{folder} holds a run of other prompts or options; "
                "choose another folder with -o, or begin anew with --fresh."
            )
        return cls(
            folder, {name: known[name] for name in ("version", "run", *about)}, known["lines"]
        )

    def of(self, number: int) -> dict[str, Any]:
        """Return the facts of a line."""
        return self._lines.get(str(number), {})

    def note(self, number: int, **facts: Any) -> None:
        """Add facts to a line; write them if the last write is half a second old, or at `save`.

        If a crash loses them, the idempotency keys find the same jobs again.
        """
        self._lines[str(number)] = {**self.of(number), **facts}
        if time.monotonic() - self._written_at > _WRITE_EVERY_S:
            self.save()

    def begin_again(self, number: int) -> None:
        """Forget the line's job, so that the line asks for another one."""
        self.note(number, job=None, state=None, why=None, tries=self.of(number).get("tries", 0) + 1)

    def key(self, number: int) -> str:
        """Return a line's Idempotency-Key; it stays the same in this run until `begin_again`."""
        facts = (
            self._head["run"],
            self._head["source_sha256"],
            self._head["options"],
            number,
            self.of(number).get("tries", 0),
        )
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def save(self) -> None:
        """Write the run's file atomically."""
        downloads.write(
            self.path, json.dumps({**self._head, "lines": self._lines}, indent=1).encode()
        )
        self._written_at = time.monotonic()
