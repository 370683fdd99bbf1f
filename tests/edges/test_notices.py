"""How a worker hears that its machine goes.

Each cloud's metadata service, files and signals, told once by one watch.
"""

import json
import signal
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from urllib.parse import parse_qs, urlsplit

import pytest
from structlog.testing import capture_logs

from edges import notices
from edges.notices import (
    AwsNotices,
    AzureNotices,
    FakeNotices,
    FileNotices,
    GcpNotices,
    NoticeSourceUnavailable,
    NoticeWatch,
    SignalNotices,
    sources_from,
)
from tests.builders import a_closed_port, until


class Metadata:
    """A metadata service on 127.0.0.1, whose clock is an hour ahead of ours.

    What it says is `answer`: here 404, for each cloud its own.
    """

    def __init__(self, port=0):
        self.asked = []  # "METHOD path" of every request
        self.may_answer = threading.Event()
        self.may_answer.set()
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                metadata.asked.append(f"{self.command} {urlsplit(self.path).path}")
                metadata.may_answer.wait(60)
                query = {
                    name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()
                }
                status, headers, body = metadata.answer(
                    self.command, urlsplit(self.path).path, query, self.headers
                )
                with suppress(ConnectionError):  # who asked may have heard enough
                    self.send_response(status)  # and the Date
                    for name, value in {"Content-Length": len(body), **headers}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(body.encode())

            do_PUT = do_GET

            def date_time_string(self, timestamp=None):
                return metadata.date()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def now(self):
        return datetime.now(UTC) + timedelta(hours=1)

    def date(self):
        return format_datetime(self.now(), usegmt=True)

    def answer(self, method, path, query, headers):
        return 404, {}, ""

    def close(self):
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()


