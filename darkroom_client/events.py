"""Read a job's server-sent events from bytes, over as many connections as needed. No I/O."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from darkroom_client import wire
from darkroom_client.answers import read_object
from darkroom_client.errors import UnexpectedAnswer, Unreachable
from darkroom_client.retries import Retries, is_hopeless, is_passing, retry_after_s


@dataclass(frozen=True)
class Event:
    """One event of a job.

    kind: queued, started, step, preview, stored, final, or a kind that a later version adds.
    """

    id: str | None
    kind: str
    data: Mapping[str, Any]

    @property
    def is_final(self) -> bool:
        """Tell whether this is the job's last event."""
        return self.kind == "final"


class EventStream:
    """One job's stream: which request comes next, what its bytes say, and whether all is told."""

    def __init__(self, job_id: str, *, previews: bool, after: str | None, retries: Retries) -> None:
        self.is_over = False
        self._job_id = job_id
        self._previews = previews
        self._last_id = after
        self._retries = retries
        self._tries = 0  # since anything came
        self._rest = b""
        self._id = after
        self._kind = ""
        self._data = list[str]()

    def call(self) -> wire.ApiRequest:
        """Return the next connection's request, which resumes after the last event seen."""
        self._tries += 1
        self._rest = b""
        self._kind = ""
        self._data = []
        return wire.follow_job(self._job_id, previews=self._previews, after=self._last_id)

    def refused(self, answer: httpx.Response) -> float:
        """Return the seconds to wait before the next try, after an answer that is no event stream.

        The answer has been read already. Raises ProblemError or UnexpectedAnswer where no try is
        left.
        """
        pause_s = (
            self._retries.pause_s(self._tries, retry_after_s(answer))
            if is_passing(answer)
            else None
        )
        if pause_s is None:
            read_object(answer)
            raise UnexpectedAnswer(
                f"{answer.request.url} answered {answer.status_code} "
                "with something that is not an event stream"
            )
        return pause_s

    def ended(self, error: httpx.TransportError | None = None) -> float:
        """Return the seconds to wait before the next connection, after one that broke or ended.

        Raises Unreachable where no try is left.
        """
        pause_s = None if error and is_hopeless(error) else self._retries.pause_s(self._tries)
        if pause_s is None:
            why = str(error or "") or (type(error).__name__ if error else "the stream ended early")
            raise Unreachable(
                f"the events of job {self._job_id} cannot be read, after {self._tries} tries: {why}"
            ) from error
        return pause_s

    def read(self, content: bytes) -> Iterator[Event]:
        """Iterate over the events that are complete with these bytes."""
        self._tries = 0  # somebody is there: a heartbeat is an answer too
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            event = self._read_line(line.removesuffix(b"\r").decode(errors="replace"))
            if event is not None:
                self._last_id = event.id
                self.is_over = event.is_final
                yield event
                if self.is_over:
                    return

    def _read_line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id" and "\x00" not in value:
            self._id = value
        return None  # a comment is a heartbeat; `retry` is ours to know

    def _dispatch(self) -> Event | None:
        kind = self._kind
        text = "\n".join(self._data)
        self._kind = ""
        self._data = []
        try:
            data = json.loads(text)
        except ValueError:
            return None
        return Event(self._id, kind or "message", data) if isinstance(data, dict) else None


def is_stream(answer: httpx.Response) -> bool:
    """Tell whether the answer is an event stream."""
    return answer.is_success and answer.headers.get("Content-Type", "").startswith(
        "text/event-stream"
    )
