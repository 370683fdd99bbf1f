"""Watch for a cloud's notice that this GPU machine will be taken away (preempted).

A notice is best effort everywhere: a machine may go without one, and then the lease expires. This
module decides nothing: the callback decides what to finish, save or give back in the seconds left.
"""

import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

import structlog

from edges.errors import wrap

log = structlog.get_logger(__name__)

# All three clouds answer here. An address, because a container's DNS may know no names.
LINK_LOCAL = "http://169.254.169.254"
_TIMEOUT_S = 2.0
_SLOW_FIRST_ANSWER_S = 10.0
_CLOSE_WITHIN_S = 1.0
_LARGEST_ANSWER_BYTES = 256 * 1024
# Date headers have whole seconds: at another poll the same end may look up to a second earlier.
_SAME_END_S = 1.0


class NoticeSourceUnavailable(Exception):
    """The source does not answer, or not as expected; ask again at the next poll."""


@dataclass(frozen=True)
class Notice:
    """Say that the machine goes `within_s` seconds after this is read."""

    source: str
    within_s: float
    detail: str


class NoticeSource(Protocol):
    """Ask one place where a notice may appear.

    One thread calls `poll`, and pauses `poll_every_s` between two calls.
    """

    name: str
    poll_every_s: float

    def poll(self) -> Notice | None:
        """Return the notice as it stands now; None if there is none. Repeats it at every poll.

        Raises NoticeSourceUnavailable.
        """


