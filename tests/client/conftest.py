"""A small HTTP server that misbehaves as told, and both clients under one handle."""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from darkroom_client import AsyncClient, Client, Retries

HASTY = Retries(initial_backoff_s=0.01, max_backoff_s=0.02)


class Request:
    """One request as it came, and the ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler
        self.at = time.monotonic()
        self.method, self.path, self.headers = handler.command, handler.path, handler.headers
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))

    def answer(
        self,
        status: int,
        document=None,
        *,
        content: bytes | None = None,
        promised: int | None = None,
        **headers: str,
    ) -> None:
        """promised: a Content-Length that is not kept."""
        content = json.dumps(document).encode() if content is None else content
        self._handler.send_response(status)
        plain = {
            "Content_Type": "application/json",
            "Content_Length": str(promised or len(content)),
            "Connection": "close",
        }
        for name, value in (plain | headers).items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()
        self._handler.wfile.write(content)
        self._handler.wfile.flush()
        self._handler.close_connection = True

    def reset(self) -> None:
        """Break the connection without an answer, as when the process at its end is killed."""
        self._handler.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self._handler.close_connection = True  # the linger of zero makes a reset of it


class Server:
    """Answers the n-th request with the n-th behaviour, and all further ones with the last."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{http.server_port}"
        self.requests: list[Request] = []
        self.behaviours: list[Callable[[Request], None]] = []

    def will(self, *behaviours: Callable[[Request], None]) -> None:
        self.behaviours = list(behaviours)


@pytest.fixture
def server() -> Iterator[Server]:
    """A real server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def behave(self) -> None:
            request = Request(self)
            server.requests.append(request)
            server.behaviours[min(len(server.requests), len(server.behaviours)) - 1](request)
            self.close_connection = True

        do_GET = do_POST = do_DELETE = behave

        def log_message(self, *arguments) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            pass  # whoever hangs up on a slow answer is no news

    http = Quiet(("127.0.0.1", 0), Handler)
    server = Server(http)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()


class Either:
    """One of the clients, driven the same way.

    `ask("job", "j1")` is what the method returns, a list where it is iterated.
    """

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self.url = kind, url

    def ask(
        self, method: str, *arguments, retries: Retries = HASTY, timeout_s: float = 10.0, **named
    ):
        options = {"retries": retries, "timeout_s": timeout_s}
        if self.kind == "asyncio":
            return asyncio.run(self._awaited(options, method, *arguments, **named))
        with Client(self.url, "dr_key", **options) as client:
            came = getattr(client, method)(*arguments, **named)
            return list(came) if method in ("jobs", "events") else came

    async def _awaited(self, options, method, *arguments, **named):
        async with AsyncClient(self.url, "dr_key", **options) as client:
            came = getattr(client, method)(*arguments, **named)
            return [each async for each in came] if method in ("jobs", "events") else await came


@pytest.fixture(params=["threads", "asyncio"])
def either(request, server) -> Either:
    """Both clients, one after the other, of the misbehaving server."""
    return Either(request.param, server.url)
