"""Requests to addresses that tenants choose.

What is never connected to, and how long anything may take.
"""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import edges.outbound
from edges.outbound import MAX_URL_CHARS, Outbound, Unreachable

PRIVATE = [
    "https://127.0.0.1/",
    "https://10.0.0.8/",
    "https://192.168.1.1/",
    "https://172.16.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[fe80::1]/",
    "https://[fc00::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://224.0.0.1/",
    "https://127.1/",
    "https://0x7f000001/",
    "https://2130706433/",
    "https://0177.0.0.1/",
]


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers)))
        if self.path == "/hang":
            time.sleep(3)
        if self.path == "/drip":
            self.drip()
            return
        status = {"/away": 503, "/redirect": 302}.get(self.path, 204)
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "17")
        if status == 302:
            self.send_header("Location", "http://169.254.169.254/")
        self.end_headers()

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        body = b"x" * (10_000 if self.path == "/large" else 100)
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        try:
            for number in range(100):
                self.wfile.write(b"X-%d: y\r\n" % number)
                time.sleep(0.1)
        except OSError:
            return

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.daemon_threads = True
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(receiver):
    receiver.seen.clear()
    return f"http://127.0.0.1:{receiver.server_port}"


@pytest.mark.parametrize("url", PRIVATE)
def test_a_private_address_is_refused_however_it_is_written(url):
    outbound = Outbound("")

    assert outbound.refusal(url) == "must not point to a private address"
    with pytest.raises(Unreachable):
        outbound.post(url, b"{}", {}, timeout_s=2)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "must be an https URL"),
        ("ftp://example.com/", "must be an https URL"),
        ("file:///etc/passwd", "must be an https URL"),
        ("https://", "must be an https URL"),
        ("https://user:secret@example.com/", "must not carry a user or password"),
        ("https://example.com:22/", "must use port 443 or 8443"),
        ("https://example.com:port/", "is not a URL"),
        ("https://exam ple.com/", "must be printable ASCII"),
        ("https://example.com/" + "x" * MAX_URL_CHARS, "must be printable ASCII"),
    ],
)
def test_a_url_that_is_not_public_https_is_refused_with_the_reason(url, why):
    assert str(Outbound("").refusal(url)).startswith(why)


def test_a_name_that_resolves_to_this_machine_is_not_connected_to(receiver, url):
    for outbound in (Outbound(""), Outbound("10.0.0.0/8")):
        with pytest.raises(Unreachable):
            outbound.post(f"https://localhost:8443/{receiver.server_port}", b"{}", {}, timeout_s=2)
        with pytest.raises(Unreachable):
            outbound.post(f"http://localhost:{receiver.server_port}/", b"{}", {}, timeout_s=2)

    assert receiver.seen == []


def test_an_allowed_network_is_reached_by_address_and_by_name(receiver, url):
    outbound = Outbound("127.0.0.1/32")

    assert outbound.post(f"{url}/here", b"{}", {"X-Mine": "1"}, timeout_s=2).status == 204
    assert (
        outbound.post(
            f"http://localhost:{receiver.server_port}/there", b"{}", {}, timeout_s=2
        ).status
        == 204
    )
    assert [path for path, _ in receiver.seen] == ["/here", "/there"]
    assert receiver.seen[0][1]["X-Mine"] == "1"
    assert receiver.seen[1][1]["Host"] == f"localhost:{receiver.server_port}"


def test_a_redirect_is_an_answer_and_nothing_is_followed(receiver, url):
    answer = Outbound("127.0.0.1/32").post(f"{url}/redirect", b"{}", {}, timeout_s=2)

    assert answer.status == 302
    assert len(receiver.seen) == 1


def test_a_receiver_says_when_it_wants_to_be_asked_again(url):
    answer = Outbound("127.0.0.1/32").post(f"{url}/away", b"{}", {}, timeout_s=2)

    assert (answer.status, answer.retry_after_s) == (503, 17.0)


@pytest.mark.parametrize("path", ["/hang", "/drip"])
def test_nothing_takes_longer_than_it_may(url, path):
    started = time.monotonic()

    with pytest.raises(Unreachable):
        Outbound("127.0.0.1/32").post(url + path, b"{}", {}, timeout_s=0.1)

    assert time.monotonic() - started < 2


def test_a_name_server_that_says_nothing_holds_nobody_longer_than_a_connection_may_take(
    monkeypatch,
):
    asked, heard = threading.Event(), threading.Event()

    def says_nothing(*_, **__):
        asked.set()
        heard.wait(60)
        raise OSError

    monkeypatch.setattr(edges.outbound.socket, "getaddrinfo", says_nothing)
    monkeypatch.setattr(edges.outbound, "_CONNECT_S", 0.3)
    try:
        with pytest.raises(Unreachable, match="not resolved in time"):
            Outbound("127.0.0.1/32").post("https://example.com/", b"{}", {}, timeout_s=2)
        assert asked.is_set()
    finally:
        heard.set()


def test_a_fetch_ends_where_its_bytes_do(url):
    outbound = Outbound("127.0.0.1/32")

    assert outbound.fetch(f"{url}/small", max_bytes=100, timeout_s=2) == b"x" * 100
    for path, reason in (("/large", "more than 5000 bytes"), ("/none", "answered 404")):
        with pytest.raises(Unreachable, match=reason):
            outbound.fetch(url + path, max_bytes=5000, timeout_s=2)


def test_proxies_of_the_environment_are_not_asked(receiver, url, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    assert Outbound("127.0.0.1/32").post(f"{url}/", b"{}", {}, timeout_s=2).status == 204


def test_a_network_that_is_none_stops_the_start():
    with pytest.raises(ValueError, match="/99"):
        Outbound("10.0.0.0/99")
