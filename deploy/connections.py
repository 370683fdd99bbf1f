"""Serve the gateway's connections with a gunicorn worker in which no slow client blocks others.

A thread answers a request; it does not wait for the request to arrive or for the answer to leave.
The worker's single event loop does what depends on the client's speed, for all connections at once,
with a deadline for each:

    idle ──first byte──▶ reading ──head and a small body──▶ a thread ──answer──▶ sending
     KEEPALIVE_S          HEADER_TIMEOUT_S                    at least GATEWAY_MIN_BYTES_PER_S
    sending ──▶ idle, or closing

A thread still waits for a client in two cases, and the application limits how many (see
app/live/capacity.py). One is a body larger than `SMALL_BODY_BYTES`: it may take BODY_TIMEOUT_S plus
the time that its bytes take at GATEWAY_MIN_BYTES_PER_S. The other is an event stream. `/healthz`
and `/readyz` have their own threads. At GATEWAY_MAX_CONNECTIONS, the connection that has been
silent for longest is closed to accept the next.

HTTP/1 over plain TCP only: a proxy does TLS.
"""

import errno
import json
import re
import select
import selectors
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from gunicorn.http.body import ChunkedReader
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

from settings import SMALL_BODY_BYTES

MAX_HEAD_BYTES = 65_536
# How much a client may still send after its answer. If the connection were closed at once, the
# client would not see the answer.
DRAINED_S = 5.0
DRAINED_BYTES = 8_388_608
PROBE_THREADS = 2
# After waiting this long for a thread, check whether the client is still there.
STALE_AFTER_S = 3.0
_ACCEPTED_AT_ONCE = 64
_READ_BYTES = 65_536
_SWEEP_EVERY_S = 0.25
_ROOM_WITHIN_S = 0.5
_PROBE = re.compile(rb"(?:GET|HEAD) /(?:healthz|readyz)[ ?]")
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
_BODY_LATER = re.compile(rb"\r\n(?:expect|transfer-encoding):", re.IGNORECASE)


@dataclass(frozen=True)
class Pace:
    """Hold how long a client may take, and how many bytes may be buffered meanwhile.

    max_held_bytes counts for all clients together, once for each direction.
    """

    header_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    min_bytes_per_s: float = 32_768.0
    write_timeout_s: float = 30.0
    max_held_bytes: int = 134_217_728

    def body_deadline(self, began_at: float, received: int) -> float:
        """Return when the rest of a body must have arrived, on the monotonic clock."""
        return began_at + self.body_timeout_s + received / self.min_bytes_per_s

    def write_deadline(self, began_at: float, sent: int, timeout_s: float | None = None) -> float:
        """Return when the rest of an answer must have been sent, on the monotonic clock."""
        return began_at + (timeout_s or self.write_timeout_s) + sent / self.min_bytes_per_s


class State(StrEnum):
    """Name what a connection waits for."""

    IDLE = "idle"  # for the first byte of the next request
    READING = "reading"  # for the rest of a head, or of a small body
    WORKING = "working"  # in a thread
    SENDING = "sending"  # for the client to take its answer
    CLOSING = "closing"  # answered; for the client to stop sending
    GONE = "gone"


