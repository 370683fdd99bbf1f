"""What became of every line of a file of prompts, kept in a file beside the images: a second run goes on where the first one ended."""

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
    """The folder holds the images of other prompts, or of the same with other options."""


class Run:
    """One run, over as many processes as it takes. A line's facts: `job` (its id), `state`, `tries`, `why`."""

    def __init__(
        self, folder: Path, head: Mapping[str, Any], lines: Mapping[str, dict[str, Any]]
    ) -> None:
        self.path, self._head, self._lines = folder / NAME, head, dict(lines)
        self._written_at = 0.0

    @classmethod
    def opened(
        cls, folder: Path, *, source: bytes, options: Mapping[str, Any], fresh: bool
    ) -> "Run":
        """The run that `folder` holds, or a new one. Raises AnotherRun."""
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
                f"{folder} holds a run of other prompts or options; choose another folder with -o, or begin anew with --fresh."
            )
        return cls(
            folder, {name: known[name] for name in ("version", "run", *about)}, known["lines"]
        )

    def of(self, number: int) -> dict[str, Any]:
        """What is known of a line."""
        return self._lines.get(str(number), {})

    def note(self, number: int, **facts: Any) -> None:
        """Remember; written within half a second, and at `save`. What a crash in between forgets, the idempotency keys know."""
        self._lines[str(number)] = {**self.of(number), **facts}
        if time.monotonic() - self._written_at > _WRITE_EVERY_S:
            self.save()

    def begin_again(self, number: int) -> None:
        """Forget the line's job: it asks for another one."""
        self.note(number, job=None, state=None, why=None, tries=self.of(number).get("tries", 0) + 1)

    def key(self, number: int) -> str:
        """The Idempotency-Key of a line: the same in every process of this run until it begins again."""
        facts = (
            self._head["run"],
            self._head["source_sha256"],
            self._head["options"],
            number,
            self.of(number).get("tries", 0),
        )
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def save(self) -> None:
        """Write it: whole, or not at all."""
        downloads.write(
            self.path, json.dumps({**self._head, "lines": self._lines}, indent=1).encode()
        )
        self._written_at = time.monotonic()
