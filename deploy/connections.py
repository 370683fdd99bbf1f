"""The gateway's connections: gunicorn's threaded worker, in which no client makes others wait for it.

A thread is for answering a request, not for waiting until one has come or an answer has gone. What depends on the client's pace is
done by the worker's one loop, for all connections at once, under a deadline each:

    idle ──first byte──▶ reading ──head and a small body──▶ a thread ──answer──▶ sending ──▶ idle, or closing
     KEEPALIVE_S          HEADER_TIMEOUT_S                                       at least GATEWAY_MIN_BYTES_PER_S

A thread still waits for a client in two cases, whose number the application bounds (app/live/capacity.py): a body larger than
`SMALL_BODY_BYTES`, which may take BODY_TIMEOUT_S and as long as GATEWAY_MIN_BYTES_PER_S gives it, and an event stream. `/healthz` and
`/readyz` have threads of their own. At GATEWAY_MAX_CONNECTIONS the connection that has been silent for longest makes room for the next.

HTTP/1 over plain TCP only: TLS is a proxy's.
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
DRAINED_S, DRAINED_BYTES = (
    5.0,
    8_388_608,
)  # what a client still sends after its answer: closed on it at once, it would not see the answer
PROBE_THREADS = 2
# of waiting for a thread: from then on it is worth asking whether the client is still there
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
    """How long a client may take, and how many bytes of all clients together may lie here meanwhile, each way."""

    header_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    min_bytes_per_s: float = 32_768.0
    write_timeout_s: float = 30.0
    max_held_bytes: int = 134_217_728

    def body_deadline(self, began_at: float, received: int) -> float:
        return began_at + self.body_timeout_s + received / self.min_bytes_per_s

    def write_deadline(self, began_at: float, sent: int, timeout_s: float | None = None) -> float:
        return began_at + (timeout_s or self.write_timeout_s) + sent / self.min_bytes_per_s


class State(StrEnum):
    """Who has the connection, and what it waits for."""

    IDLE = "idle"  # for the first byte of the next request
    READING = "reading"  # for the rest of a head, or of a small body
    WORKING = "working"  # in a thread
    SENDING = "sending"  # for the client to take its answer
    CLOSING = "closing"  # answered; for the client to stop sending
    GONE = "gone"


class ByteBudget:
    """So many bytes for all connections together."""

    def __init__(self, most: int) -> None:
        self.most = self._left = most
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Whether there is room for them; if so they are taken."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self._left += count


class ClientSocket:
    """A client's socket as a request's thread uses it: never blocking, so that no wait is longer than its deadline.

    What the client does not take at once of an answer is left to the loop, unless the application asked for a write timeout
    (`settimeout`): then each write is done within it, or the client has gone. Event streams do so.
    """

    def __init__(
        self, sock: socket.socket, pace: Pace, answers: ByteBudget, make_room: Callable[[], None]
    ) -> None:
        self.raw, self._pace, self._answers, self._make_room = sock, pace, answers, make_room
        self.unsent = bytearray()
        self.may_wait = True
        self._write_timeout_s: float | None = None
        self._reading_since: float | None = None
        self._received = 0

    def begin_request(self) -> None:
        """Forget what the request before had set."""
        self.may_wait, self._write_timeout_s = True, None
        self._reading_since, self._received = None, 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Some bytes, b"" at the end. Raises TimeoutError when the client is too slow, or at once when nobody may wait."""
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
        """Send, or leave the rest to the loop. Raises BrokenPipeError when the client takes nothing for too long."""
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
        self.sendall(data)
        return len(data)

    def send_unsent(self) -> int:
        """Send what can be sent now of what was left; how many bytes those were."""
        with memoryview(self.unsent) as whole, whole[: 4 * _READ_BYTES] as view:
            sent = self._send(view)
        del self.unsent[:sent]
        self._answers.give_back(sent)
        return sent

    def take_unsent(self) -> bytearray:
        """What was left to send; it is the caller's now."""
        unsent, self.unsent = self.unsent, bytearray()
        self._answers.give_back(len(unsent))
        return unsent

    def has_left(self) -> bool:
        """Whether the client has closed its side."""
        try:
            return self.raw.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def settimeout(self, timeout_s: float | None) -> None:
        """From now on let no write be left to the loop, and none take longer than this."""
        if timeout_s:
            self._write_timeout_s = timeout_s

    def gettimeout(self) -> float | None:
        return self._write_timeout_s

    def setblocking(self, flag: bool) -> None:
        """Nothing: it never blocks."""

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.take_unsent()
        self.raw.close()

    def shutdown(self, how: int) -> None:
        # whoever closes after this reads what is here, and no thread waits for more
        self.may_wait = False
        self.raw.shutdown(how)

    def getsockname(self) -> Any:
        return self.raw.getsockname()

    def _send(self, view: memoryview) -> int:
        """As many as go without waiting."""
        total = 0
        try:
            while total < len(view):
                total += self.raw.send(view[total:])
        except BlockingIOError:
            pass
        return total

    def _take_room(self, count: int) -> None:
        """Raises BrokenPipeError when others' answers fill the room, and nobody who takes nothing could be closed for it."""
        deadline = time.monotonic() + _ROOM_WITHIN_S
        while not self._answers.take(count):
            if time.monotonic() > deadline:
                raise BrokenPipeError(
                    errno.EPIPE, "there is no room for what the client does not take"
                )
            self._make_room()
            time.sleep(0.01)

    def _send_within(self, timeout_s: float | None, data: bytes) -> None:
        view, sent, began_at = memoryview(data), 0, time.monotonic()
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
    """One client's connection, from accept to close."""

    sock: ClientSocket

    def __init__(self, cfg: Any, sock: ClientSocket, client: Any, server: Any) -> None:
        super().__init__(cfg, sock, client, server)
        sock.raw.setblocking(False)
        self.data_ready = True  # the worker hands over whole heads only
        self.state, self.deadline = State.WORKING, 0.0
        self.received = bytearray()  # of the request that is to come
        self.searched, self.wanted = (
            0,
            0,
        )  # how far the end of the head was looked for; head and small body, once that is known
        self.watched_events = 0
        self.queued_at = 0.0
        self.may_stay = False  # after the answer, for another request
        self.sending_since, self.sent, self.drained = 0.0, 0, 0