class ByteBudget:
    """Count the bytes that all connections together may buffer."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._left = most
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take `count` bytes; tell whether there was room for them."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        """Return `count` bytes to the budget."""
        with self._lock:
            self._left += count


class ClientSocket:
    """Give a request's thread a client's socket that never blocks beyond a deadline.

    The loop sends what the client does not take of an answer at once. If the application asked for
    a write timeout (`settimeout`), as event streams do, each write instead ends within it or raises
    BrokenPipeError.
    """

    def __init__(
        self, sock: socket.socket, pace: Pace, answers: ByteBudget, make_room: Callable[[], None]
    ) -> None:
        self.raw = sock
        self._pace = pace
        self._answers = answers
        self._make_room = make_room
        self.unsent = bytearray()
        self.may_wait = True
        self._write_timeout_s: float | None = None
        self._reading_since: float | None = None
        self._received = 0

    def begin_request(self) -> None:
        """Reset what the previous request has set."""
        self.may_wait = True
        self._write_timeout_s = None
        self._reading_since = None
        self._received = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive at most `size` bytes; b"" at the end.

        Raises TimeoutError when the client is too slow, or at once unless `may_wait`.
        """
        while True:
            try:
                data = self.raw.recv(size, flags)
            except BlockingIOError:
                pass
            else:
                self._received += len(data)
                return data
            now = time.monotonic()
            self._reading_since = now if self._reading_since is None else self._reading_since
            left_s = self._pace.body_deadline(self._reading_since, self._received) - now
            if not self.may_wait or left_s <= 0:
                raise TimeoutError("the body comes too slowly")
            self._wait(select.POLLIN, left_s)

    def sendall(self, data: bytes) -> None:
        """Send, or leave the rest to the loop.

        Raises BrokenPipeError when the client takes nothing for too long.
        """
        view = memoryview(data)
        if not self.unsent:
            view = view[self._send(view) :]
        if not view:
            return
        if self._write_timeout_s is None and len(view) <= self._answers.most // 4:
            self._take_room(len(view))
            self.unsent += view
            return
        self._send_within(self._write_timeout_s, bytes(self.take_unsent()) + bytes(view))

    def send(self, data: bytes) -> int:
        """Send all of `data` as `sendall` does; return its length."""
        self.sendall(data)
        return len(data)

    def send_unsent(self) -> int:
        """Send what can be sent now of what was left; return how many bytes that was."""
        with memoryview(self.unsent) as whole, whole[: 4 * _READ_BYTES] as view:
            sent = self._send(view)
        del self.unsent[:sent]
        self._answers.give_back(sent)
        return sent

    def take_unsent(self) -> bytearray:
        """Return what is left to send; the caller owns it from now on."""
        unsent, self.unsent = self.unsent, bytearray()
        self._answers.give_back(len(unsent))
        return unsent

    def has_left(self) -> bool:
        """Tell whether the client has closed its side."""
        try:
            return self.raw.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def settimeout(self, timeout_s: float | None) -> None:
        """Finish every later write here, not in the loop, and within `timeout_s`."""
        if timeout_s:
            self._write_timeout_s = timeout_s

    def gettimeout(self) -> float | None:
        return self._write_timeout_s

    def setblocking(self, flag: bool) -> None:
        """Do nothing: the socket never blocks."""

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.take_unsent()
        self.raw.close()

    def shutdown(self, how: int) -> None:
        # A caller that closes after this reads what has arrived; no thread waits for more.
        self.may_wait = False
        self.raw.shutdown(how)

    def getsockname(self) -> Any:
        return self.raw.getsockname()

    def _send(self, view: memoryview) -> int:
        """Send as many bytes as go without waiting; return their number."""
        total = 0
        try:
            while total < len(view):
                total += self.raw.send(view[total:])
        except BlockingIOError:
            pass
        return total

    def _take_room(self, count: int) -> None:
        """Reserve `count` bytes of the budget for unsent answers.

        Raises BrokenPipeError when other answers fill it, and no stalled client could be closed.
        """
        deadline = time.monotonic() + _ROOM_WITHIN_S
        while not self._answers.take(count):
            if time.monotonic() > deadline:
                raise BrokenPipeError(
                    errno.EPIPE, "there is no room for what the client does not take"
                )
            self._make_room()
            time.sleep(0.01)

    def _send_within(self, timeout_s: float | None, data: bytes) -> None:
        view = memoryview(data)
        sent = 0
        began_at = time.monotonic()
        while True:
            sent += self._send(view[sent:])
            if sent == len(view):
                return
            left_s = self._pace.write_deadline(began_at, sent, timeout_s) - time.monotonic()
            if left_s <= 0:
                raise BrokenPipeError(errno.EPIPE, "the client takes nothing")
            self._wait(select.POLLOUT, left_s)

    def _wait(self, events: int, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self.raw, events)
        poll.poll(max(1, int(timeout_s * 1000)))


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """Hold the state of one client's connection, from accept to close."""

    sock: ClientSocket

    def __init__(self, cfg: Any, sock: ClientSocket, client: Any, server: Any) -> None:
        super().__init__(cfg, sock, client, server)
        sock.raw.setblocking(False)
        self.data_ready = True  # the worker hands over whole heads only
        self.state = State.WORKING
        self.deadline = 0.0
        self.received = bytearray()  # of the next request
        self.searched = 0  # bytes that were searched for the end of the head
        self.wanted = 0  # bytes of head and small body, once known
        self.watched_events = 0
        self.queued_at = 0.0
        self.may_stay = False  # after the answer, for another request
        self.sending_since = 0.0
        self.sent = 0
        self.drained = 0


