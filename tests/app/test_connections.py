"""The gateway as it is served, and clients that are slow, silent or many.

Nobody else waits for them.
"""

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from deploy.connections import STALE_AFTER_S
from policy.version import VERSION
from settings import REPO, ServerSettings
from tests.app.conftest import NO_TLS, bearer
from tests.builders import a_closed_port, until

MORE_THAN_THREADS = 40
TIGHT = {
    "gateway_threads": 8,
    "gateway_max_streams": 2,
    "gateway_max_waits": 4,
    "gateway_max_uploads": 3,
    "gateway_max_connections": 64,
    "header_timeout_s": 1,
    "body_timeout_s": 1,
    "keepalive_s": 2,
}
PATIENT = TIGHT | {
    "header_timeout_s": 60,
    "body_timeout_s": 60,
    "keepalive_s": 60,
    "gateway_max_connections": 1000,
}
LARGE = 100_000


@pytest.fixture(scope="module")
def gateway(a_gateway):
    """One with few threads and little patience."""
    return a_gateway(**TIGHT)


@pytest.fixture(scope="module")
def patient_gateway(a_gateway):
    """One with few threads and much patience: whoever is slow stays for the whole test."""
    return a_gateway(**PATIENT)


@pytest.fixture(scope="module")
def gateway_of_little_room(a_gateway):
    """One that holds few answers for clients that do not read them, and waits for slow bodies."""
    few = {"gateway_max_connections": 1000, "gateway_buffer_bytes": 1_048_576}
    return a_gateway(**TIGHT | few | {"gateway_min_bytes_per_s": 10_000})


@pytest.fixture(scope="module")
def key(new_key):
    return new_key()


@contextmanager
def connected(url, count=1, **options):
    """So many connections of our own."""
    with ExitStack() as stack:
        yield [stack.enter_context(_connect(url, **options)) for _ in range(count)]


def _connect(url, receive_buffer=None):
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(60)
    address = urlsplit(url)
    sock.connect((address.hostname, address.port))
    return sock


def heard(sock, *, until_closed=True):
    """What the server sends until it closes, or until it has sent one answer with a short body."""
    data = b""
    while piece := sock.recv(65_536):
        data += piece
        if not until_closed and b"\r\n\r\n" in data:
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(body) >= length:
                break
    return data


@contextmanager
def frozen(pid):
    """The process and its children stand still: connections stay open, and nobody answers."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def works(url, key):
    """Whether a stranger's request is answered soon, one that needs a thread and the database."""
    answer = httpx.get(
        f"{url}/v1/jobs", headers=bearer(key), timeout=20, trust_env=False, verify=NO_TLS
    )
    return answer.status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        b"\r\n\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n{",
    ],
    ids=["nothing", "a letter", "half a head", "empty lines", "half a body"],
)
def test_requests_that_do_not_come_take_no_thread(patient_gateway, key, sent):
    with connected(patient_gateway, MORE_THAN_THREADS) as silent:
        for sock in silent:
            sock.sendall(sent)

        assert works(patient_gateway, key)


@pytest.mark.parametrize("which", ["patient_gateway", "gateway_of_little_room"])
def test_answers_that_nobody_reads_take_no_thread(request, key, which):
    url = request.getfixturevalue(which)
    with connected(url, MORE_THAN_THREADS, receive_buffer=2048) as deaf:
        for sock in deaf:
            # more than the system's buffers hold
            sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 40)

        assert works(url, key)


def test_an_answer_that_is_read_slowly_comes_whole(gateway):
    whole = httpx.get(f"{gateway}/openapi.json", trust_env=False, verify=NO_TLS).content
    with connected(gateway, receive_buffer=2048) as [sock]:
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)

        answer = heard(sock)

    assert answer.partition(b"\r\n\r\n")[2] == whole


def test_clients_that_do_not_close_hold_up_nobody(patient_gateway, key):
    with connected(patient_gateway, MORE_THAN_THREADS) as left_open:
        for sock in left_open:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

        assert works(patient_gateway, key)
        assert {status_of(heard(sock)) for sock in left_open} == {200}