class AwsMetadata(Metadata):
    """IMDSv2 alone: without a token that it still knows, 401."""

    def __init__(self, port=0):
        super().__init__(port)
        self.tokens = []
        self.ttl_s = 21600
        self.documents = {}  # by the last part of their path; 404 until set

    def answer(self, method, path, query, headers):
        if (method, path) == ("PUT", "/latest/api/token"):
            if "X-aws-ec2-metadata-token-ttl-seconds" not in headers:
                return 400, {}, ""
            self.tokens.append(f"token-{len(self.asked)}")
            return 200, {"X-aws-ec2-metadata-token-ttl-seconds": self.ttl_s}, self.tokens[-1]
        if headers["X-aws-ec2-metadata-token"] not in self.tokens:
            return 401, {}, ""
        document = self.documents.get(path.rpartition("/")[2])
        return (404, {}, "not found") if document is None else (200, {}, document)

    def interrupt(self, action="terminate", **said):
        self.documents["instance-action"] = json.dumps({"action": action, **said})

    def in_s(self, seconds):
        return (self.now() + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


class GcpMetadata(Metadata):
    """Holds an answer until the value is another than the one whose ETag is sent."""

    flavor = "Google"

    def __init__(self):
        super().__init__()
        self.value, self._changed = "FALSE", threading.Condition()
        self.second_s = 1.0
        self.held_for = []  # the "timeout_sec" of every request whose answer was held

    def answer(self, method, path, query, headers):
        if headers["Metadata-Flavor"] != "Google":
            return 403, {}, ""
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, {}, ""
        if query.get("wait_for_change") == "true":
            with self._changed:
                if self._etag() == query.get("last_etag"):
                    self.held_for.append(query["timeout_sec"])
                self._changed.wait_for(
                    lambda: self._etag() != query.get("last_etag"),
                    timeout=self.second_s * float(query["timeout_sec"]),
                )
        return 200, {"Metadata-Flavor": self.flavor, "ETag": self._etag()}, self.value + "\n"

    def preempt(self):
        with self._changed:
            self.value = "TRUE"
            self._changed.notify_all()

    def _etag(self):
        return f"etag-{self.value}"


class AzureMetadata(Metadata):
    def __init__(self):
        super().__init__()
        self.events = []

    def answer(self, method, path, query, headers):
        if headers["Metadata"] != "true" or query.get("api-version") != "2020-07-01":
            return 400, {}, ""
        return 200, {}, json.dumps({"DocumentIncarnation": 1, "Events": self.events})

    def schedule(self, event_type="Preempt", resources=("vm_0",), not_before=""):
        self.events.append(
            {
                "EventId": "7",
                "EventType": event_type,
                "Resources": list(resources),
                "NotBefore": not_before,
            }
        )

    def in_s(self, seconds):
        return format_datetime(self.now() + timedelta(seconds=seconds), usegmt=True)


def served(service):
    @pytest.fixture
    def fixture():
        metadata = service()
        yield metadata
        metadata.close()

    return fixture


metadata, aws, gcp, azure = (
    served(Metadata),
    served(AwsMetadata),
    served(GcpMetadata),
    served(AzureMetadata),
)


@pytest.fixture
def watch():
    """Start a watch over sources, which are polled often: `heard = watch(*sources)`.

    What it tells is in the queue.
    """
    watches = []

    def watch(*sources):
        heard = SimpleQueue()
        for source in sources:
            source.poll_every_s = 0.01
        watches.append(NoticeWatch(sources, heard.put))
        return heard

    yield watch
    for each in watches:
        each.close()


class Moody(FakeNotices):
    """A fake that raises what it is told to, and counts its polls."""

    mood, polls = None, 0

    def poll(self):
        self.polls += 1
        if self.mood is not None:
            raise self.mood
        return super().poll()

    def polled_again(self):
        """Wait until what is so now has been seen by a poll."""
        seen = self.polls
        until(lambda: self.polls > seen + 1, within_s=60)


def nothing(heard):
    with pytest.raises(Empty):
        heard.get(timeout=0.1)
    return True


# AWS


def test_aws_has_no_notice_until_an_action_is_set(aws):
    source = AwsNotices(aws.url)
    assert source.poll() is None

    aws.interrupt("terminate", time=(at := aws.in_s(120)))

    notice = source.poll()
    assert (notice.source, notice.detail) == ("aws", f"terminate at {at}")


def test_aws_s_time_is_read_by_aws_s_own_clock(aws):
    aws.interrupt("stop", time=aws.in_s(90))

    assert AwsNotices(aws.url).poll().within_s == pytest.approx(90, abs=2)


@pytest.mark.parametrize("said", [{}, {"time": "soon"}, {"time": None}, {"time": 7}])
def test_aws_without_a_time_that_can_be_read_means_two_minutes(aws, said):
    aws.interrupt("terminate", **said)

    assert AwsNotices(aws.url).poll().within_s == 120


def test_a_time_that_is_past_leaves_no_seconds(aws):
    aws.interrupt("terminate", time=aws.in_s(-30))

    assert AwsNotices(aws.url).poll().within_s == 0


def test_hibernation_begins_at_once(aws):
    aws.interrupt("hibernate", time=aws.in_s(120))

    assert AwsNotices(aws.url).poll().within_s == 0


def test_one_aws_token_serves_many_polls(aws):
    source = AwsNotices(aws.url)

    for _ in range(3):
        source.poll()

    assert len(aws.tokens) == 1


def test_an_aws_token_is_renewed_before_it_expires(aws):
    aws.ttl_s = 0.1
    source = AwsNotices(aws.url)
    source.poll()
    first = list(aws.tokens)

    time.sleep(0.1)
    source.poll()

    assert len(aws.tokens) > len(first)


def test_an_aws_token_that_is_refused_is_renewed_within_the_poll(aws):
    source = AwsNotices(aws.url)
    source.poll()
    aws.tokens.clear()
    aws.interrupt("terminate")

    assert source.poll().within_s == 120


def test_a_page_in_place_of_a_token_is_sent_to_nobody(metadata):
    metadata.answer = lambda *_: (200, {}, "<html>\n<h1>Welcome</h1>\n</html>")

    with pytest.raises(NoticeSourceUnavailable, match="token"):
        AwsNotices(metadata.url).poll()

    assert metadata.asked == ["PUT /latest/api/token"]


def test_aws_s_rebalance_recommendation_is_logged_once_and_no_notice(aws):
    aws.documents["rebalance"] = json.dumps({"noticeTime": "2026-01-01T00:00:00Z"})
    source = AwsNotices(aws.url)

    with capture_logs() as logs:
        assert [source.poll() for _ in range(3)] == [None] * 3

    assert [entry["event"] for entry in logs if "rebalance" in entry["event"]] == [
        "rebalance_recommended"
    ]


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", "terminate", '{"action": "noop"}', "[" * 100_000]
)
def test_an_answer_that_aws_never_gives_is_no_notice(aws, document):
    aws.documents["instance-action"] = document

    with pytest.raises(NoticeSourceUnavailable):
        AwsNotices(aws.url).poll()


# Google


def test_gcp_tells_at_the_moment_of_preemption(gcp, watch):
    heard = watch(GcpNotices(gcp.url, hold_s=600))
    until(lambda: gcp.held_for, within_s=60, what="the held question")
    assert nothing(heard)
    assert gcp.held_for == ["600"]

    gcp.preempt()

    notice = heard.get(timeout=60)
    assert (notice.source, notice.within_s) == ("gcp", 30)


def test_a_preemption_between_two_polls_of_gcp_is_not_missed(gcp):
    source = GcpNotices(gcp.url, within_s=15)
    assert source.poll() is None

    gcp.preempt()

    assert source.poll().within_s == 15
    assert gcp.held_for == []


def test_gcp_holds_its_answer_no_longer_than_it_is_asked_to(gcp):
    gcp.second_s = 0.01
    source = GcpNotices(gcp.url, hold_s=7)
    source.poll()

    assert source.poll() is None
    assert gcp.held_for == ["7"]


@pytest.mark.parametrize(
    ("flavor", "value"), [("", "TRUE"), ("Vanilla", "TRUE"), ("Google", "<html>")]
)
def test_a_server_that_is_not_google_s_metadata_server_is_not_believed(gcp, flavor, value):
    gcp.flavor, gcp.value = flavor, value

    with pytest.raises(NoticeSourceUnavailable):
        GcpNotices(gcp.url).poll()


# Azure


@pytest.mark.parametrize("event_type", ["Preempt", "Terminate"])
def test_azure_s_time_is_read_by_azure_s_own_clock(azure, event_type):
    source = AzureNotices(azure.url)
    assert source.poll() is None

    azure.schedule(event_type, not_before=(at := azure.in_s(40)))

    notice = source.poll()
    assert notice.within_s == pytest.approx(40, abs=2)
    assert (notice.source, notice.detail) == ("azure", f"{event_type.lower()} at {at}")


@pytest.mark.parametrize("event_type", ["Reboot", "Redeploy", "Freeze"])
def test_azure_events_that_leave_us_the_machine_are_no_notice(azure, event_type):
    azure.schedule(event_type)

    assert AzureNotices(azure.url).poll() is None


def test_an_azure_event_that_has_started_leaves_no_seconds(azure):
    azure.schedule(not_before="")

    assert AzureNotices(azure.url).poll().within_s == 0


def test_an_azure_time_that_cannot_be_read_means_thirty_seconds(azure):
    azure.schedule(not_before="soon")

    assert AzureNotices(azure.url).poll().within_s == 30


def test_azure_s_notice_is_for_the_instance_it_names(azure):
    azure.schedule(resources=["vm_1", "vm_2"])

    assert AzureNotices(azure.url, instance="vm_0").poll() is None
    assert AzureNotices(azure.url, instance="VM_2").poll() is not None


def test_of_several_azure_events_the_earliest_counts(azure):
    azure.schedule(not_before=azure.in_s(300))
    azure.schedule(not_before=azure.in_s(60))

    assert AzureNotices(azure.url).poll().within_s == pytest.approx(60, abs=2)


def test_only_azure_s_first_answer_may_be_slow(azure, monkeypatch):
    monkeypatch.setattr(notices, "_TIMEOUT_S", 0.1)
    azure.may_answer.clear()
    source = AzureNotices(azure.url)
    threading.Timer(0.3, azure.may_answer.set).start()
    assert source.poll() is None

    azure.may_answer.clear()
    with pytest.raises(NoticeSourceUnavailable):
        source.poll()


# Any metadata server

EVERY_CLOUD = pytest.mark.parametrize("cloud", [AwsNotices, GcpNotices, AzureNotices])


@EVERY_CLOUD
def test_no_cloud_is_asked_through_a_proxy(cloud, metadata, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{a_closed_port()}")

    with pytest.raises(NoticeSourceUnavailable, match="HTTP 404"):
        cloud(metadata.url).poll()


@EVERY_CLOUD
def test_no_cloud_is_followed_elsewhere(cloud, metadata, aws):
    metadata.answer = lambda *_: (302, {"Location": aws.url}, "")

    with pytest.raises(NoticeSourceUnavailable, match="HTTP 302"):
        cloud(metadata.url).poll()

    assert aws.asked == []


@EVERY_CLOUD
def test_an_answer_without_end_is_not_read_to_its_end(cloud, metadata):
    metadata.answer = lambda *_: (200, {"Metadata-Flavor": "Google"}, "x" * 300_000)

    with pytest.raises(NoticeSourceUnavailable, match="too long"):
        cloud(metadata.url).poll()


@EVERY_CLOUD
def test_where_nobody_answers_the_source_is_unavailable(cloud):
    with pytest.raises(NoticeSourceUnavailable, match="ConnectionRefusedError"):
        cloud(f"http://127.0.0.1:{a_closed_port()}").poll()


def test_a_silent_server_is_waited_for_two_seconds(aws, monkeypatch):
    assert notices._TIMEOUT_S == 2
    monkeypatch.setattr(notices, "_TIMEOUT_S", 0.1)
    aws.may_answer.clear()

    with pytest.raises(NoticeSourceUnavailable, match="TimeoutError"):
        AwsNotices(aws.url).poll()


# Files and signals


@pytest.mark.parametrize(
    ("content", "within_s"),
    [("", 45), ("300", 300), ("12.5\n", 12.5), ("0", 0), ("soon", 45), ("-1", 45), ("nan", 45)],
)
def test_a_file_that_appears_is_a_notice(tmp_path, content, within_s):
    source = FileNotices(tmp_path / "preempt", default_s=45)
    assert source.poll() is None

    (tmp_path / "preempt").write_text(content)

    notice = source.poll()
    assert (notice.source, notice.within_s, notice.detail) == (
        "file",
        within_s,
        f"{tmp_path / 'preempt'} appeared",
    )


def test_a_file_that_cannot_be_read_makes_the_source_unavailable(tmp_path):
    with pytest.raises(NoticeSourceUnavailable, match="IsADirectoryError"):
        FileNotices(tmp_path).poll()


def test_a_file_that_stays_is_told_once_and_again_if_fewer_seconds_are_left(tmp_path, watch):
    path = tmp_path / "preempt"
    heard = watch(FileNotices(path))
    path.write_text("300")
    assert heard.get(timeout=60).within_s == 300
    assert nothing(heard)

    path.with_suffix(".new").write_text("20")
    path.with_suffix(".new").rename(path)

    assert heard.get(timeout=60).within_s == 20


def test_a_signal_is_a_notice(watch):
    source = SignalNotices(within_s=500)
    heard = watch(source)
    before = signal.signal(signal.SIGUSR1, lambda *_: source.notify())
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)

    notice = heard.get(timeout=60)
    assert (notice.source, notice.within_s) == ("signal", pytest.approx(500, abs=60))


def test_the_first_signal_counts(watch):
    source = SignalNotices(within_s=5)
    assert source.poll() is None

    source.notify()
    time.sleep(0.05)
    source.notify()

    assert source.poll().within_s < 4.96


# The watch


def test_a_notice_is_told_once(watch):
    fake = FakeNotices()
    heard = watch(fake)

    fake.announce(120, "terminate")
    fake.announce(120, "terminate")

    assert heard.get(timeout=60) == notices.Notice("fake", 120, "terminate")
    assert nothing(heard)


def test_an_earlier_end_is_told_too_whoever_tells_it(watch):
    slow, quick = FakeNotices("slow"), FakeNotices("quick")
    heard = watch(slow, quick)

    slow.announce(120)
    assert heard.get(timeout=60).source == "slow"
    quick.announce(10)
    assert heard.get(timeout=60).source == "quick"


def test_a_later_end_is_not_told(watch):
    fake, other = FakeNotices(), FakeNotices("other")
    heard = watch(fake, other)
    fake.announce(10)
    heard.get(timeout=60)

    other.announce(120)
    fake.announce(9.5)  # the same end, by a clock that shows whole seconds

    assert nothing(heard)


def test_a_source_that_is_unavailable_and_then_comes_is_heard(watch):
    port = a_closed_port()
    heard = watch(AwsNotices(f"http://127.0.0.1:{port}"))
    assert nothing(heard)

    aws = AwsMetadata(port)
    aws.interrupt("terminate")

    assert heard.get(timeout=60).source == "aws"
    aws.close()


def test_trouble_is_logged_when_it_changes_and_not_at_every_poll(watch):
    source = Moody()
    with capture_logs() as logs:
        source.mood = NoticeSourceUnavailable("refused")
        watch(source)
        source.polled_again()
        source.mood = NoticeSourceUnavailable("timeout")
        source.polled_again()
        source.mood = None
        source.polled_again()

    # not what other threads log meanwhile
    about_sources = [entry for entry in logs if entry["event"].startswith("notice_source")]
    assert [(entry["event"], entry.get("reason")) for entry in about_sources] == [
        ("notice_source_unavailable", "refused"),
        ("notice_source_unavailable", "timeout"),
        ("notice_source_available", None),
    ]


def test_whatever_a_source_raises_it_is_asked_again(watch):
    source, other = Moody(), FakeNotices("other")
    source.mood = ZeroDivisionError("a bug")
    heard = watch(source, other)
    source.polled_again()

    other.announce(120)
    assert heard.get(timeout=60).source == "other"
    source.mood = None
    source.announce(10)
    assert heard.get(timeout=60).source == "fake"


def test_a_listener_that_fails_hears_the_next_notice():
    heard, fake = SimpleQueue(), FakeNotices()

    def listener(notice):
        heard.put(notice)
        raise ZeroDivisionError

    watch = NoticeWatch([fake], listener)
    fake.announce(120)
    fake.announce(10)

    assert [heard.get(timeout=60).within_s for _ in range(2)] == [120, 10]
    watch.close()


def test_a_closed_watch_tells_nothing(gcp, monkeypatch):
    assert notices._CLOSE_WITHIN_S == 1
    monkeypatch.setattr(notices, "_CLOSE_WITHIN_S", 0.05)
    heard, fake, held = SimpleQueue(), FakeNotices(), GcpNotices(gcp.url, hold_s=60)
    held.poll_every_s = 0.01
    closed = NoticeWatch([fake, held], heard.put)
    until(lambda: gcp.held_for, within_s=60, what="the held question")
    started = time.monotonic()

    closed.close()
    assert time.monotonic() - started < 30  # though the metadata server holds its answer longer
    fake.announce(10)
    gcp.preempt()

    assert nothing(heard)


def test_a_listener_may_close_the_watch():
    closed, fake = threading.Event(), FakeNotices()

    def listener(notice):
        watch.close()
        closed.set()

    watch = NoticeWatch([fake], listener)
    fake.announce(10)

    assert closed.wait(60)


def test_without_sources_there_is_nothing_to_watch():
    NoticeWatch([], print).close()


# The setting


def test_a_setting_names_the_sources():
    sources = sources_from("aws, gcp:15,azure:vm_0,file:/run/darkroom/preempt")

    assert [source.name for source in sources] == ["aws", "gcp", "azure", "file"]
    assert sources_from("") == sources_from(" ") == []


@pytest.mark.parametrize(
    "text",
    [
        "amazon",
        "aws:now",
        "aws,,fake",
        "gcp:",
        "gcp:soon",
        "gcp:-1",
        "azure:",
        "file",
        "file:here",
        "signal",
    ],
)
def test_a_setting_that_names_no_source_says_which_there_are(text):
    with pytest.raises(
        ValueError,
        match=r"accepted are aws, gcp, gcp:SECONDS, azure, azure:INSTANCE and file:/PATH",
    ):
        sources_from(text)