class NoticeWatch:
    """Poll every source in a thread of its own; call `on_notice` for the first notice.

    It is called again for a notice that names an earlier end, by one thread at a time, and should
    return soon. Nothing that a source or `on_notice` raises ends the watch.
    """

    def __init__(
        self, sources: Iterable[NoticeSource], on_notice: Callable[[Notice], None]
    ) -> None:
        self._on_notice = on_notice
        self._ends_at = math.inf  # time.monotonic() when the machine goes
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=[source], name=f"notices-{source.name}", daemon=True
            )
            for source in sources
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop calling `on_notice`. Waits up to a second for polls under way; drops longer ones."""
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_WITHIN_S
        for thread in self._threads:
            if thread is not threading.current_thread():  # on_notice may close the watch
                thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _run(self, source: NoticeSource) -> None:
        trouble = None
        while not self._stop.is_set():
            before, trouble = trouble, self._poll(source, trouble)
            if before and not trouble:
                log.info("notice_source_available", source=source.name)
            self._stop.wait(source.poll_every_s)

    def _poll(self, source: NoticeSource, known_trouble: str | None) -> str | None:
        """Poll the source once. Return what went wrong, None if nothing; log it when it is new."""
        try:
            notice = source.poll()
            if notice is not None:
                self._hear(notice, time.monotonic() + notice.within_s)
            return None
        except Exception as error:  # one unforeseen answer must not end the polling
            bug = None if isinstance(error, NoticeSourceUnavailable) else error
            trouble = repr(error) if bug else str(error)
            if trouble != known_trouble:
                log.warning(
                    "notice_source_unavailable", source=source.name, reason=trouble, exc_info=bug
                )
            return trouble

    def _hear(self, notice: Notice, ends_at: float) -> None:
        with self._lock:
            if self._stop.is_set() or ends_at >= self._ends_at - _SAME_END_S:
                return
            self._ends_at = ends_at
            log.warning(
                "notice_heard",
                source=notice.source,
                within_s=round(notice.within_s, 1),
                detail=notice.detail,
            )
            try:
                self._on_notice(notice)
            except Exception as error:
                log.error("notice_not_handled", source=notice.source, exc_info=error)


def sources_from(text: str) -> list[NoticeSource]:
    """Make the sources that a setting names, as "gcp,file:/run/darkroom/preempt"; none for "".

    Raises ValueError.
    """
    return [_source(entry.strip()) for entry in text.split(",") if entry.strip()]


def _source(entry: str) -> NoticeSource:
    match entry.partition(":"):
        case "aws", "", _:
            return AwsNotices()
        case "gcp", "", _:
            return GcpNotices()
        case "gcp", _, seconds if (within_s := _seconds(seconds)) is not None:
            return GcpNotices(within_s=within_s)
        case "azure", "", _:
            return AzureNotices()
        case "azure", _, instance if instance:
            return AzureNotices(instance=instance)
        case "file", _, path if path.startswith("/"):
            return FileNotices(path)
    accepted = "aws, gcp, gcp:SECONDS, azure, azure:INSTANCE and file:/PATH, separated by commas"
    raise ValueError(f"{entry!r} is no source of preemption notices; accepted are {accepted}")


class AwsNotices:
    """Read EC2's spot instance action, by IMDSv2: two minutes, best effort.

    For a container, the instance's metadata hop limit must be 2 or more; else the token never
    arrives and the source is unavailable.
    """

    name = "aws"
    poll_every_s = 5.0

    def __init__(self, base_url: str = LINK_LOCAL, *, token_ttl_s: int = 21600) -> None:
        self._server = _MetadataServer(base_url)
        self._token_ttl_s = token_ttl_s
        self._token: str | None = None
        self._renew_at = 0.0
        self._is_rebalance_logged = False

    def poll(self) -> Notice | None:
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer.status == 404:
            self._log_rebalance()
            return None
        action = answer.json().get("action")
        at = answer.json().get("time")
        if action not in ("terminate", "stop", "hibernate"):
            raise NoticeSourceUnavailable("instance-action: no action that we know")
        # Hibernation has no two minutes: it begins at once, whatever time is stated.
        within_s = 0.0 if action == "hibernate" else answer.seconds_until(at, or_else=120.0)
        return Notice(self.name, within_s, f"{action} at {at}")

    def _log_rebalance(self) -> None:
        """Log once that a rebalance is recommended: a higher risk, but the machine may stay."""
        if self._is_rebalance_logged:
            return
        with suppress(NoticeSourceUnavailable):
            answer = self._get("/latest/meta-data/events/recommendations/rebalance")
            if answer.status == 200:
                self._is_rebalance_logged = True
                log.info(
                    "rebalance_recommended",
                    source=self.name,
                    noticed_at=answer.json().get("noticeTime"),
                )

    def _get(self, path: str) -> "_Answer":
        answer = self._server.ask("GET", path, self._credentials(), expected=(200, 401, 404))
        # The token expired before `_renew_at`: the monotonic clock stops while a machine sleeps.
        if answer.status == 401:
            self._token = None
            answer = self._server.ask("GET", path, self._credentials(), expected=(200, 404))
        return answer

    def _credentials(self) -> dict[str, str]:
        if self._token is None or time.monotonic() >= self._renew_at:
            ttl_header = "X-aws-ec2-metadata-token-ttl-seconds"
            answer = self._server.ask(
                "PUT", "/latest/api/token", {ttl_header: str(self._token_ttl_s)}
            )
            ttl_s = _seconds(answer.headers.get(ttl_header)) or self._token_ttl_s
            self._token = answer.body.strip()
            self._renew_at = time.monotonic() + 0.9 * ttl_s
            if not (self._token.isascii() and self._token.isprintable()):
                self._token = None
                raise NoticeSourceUnavailable("token: not one that fits a header")
        return {"X-aws-ec2-metadata-token": self._token}


class GcpNotices:
    """Read Compute Engine's `preempted`: 30 s, best effort.

    The metadata server holds the request and answers the moment the value changes. Give a smaller
    `within_s` where less is left, as on GKE, which leaves ordinary pods about 15 s.
    """

    name = "gcp"
    poll_every_s = 1.0

    def __init__(
        self, base_url: str = LINK_LOCAL, *, within_s: float = 30.0, hold_s: int = 10
    ) -> None:
        self._server = _MetadataServer(base_url)
        self._within_s = within_s
        self._hold_s = hold_s
        self._etag = "0"  # of no value: the first answer comes at once

    def poll(self) -> Notice | None:
        """Return when the value has changed since the last poll, or after `hold_s`."""
        query = urlencode(
            {"wait_for_change": "true", "timeout_sec": self._hold_s, "last_etag": self._etag}
        )
        path = f"/computeMetadata/v1/instance/preempted?{query}"
        answer = self._server.ask(
            "GET", path, {"Metadata-Flavor": "Google"}, timeout_s=self._hold_s + _TIMEOUT_S
        )
        value = answer.body.strip()
        if answer.headers.get("Metadata-Flavor") != "Google" or value not in ("TRUE", "FALSE"):
            raise NoticeSourceUnavailable("preempted: not an answer of Google's metadata server")
        self._etag = answer.headers.get("ETag", "0")
        return Notice(self.name, self._within_s, "preempted") if value == "TRUE" else None


class AzureNotices:
    """Read Azure's scheduled events that delete a machine: 30 s or more, best effort.

    Machines of a scale set may see events of other machines, so there `instance` must name this
    one; without it every event counts. The first answer takes up to two minutes, in which the
    source is unavailable.
    """

    name = "azure"
    poll_every_s = 1.0

    def __init__(self, base_url: str = LINK_LOCAL, *, instance: str | None = None) -> None:
        self._server = _MetadataServer(base_url)
        self._instance = instance
        self._timeout_s = _SLOW_FIRST_ANSWER_S

    def poll(self) -> Notice | None:
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        answer = self._server.ask("GET", path, {"Metadata": "true"}, timeout_s=self._timeout_s)
        self._timeout_s = _TIMEOUT_S
        events = answer.json().get("Events")
        if not isinstance(events, list):
            raise NoticeSourceUnavailable("scheduledevents: no list of events")
        notices = [self._notice(event, answer) for event in events if self._takes_us(event)]
        return min(notices, key=lambda notice: notice.within_s, default=None)

    def _takes_us(self, event: dict[str, Any]) -> bool:
        if event.get("EventType") not in ("Preempt", "Terminate"):
            return False
        return self._instance is None or self._instance.lower() in [
            str(name).lower() for name in event.get("Resources") or ()
        ]

    def _notice(self, event: dict[str, Any], answer: "_Answer") -> Notice:
        not_before = event.get("NotBefore") or ""  # empty once the event has started
        within_s = 0.0 if not_before == "" else answer.seconds_until(not_before, or_else=30.0)
        detail = f"{event['EventType'].lower()} at {not_before or 'once'}"
        return Notice(self.name, within_s, detail)


class FileNotices:
    """Watch for a file to appear; operators, hosts and agents can write it.

    It holds the seconds left; empty or not a number means `default_s`. Write another file and
    rename it: the watch may read a half-written one.
    """

    name = "file"
    poll_every_s = 0.2

    def __init__(self, path: str | Path, *, default_s: float = 30.0) -> None:
        self._path = Path(path)
        self._default_s = default_s

    def poll(self) -> Notice | None:
        with wrap(OSError, _unavailable(self._path)):
            try:
                with self._path.open("rb") as file:
                    content = file.read(64)
            except FileNotFoundError:
                return None
        within_s = _seconds(content.decode(errors="replace"))
        if within_s is None:
            within_s = self._default_s
        return Notice(self.name, within_s, f"{self._path} appeared")


class SignalNotices:
    """Report what a signal handler or another thread announces.

    As in `signal.signal(SIGTERM, lambda *_: source.notify())`.
    """

    name = "signal"
    poll_every_s = 0.1

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._notified_at: float | None = None

    def notify(self) -> None:
        """Set a flag. Only the first call counts.

        It takes no lock, because a second signal may interrupt the handler of the first.
        """
        if self._notified_at is None:
            self._notified_at = time.monotonic()

    def poll(self) -> Notice | None:
        if self._notified_at is None:
            return None
        left_s = max(0.0, self._notified_at + self._within_s - time.monotonic())
        return Notice(self.name, left_s, "signalled")


class FakeNotices:
    """Stand in for a source in tests: each announcement is returned by one poll."""

    poll_every_s = 0.01

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self._announced: SimpleQueue[Notice] = SimpleQueue()

    def announce(self, within_s: float, detail: str = "announced") -> None:
        self._announced.put(Notice(self.name, within_s, detail))

    def poll(self) -> Notice | None:
        try:
            return self._announced.get_nowait()
        except Empty:
            return None


@dataclass(frozen=True)
class _Answer:
    """Hold a metadata server's answer. Times are measured by its clock; ours may be wrong."""

    status: int
    headers: Message
    body: str

    def json(self) -> dict[str, Any]:
        """Parse the body. Raises NoticeSourceUnavailable unless it is a JSON object."""
        with suppress(ValueError, RecursionError):
            said = json.loads(self.body)
            if isinstance(said, dict):
                return said
        raise NoticeSourceUnavailable("an answer that is no JSON object")

    def seconds_until(self, instant: object, *, or_else: float) -> float:
        """Return the seconds from this answer's Date to `instant`, 0 if that is past.

        `or_else` if either cannot be read.
        """
        end = _instant(instant)
        now = _instant(self.headers.get("Date"))
        return or_else if end is None or now is None else max(0.0, (end - now).total_seconds())