def test_a_body_that_nobody_reads_is_not_waited_for(patient_gateway, key):
    with connected(patient_gateway, MORE_THAN_THREADS) as slow:
        for sock in slow:
            # no key: 401
            sock.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n{")

        assert works(patient_gateway, key)


@pytest.mark.parametrize("how", ["with its length", "chunked"])
def test_an_answer_to_a_body_that_nobody_reads_says_that_the_connection_ends(gateway, key, how):
    """Or a client sends its next request into the close, and hears nothing."""
    large = b"x" * 1_000_000
    body = (
        large
        if how == "with its length"
        else (large[place : place + 50_000] for place in range(0, len(large), 50_000))
    )
    with httpx.Client(trust_env=False, verify=NO_TLS, headers=bearer(key)) as client:
        for content in (body, large, large):
            refused = client.post(
                f"{gateway}/v1/images/generations",
                content=content,
                headers={"Content-Type": "application/json"},
            )
            asked_again = client.get(f"{gateway}/v1/key")

            assert (refused.status_code, refused.headers["Connection"]) == (413, "close")
            assert (asked_again.status_code, asked_again.headers["Connection"]) == (
                200,
                "keep-alive",
            )


def test_a_client_that_sends_a_large_body_in_vain_still_hears_why(gateway):
    answer = httpx.post(
        f"{gateway}/v1/files",
        content=bytes(6_000_000),
        headers={"Content-Type": "image/png"},
        trust_env=False,
    )

    assert answer.status_code == 401


@pytest.mark.parametrize(
    "sent", [b"GET /healthz HTTP/1.1\r\n", b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_request_that_does_not_come_in_time_is_told_so(gateway, sent):
    with connected(gateway) as [sock]:
        sock.sendall(sent)

        answer = heard(sock)

    assert status_of(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "/problems/request-timeout"


def test_a_large_body_that_stops_coming_is_told_so(gateway, key):
    with connected(gateway) as [sock]:
        sock.sendall(_upload(key, LARGE) + bytes(1000))

        answer = heard(sock)

    assert status_of(answer) == 408


def test_a_large_body_may_take_its_time_while_it_comes_fast_enough(gateway_of_little_room, key):
    with connected(gateway_of_little_room) as [sock]:
        sock.sendall(_upload(key, LARGE))
        for _ in range(16):
            sock.sendall(bytes(LARGE // 16))
            time.sleep(0.1)  # longer than the time for a body, altogether

        answer = heard(sock, until_closed=False)

    assert status_of(answer) == 422  # it is no picture, but it was read


@pytest.mark.parametrize(
    ("length", "more"),
    [(LARGE, b""), (60_000, b"Expect: 100-continue\r\n")],
    ids=["large", "asks before it sends"],
)
def test_slow_uploads_of_one_tenant_leave_threads_and_room_to_others(
    a_gateway, new_key, length, more
):
    # the second has a gateway of its own: in the first one's, room may still be taken
    url = a_gateway(**PATIENT | ({"keepalive_s": 61} if more else {}))
    key, other_key = new_key(), new_key()

    def other_s_upload():
        headers = {**bearer(other_key), "Content-Type": "image/png"}
        sent = {"content": bytes(LARGE), "headers": headers, "trust_env": False, "verify": NO_TLS}
        return httpx.post(f"{url}/v1/files", **sent).status_code

    with connected(url, 3) as slow:
        for sock in slow:
            sock.sendall(_upload(key, length).replace(b"\r\n", b"\r\n" + more, 1))
        told = dict.fromkeys(slow, b"")
        until(lambda: _refused(told), what="a refusal: two of three are its share")

        assert works(url, key)
        assert other_s_upload() == 422  # no picture, but it was read
        assert len(_refused(told)) == 1


def test_a_head_that_does_not_end_is_refused(gateway):
    with connected(gateway) as [sock]:
        sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000)

        assert status_of(heard(sock)) == 431


def test_an_answer_that_fails_in_the_middle_ends_its_connection_and_no_other(tmp_path):
    port = a_closed_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--worker-class",
        "deploy.connections.BoundedWorker",
        "--threads",
        "4",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-b", f"127.0.0.1:{port}", "tests.app.broken_answers:application"],
            cwd=REPO,
            stderr=log,
        )
    try:
        until(lambda: answers(port), within_s=60, what="the start")
        with httpx.Client(
            trust_env=False, verify=NO_TLS, base_url=f"http://127.0.0.1:{port}"
        ) as client:
            [worker] = psutil.Process(process.pid).children()
            for _ in range(8):  # more than there are threads
                with pytest.raises(httpx.RemoteProtocolError):
                    client.get("/broken")
                assert client.get("/well").text == "well"
            assert worker.is_running()
            assert psutil.Process(process.pid).children() == [worker]
    finally:
        process.terminate()
        process.wait(30)


def answers(port):
    with suppress(httpx.TransportError):
        return (
            httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, verify=NO_TLS).status_code
            == 200
        )
    return False


def test_requests_behind_one_another_are_answered_in_their_order(gateway):
    with connected(gateway) as [sock]:
        sock.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )

        answer = heard(sock)

    assert answer.index(b"HTTP/1.1 200") < answer.index(b"HTTP/1.1 404")


def test_a_request_in_small_pieces_is_one_request(gateway, key):
    body = json.dumps({"prompt": "a red circle", "steps": -1}).encode()
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\n"
    )
    sent = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connected(gateway) as [sock]:
        for place in range(0, len(sent), 16):
            sock.sendall(sent[place : place + 16])
            time.sleep(0.005)

        answer = heard(sock, until_closed=False)

    assert status_of(answer) == 422
    assert b"/steps" in answer


@pytest.mark.parametrize("how", ["chunked", "expect"])
def test_a_body_may_be_chunked_or_wait_to_be_asked_for(gateway, key, how):
    body = json.dumps({"prompt": "a red circle", "steps": -1}).encode()
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\n"
    )
    with connected(gateway) as [sock]:
        if how == "expect":
            sock.sendall(
                f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert sock.recv(100).startswith(b"HTTP/1.1 100")
            sock.sendall(body)
        else:
            sock.sendall(
                f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode()
                + body
                + b"\r\n0\r\n\r\n"
            )

        assert status_of(heard(sock, until_closed=False)) == 422


def test_an_idle_connection_is_kept_longer_than_load_balancers_do():
    assert ServerSettings().keepalive_s > 60


def test_an_idle_connection_is_closed_after_its_time_and_not_before(gateway):
    with connected(gateway) as [sock]:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        heard(sock, until_closed=False)
        time.sleep(1)
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(heard(sock, until_closed=False)) == 200
        answered_at = time.monotonic()

        assert heard(sock) == b""
        assert 1 < time.monotonic() - answered_at < 10


def test_silent_connections_make_room_for_those_that_ask(gateway, key):
    with connected(gateway, 100):  # of 64 that may be
        assert works(gateway, key)


def test_the_gateway_is_alive_while_all_its_threads_are_taken(stack, patient_gateway, key):
    asked = f"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    with frozen(stack.pid("postgres")), connected(patient_gateway, MORE_THAN_THREADS) as waiting:
        for sock in waiting:
            sock.sendall(asked)
        time.sleep(0.5)

        assert (
            httpx.get(
                f"{patient_gateway}/healthz", timeout=2, trust_env=False, verify=NO_TLS
            ).status_code
            == 200
        )
        readiness = until(
            lambda: _unready(patient_gateway), within_s=60, what="telling that the database is away"
        )

    assert readiness["parts"]["database"] == {"ready": False, "detail": "does not answer"}
    until(
        lambda: (
            httpx.get(f"{patient_gateway}/readyz", trust_env=False, verify=NO_TLS).status_code
            == 200
        ),
        within_s=60,
        what="being ready again",
    )


def test_requests_whose_clients_left_while_they_queued_are_not_begun(
    stack, patient_gateway, key, count_jobs
):
    body = json.dumps({"prompt": "a red circle", "tier": "batch"})
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\n"
    )
    before = count_jobs()
    with frozen(stack.pid("postgres")):
        with connected(patient_gateway, MORE_THAN_THREADS) as impatient:
            for sock in impatient:
                sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(0.5)
        time.sleep(STALE_AFTER_S)

    assert works(patient_gateway, key)  # behind all of them
    # those that had a thread
    assert count_jobs() - before <= TIGHT["gateway_threads"] + TIGHT["gateway_max_streams"]