class TellsOfClosing:
    """An application whose answers say `Connection: close` where the rest of a body that nobody read keeps the connection from going on.

    gunicorn closes such a connection after the answer, and says so only if it knew before: a client that was told nothing sends its
    next request into the close.
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


class BoundedWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with the loop above."""

    pace = Pace()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi = TellsOfClosing(self.wsgi)

    def init_process(self) -> None:
        self._by_state: dict[State, OrderedDict[Connection, None]] = {
            state: OrderedDict() for state in State
        }  # the newest comes last
        self._requests, self._answers = (
            ByteBudget(self.pace.max_held_bytes),
            ByteBudget(self.pace.max_held_bytes),
        )
        self._probes = ThreadPoolExecutor(PROBE_THREADS, thread_name_prefix="probe")
        self._swept_at = 0.0
        # where gunicorn stops accepting; one connection earlier a silent one makes room
        self.worker_connections += 1
        super().init_process()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._probes.shutdown(wait=False)

    # What runs in a thread.

    def handle(self, conn: Connection) -> Any:
        """Answer one request, of which the head is there; whether the connection may be used again."""
        if time.monotonic() - conn.queued_at > STALE_AFTER_S and conn.sock.has_left():
            # all threads were taken for so long that it was given up: nobody wants a job of it any
            # more
            return False
        conn.sock.begin_request()
        conn.init()
        conn.parser.unreader.unread(bytes(conn.received))
        conn.received.clear()
        return super().handle(conn)

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """Whether the client has sent nothing of the request that nobody read: what has come is skipped, more is not waited for."""
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
                    # all files are in threads' hands: the listener stays readable, and asking at
                    # once would help nobody
                    time.sleep(0.01)
                    return
                raise
            self.nr_conns += 1
            client = ClientSocket(sock, self.pace, self._answers, self._ask_for_room)
            conn = Connection(self.cfg, client, address, listener.getsockname())
            self._await_request(conn, State.READING)
            self._read(conn)  # mostly it is there already

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
        """Go on with a connection that comes back from a thread."""
        conn.received.clear()
        # gunicorn closed it: the application failed in the middle of its answer
        if conn.sock.fileno() < 0:
            self._drop(conn)
            return
        conn.may_stay = not done.cancelled() and done.exception() is None and bool(done.result())
        conn.sending_since, conn.sent = time.monotonic(), 0
        self._send(conn)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close what is past its deadline; whatever is not in a thread, if forced."""
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
                self._refuse(
                    conn,
                    408,
                    "request-timeout",
                    "Request timeout",
                    "The request did not come in time.",
                )
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
        conn.searched, conn.wanted = 0, 0
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
        """Add to a request: it goes to a thread when its head is there, and its body if that is small."""
        if conn.state == State.IDLE:
            self._await_request(conn, State.READING)
        if not conn.received:
            # empty lines before a request line mean nothing, and no thread may wait behind them
            data = data.lstrip(b"\r\n")
        while not self._requests.take(len(data)):
            if not self._make_room(State.READING, besides=conn):
                self._drop(conn)
                return
        conn.received += data
        if not conn.wanted:
            end = conn.received.find(b"\r\n\r\n", max(0, conn.searched - 3)) + 4
            conn.searched = len(conn.received)
            if end < 4:
                if len(conn.received) > MAX_HEAD_BYTES:
                    self._refuse(
                        conn,
                        431,
                        "head-too-large",
                        "Head too large",
                        f"The head has more than {MAX_HEAD_BYTES} bytes.",
                    )
                return
            conn.wanted = end + _small_body(bytes(conn.received[: end - 2]))
            conn.deadline = time.monotonic() + self.pace.body_timeout_s
        if len(conn.received) >= conn.wanted:
            self.enqueue_req(conn)

    def _send(self, conn: Connection) -> None:
        """Send what the thread has left, then wait for another request or close."""
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
        """Say that the answer was all, and hear the client out before closing."""
        conn.drained = 0
        self._enter(
            conn,
            State.CLOSING,
            watching=selectors.EVENT_READ,
            deadline=time.monotonic() + DRAINED_S,
        )
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
        head = f"HTTP/1.1 {status} {title}\r\nConnection: close\r\nContent-Type: application/problem+json\r\n"
        self._requests.give_back(len(conn.received))
        conn.received.clear()
        # a few hundred bytes: if there is no room for them, nobody reads them
        with suppress(OSError):
            conn.sock.raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self._close(conn)

    def _make_room(self, *states: State, besides: Connection | None = None) -> bool:
        """Close the connection that has been silent for longest: first of those that wait for a next request, last of unfinished ones."""
        for state in states or (State.IDLE, State.CLOSING, State.READING):
            for conn in self._by_state[state]:
                if conn is not besides:
                    self._drop(conn)
                    return True
        return False

    def _enter(
        self, conn: Connection, state: State, *, watching: int, deadline: float = float("inf")
    ) -> None:
        """Let the connection be in a state, as the newest there."""
        self._by_state[conn.state].pop(conn, None)
        conn.state, conn.deadline = state, deadline
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
        conn.state = State.GONE  # the poller may have told of it already
        self._requests.give_back(len(conn.received))
        conn.received.clear()
        self.nr_conns -= 1
        with suppress(OSError):
            conn.sock.close()


def _received(sock: socket.socket, size: int) -> bytes | None:
    """What has come; b"" when the client has left, None when there is nothing yet."""
    try:
        return sock.recv(size)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _has_unread(reader: Any) -> bool:
    """Whether more of a body is left than is here already: a small one came with its head."""
    if isinstance(reader, ChunkedReader):
        return reader.parser is not None
    return getattr(reader, "length", 0) > SMALL_BODY_BYTES


def _small_body(head: bytes) -> int:
    """Bytes of the body that are worth waiting for before a thread is taken; 0 if there is none, or it is large or comes later."""
    length = _CONTENT_LENGTH.search(head)
    if length is None or _BODY_LATER.search(head):
        return 0
    return int(length[1]) if int(length[1]) <= SMALL_BODY_BYTES else 0