class _MetadataServer:
    """Send HTTP requests to a metadata server.

    By `http.client`, because it follows neither proxies nor redirects.
    """

    def __init__(self, base_url: str) -> None:
        self._netloc = urlsplit(base_url).netloc

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        *,
        expected: tuple[int, ...] = (200,),
        timeout_s: float | None = None,
    ) -> _Answer:
        """Send one request and return the answer.

        timeout_s: None means the usual one.

        Raises NoticeSourceUnavailable unless an `expected` status comes in time.
        """
        what = path.partition("?")[0].rpartition("/")[2]
        connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
        with closing(connection), wrap((OSError, http.client.HTTPException), _unavailable(what)):
            connection.connect()
            # only the answer may take longer
            connection.sock.settimeout(_TIMEOUT_S if timeout_s is None else timeout_s)
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = response.read(_LARGEST_ANSWER_BYTES + 1)
        if response.status not in expected:
            raise NoticeSourceUnavailable(f"{what}: HTTP {response.status}")
        if len(body) > _LARGEST_ANSWER_BYTES:
            raise NoticeSourceUnavailable(f"{what}: the answer is too long")
        return _Answer(response.status, response.headers, body.decode(errors="replace"))


def _unavailable(what: object) -> Callable[[Exception], NoticeSourceUnavailable]:
    """Make errors of the request and the error's kind alone, as the watch logs each new text."""
    return lambda error: NoticeSourceUnavailable(f"{what}: {type(error).__name__}")


def _instant(text: object) -> datetime | None:
    """Parse an instant of ISO 8601 or RFC 1123, in UTC where no zone is named; None if neither."""
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, OverflowError):
            instant = parse(str(text))
            return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    return None


def _seconds(text: str | None) -> float | None:
    """Parse a finite number that is not negative; None for anything else."""
    with suppress(ValueError):
        seconds = float(text or "")
        return seconds if 0 <= seconds < math.inf else None
    return None