def test_every_process_is_in_the_metrics_whichever_answers(a_gateway):
    port = a_closed_port()
    url = a_gateway(web_concurrency=2, metrics_port=port, gateway_threads=8, gateway_max_streams=2)

    for _ in range(30):
        # a connection each: whichever process takes it
        with connected(url) as [sock]:
            sock.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert status_of(heard(sock)) == 404

    counted = [_counted(port, route="unknown") for _ in range(5)]
    assert counted == [30] * 5
    assert [line for line in _scraped(port) if line.startswith("darkroom_build_info")] == [
        f'darkroom_build_info{{version="{VERSION}"}} 1.0'
    ]


def test_no_client_chooses_what_a_metric_is_called(a_gateway, key):
    port = a_closed_port()
    url = a_gateway(metrics_port=port, gateway_threads=8, gateway_max_streams=2)
    _odd_requests(url, key, "first")
    before = _series(port)

    _odd_requests(url, key, "second")

    assert _series(port) == before


def _odd_requests(url, key, word):
    """Everything in a request that somebody might take for a label, with a word of the client's
    choice.
    """
    with httpx.Client(base_url=url, trust_env=False, verify=NO_TLS, headers=bearer(key)) as client:
        assert client.request(word.upper(), "/v1/jobs").status_code == 501
        assert client.request(word.upper(), f"/{word}").status_code == 501
        for path in (
            f"/{word}",
            f"/v1/jobs/{word}",
            f"/problems/{word}",
            f"/docs/{word}",
            f"/v1/jobs?{word}={word}",
            f"/v1/models/{word}",
        ):
            client.get(path)
        fields = {
            "prompt": word,
            "tier": word,
            "model": word,
            "sampler": word,
            "output_format": word,
            word: word,
        }
        for name, value in fields.items():
            client.post("/v1/jobs", json={"prompt": "x", name: value, "steps": -1})
            client.post("/v1/images/generations", json={"prompt": "x", name: value, "steps": -1})
        client.get(
            "/v1/jobs",
            headers={
                "Authorization": f"{word} {word}",
                "X-Request-Id": word,
                "Prefer": f"{word}=1",
                "Host": word,
            },
        )
        client.post("/v1/files", content=word.encode(), headers={"Content-Type": f"image/{word}"})


def _scraped(port):
    url = f"http://127.0.0.1:{port}/metrics"
    return httpx.get(url, trust_env=False, verify=NO_TLS).text.splitlines()


def _series(port):
    """Names and labels of everything in the metrics, but for buckets' and values."""
    return {line.rpartition(" ")[0] for line in _scraped(port) if not line.startswith("#")}


def _counted(port, *, route):
    return sum(
        float(line.rpartition(" ")[2])
        for line in _scraped(port)
        if line.startswith("darkroom_http_requests_total{") and f'"{route}"' in line
    )


def _unready(url):
    answer = httpx.get(f"{url}/readyz", timeout=2, trust_env=False, verify=NO_TLS)
    return answer.json() if answer.status_code == 503 else None


def _upload(key, length):
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: image/png\r\n"
    )
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def _refused(told):
    """Those that were refused by now; `told` keeps what each has heard so far."""
    for sock in told:
        sock.setblocking(False)
        with suppress(OSError):
            told[sock] += sock.recv(65_536)
    return [answer for answer in told.values() if b" 503 " in answer]