class TellsOfClosing:
    """Add `Connection: close` to an answer whose request has an unread body.

    gunicorn closes such a connection after the answer, and announces it only if it knew before.
    Without the header a client would send its next request into the closing connection.
    """

    def __init__(self, application: Any) -> None:
        self._application = application

    def __getattr__(self, name: str) -> Any:
        return getattr(self._application, name)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        def start(*arguments: Any) -> Any:
            if _has_unread(environ["wsgi.input"].reader):
                start_response.__self__.force_close()
            return start_response(*arguments)

        return self._application(environ, start)


class BoundedWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Extend gunicorn's threaded worker by the loop described above."""

    pace = Pace()
    wsgi: Callable[..., Any]

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi = TellsOfClosing(self.wsgi)

    def init_process(self) -> None:
        self._by_state: dict[State, OrderedDict[Connection, None]] = {
            state: OrderedDict() for state in State
        }  # the newest comes last
        self._requests = ByteBudget(self.pace.max_held_bytes)
        self._answers = ByteBudget(self.pace.max_held_bytes)
        self._probes = ThreadPoolExecutor(PROBE_THREADS, thread_name_prefix="probe")
        self._swept_at = 0.0
        # gunicorn stops accepting here; one connection earlier, a silent one is closed.
        self.worker_connections += 1
        super().init_process()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._probes.shutdown(wait=False)

    # What runs in a thread.

    def handle(self, conn: Connection) -> Any:
        """Answer one request whose head has arrived.

        Tells whether the connection may be used again.
        """
        if time.monotonic() - conn.queued_at > STALE_AFTER_S and conn.sock.has_left():
            # All threads were taken for so long that the client gave up: make no job for it.
            return False
        conn.sock.begin_request()
        conn.init()
        conn.parser.unreader.unread(bytes(conn.received))
        conn.received.clear()
        return super().handle(conn)

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """Tell whether the connection can be kept: no part of the request's body is outstanding.

        Skips what has arrived of an unread body, and waits for no more.
        """
        if not keepalive:
            return False
        conn.sock.may_wait = False
        return bool(conn.parser.finish_body(max_bytes=SMALL_BODY_BYTES))

    def _ask_for_room(self) -> None:
        """Let the loop close the client that has taken nothing of its answer for longest."""
        self.method_queue.defer(lambda: self._make_room(State.SENDING))

    # What runs in the loop: whatever gunicorn calls there, and the rest.

    def accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            if self.nr_conns >= self.worker_connections:
                return
            if self.nr_conns >= self.cfg.worker_connections:
                self._make_room()
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._make_room():
                    continue
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    # Threads hold all file descriptors. The listener stays readable, so pause
                    # before the next try.
                    time.sleep(0.01)
                    return
                raise
            self._welcome(sock, address, listener.getsockname())

    def _welcome(self, sock: socket.socket, address: Any, server: Any) -> None:
        """Begin with a client's connection."""
        self.nr_conns += 1
        client = ClientSocket(sock, self.pace, self._answers, self._ask_for_room)
        conn = Connection(self.cfg, client, address, server)
        self._await_request(conn, State.READING)
        self._read(conn)  # mostly the request is there already

    def enqueue_req(self, conn: Connection) -> None:
        """Give the connection to a thread."""
        self._requests.give_back(len(conn.received))
        self._enter(conn, State.WORKING, watching=0)
        conn.queued_at = time.monotonic()
        pool = self._probes if _PROBE.match(conn.received) else self.tpool
        future = pool.submit(self.handle, conn)
        future.add_done_callback(
            lambda done: self.method_queue.defer(self.finish_request, conn, done)
        )

    def finish_request(self, conn: Connection, done: "Future[Any]") -> None:
        """Continue with a connection that comes back from a thread."""
        conn.received.clear()
        # gunicorn closed it: the application failed in the middle of its answer.
        if conn.sock.fileno() < 0:
            self._drop(conn)
            return
        conn.may_stay = not done.cancelled() and done.exception() is None and bool(done.result())
        conn.sending_since = time.monotonic()
        conn.sent = 0
        self._send(conn)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close connections past their deadline; if forced, all that are not in a thread."""
        now = time.monotonic()
        if not force and now - self._swept_at < _SWEEP_EVERY_S:
            return
        self._swept_at = now
        late = [
            conn
            for held in self._by_state.values()
            for conn in held
            if force or conn.deadline <= now
        ]
        for conn in late:
            if conn.state == State.READING and conn.received and not force:
                detail = "The request arrived too slowly."
                self._refuse(conn, 408, "request-timeout", "Request timeout", detail)
            elif conn.state != State.WORKING:
                self._drop(conn)

    def murder_pending(self) -> None:
        """Do nothing: `murder_keepalived` looks at all of them."""

    def _cap_keepalive(self, deadline: float) -> None:
        for conn in self._by_state[State.IDLE]:
            conn.deadline = min(conn.deadline, deadline)

    def _await_request(self, conn: Connection, state: State) -> None:
        """Wait for the first byte of a next request, or for the whole of a first one."""
        keepalive_s = float(self.cfg.keepalive) if self.alive else STOP_KEEPALIVE_LINGER
        wait_s = keepalive_s if state == State.IDLE else self.pace.header_timeout_s
        conn.searched = 0
        conn.wanted = 0
        self._enter(conn, state, watching=selectors.EVENT_READ, deadline=time.monotonic() + wait_s)

    def _on_event(self, conn: Connection, _fileobj: Any) -> None:
        if conn.state in (State.IDLE, State.READING):
            self._read(conn)
        elif conn.state == State.SENDING:
            self._send(conn)
        elif conn.state == State.CLOSING:
            self._drain(conn)

    def _read(self, conn: Connection) -> None:
        data = _received(conn.sock.raw, _READ_BYTES)
        if data:
            self._take_in(conn, data)
        elif data is not None:
            self._drop(conn)

    def _take_in(self, conn: Connection, data: bytes) -> None:
        """Add `data` to a request; give it to a thread when its head and small body are there."""
        if conn.state == State.IDLE:
            self._await_request(conn, State.READING)
        if not conn.received:
            # Empty lines before a request line mean nothing; no thread may wait for what follows.
            data = data.lstrip(b"\r\n")
        while not self._requests.take(len(data)):
            if not self._make_room(State.READING, besides=conn):
                self._drop(conn)
                return
        conn.received += data
        if not conn.wanted:
            self._find_head(conn)
        if conn.wanted and len(conn.received) >= conn.wanted:
            self.enqueue_req(conn)

    def _find_head(self, conn: Connection) -> None:
        """Note how much is wanted if the whole head has arrived; refuse one that is too large."""
        end = conn.received.find(b"\r\n\r\n", max(0, conn.searched - 3)) + 4
        conn.searched = len(conn.received)
        if end >= 4:
            conn.wanted = end + _small_body(bytes(conn.received[: end - 2]))
            conn.deadline = time.monotonic() + self.pace.body_timeout_s
        elif len(conn.received) > MAX_HEAD_BYTES:
            detail = f"The head has more than {MAX_HEAD_BYTES} bytes."
            self._refuse(conn, 431, "head-too-large", "Head too large", detail)

    def _send(self, conn: Connection) -> None:
        """Send what the thread left unsent, then wait for another request or close."""
        try:
            conn.sent += conn.sock.send_unsent()
        except OSError:
            self._drop(conn)
            return
        if conn.sock.unsent:
            deadline = self.pace.write_deadline(conn.sending_since, conn.sent)
            self._enter(conn, State.SENDING, watching=selectors.EVENT_WRITE, deadline=deadline)
        elif not conn.may_stay:
            self._close(conn)
        elif ahead := conn.parser.unreader.take_buffered():
            self._await_request(conn, State.READING)
            self._take_in(conn, ahead)
        else:
            self._await_request(conn, State.IDLE)

    def _close(self, conn: Connection) -> None:
        """Shut down our side, and read what the client still sends before closing."""
        conn.drained = 0
        deadline = time.monotonic() + DRAINED_S
        self._enter(conn, State.CLOSING, watching=selectors.EVENT_READ, deadline=deadline)
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        self._drain(conn)

    def _drain(self, conn: Connection) -> None:
        data = _received(conn.sock.raw, 4 * _READ_BYTES)
        if data is not None:
            conn.drained += len(data)
            if not data or conn.drained > DRAINED_BYTES:
                self._drop(conn)

    def _refuse(self, conn: Connection, status: int, slug: str, title: str, detail: str) -> None:
        """Answer a request that no thread will see."""
        body = json.dumps(
            {"type": f"/problems/{slug}", "title": title, "status": status, "detail": detail}
        ).encode()
        head = (
            f"HTTP/1.1 {status} {title}\r\nConnection: close\r\n"
            "Content-Type: application/problem+json\r\n"
        )
        self._requests.give_back(len(conn.received))
        conn.received.clear()
        # These are a few hundred bytes: if the socket has no room for them, nobody reads them.
        with suppress(OSError):
            conn.sock.raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self._close(conn)

    def _make_room(self, *states: State, besides: Connection | None = None) -> bool:
        """Close the connection that has been silent for longest; tell whether there was one.

        Searches `states` in their order; by default idle connections come first, and those with
        an unfinished request last.
        """
        for state in states or (State.IDLE, State.CLOSING, State.READING):
            for conn in self._by_state[state]:
                if conn is not besides:
                    self._drop(conn)
                    return True
        return False

    def _enter(
        self, conn: Connection, state: State, *, watching: int, deadline: float = float("inf")
    ) -> None:
        """Move the connection into a state, as the newest there."""
        self._by_state[conn.state].pop(conn, None)
        conn.state = state
        conn.deadline = deadline
        self._by_state[state][conn] = None
        self._watch(conn, watching)

    def _watch(self, conn: Connection, events: int) -> None:
        if events == conn.watched_events:
            return
        if not events:
            self.poller.unregister(conn.sock)
        elif conn.watched_events:
            self.poller.modify(conn.sock, events, partial(self._on_event, conn))
        else:
            self.poller.register(conn.sock, events, partial(self._on_event, conn))
        conn.watched_events = events

    def _drop(self, conn: Connection) -> None:
        """Close and forget the connection."""
        self._watch(conn, 0)
        self._by_state[conn.state].pop(conn, None)
        conn.state = State.GONE  # the poller may have reported it already
        self._requests.give_back(len(conn.received))
        conn.received.clear()
        self.nr_conns -= 1
        with suppress(OSError):
            conn.sock.close()


def _received(sock: socket.socket, size: int) -> bytes | None:
    """Receive what has arrived; b"" when the client has left, None when there is nothing yet."""
    try:
        return sock.recv(size)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _has_unread(reader: Any) -> bool:
    """Tell whether part of a body has not arrived; a small body comes with its head."""
    if isinstance(reader, ChunkedReader):
        return reader.parser is not None
    return getattr(reader, "length", 0) > SMALL_BODY_BYTES


def _small_body(head: bytes) -> int:
    """Return how many bytes of the body to wait for before a thread is taken.

    That is 0 if there is no body, or it is large or comes later.
    """
    length = _CONTENT_LENGTH.search(head)
    if length is None or _BODY_LATER.search(head):
        return 0
    return int(length[1]) if int(length[1]) <= SMALL_BODY_BYTES else 0
